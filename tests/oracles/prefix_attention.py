"""Float64 oracle: every row attends along its own path. Knows paths and nothing of subtree ends, depths or packing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def trie_rows(paths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Packed rows of each path in a trie: distinct beginnings in lexicographic order are the depth-first order."""
    beginnings = sorted({tuple(path[: n + 1]) for path in paths for n in range(len(path))})
    row = {beginning: i for i, beginning in enumerate(beginnings)}
    return [[row[tuple(path[: n + 1])] for n in range(len(path))] for path in paths]


def group_rows(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Packed rows of prompt + response for every response, and of each prompt alone at the end."""
    rows, alone, cursor = [], [], 0
    for prompt, answers in zip(prompts, responses, strict=True):
        head = list(range(cursor, cursor + len(prompt)))
        alone.append(head)
        cursor += len(prompt)
        for answer in answers:
            rows.append(head + list(range(cursor, cursor + len(answer))))
            cursor += len(answer)
    return rows + alone


def keys_of_rows(rows: Sequence[Sequence[int]], window: int | None = None) -> list[list[int]]:
    """The keys that each packed row sees: its path down to itself, the last `window` of them."""
    seen: dict[int, list[int]] = {}
    for path in rows:
        for n, row in enumerate(path):
            keys = list(path[: n + 1]) if window is None else list(path[max(0, n + 1 - window) : n + 1])
            assert seen.setdefault(row, keys) == keys
    return [seen[i] for i in range(len(seen))]


def attention(q, k, v, rows, scale, window=None, softcap=None, sink=None, do=None):
    """o [M, Hq, Dv]; with `do` also (dq, dk, dv, dsink)."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    M, Hq, _ = q.shape
    ratio = Hq // k.shape[1]
    o = np.zeros((M, Hq, v.shape[2]))
    dq, dk, dv, dsink = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(Hq)
    for i, keys in enumerate(keys_of_rows(rows, window)):
        for h in range(Hq):
            K, V = k[keys, h // ratio], v[keys, h // ratio]
            s = scale * (K @ q[i, h])
            z = s if softcap is None else softcap * np.tanh(s / softcap)
            top = z.max() if sink is None else max(z.max(), float(sink[h]))
            weights = np.exp(z - top)
            rest = 0.0 if sink is None else np.exp(float(sink[h]) - top)
            p = weights / (weights.sum() + rest)
            o[i, h] = p @ V
            if do is None:
                continue
            g = np.asarray(do[i, h], dtype=np.float64)
            along = g @ o[i, h]
            dz = p * (V @ g - along)
            ds = dz if softcap is None else dz * (1 - np.tanh(s / softcap) ** 2)
            dq[i, h] += scale * (ds @ K)
            np.add.at(dk[:, h // ratio], keys, scale * np.outer(ds, q[i, h]))
            np.add.at(dv[:, h // ratio], keys, np.outer(p, g))
            dsink[h] -= rest / (weights.sum() + rest) * along
    return o if do is None else (o, dq, dk, dv, dsink)
