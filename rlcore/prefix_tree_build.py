"""Index arithmetic behind PrefixTree, in NumPy on the host: tries, node trees, and which tokens are predictions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from torch import Tensor

Tokens = Sequence[int] | Tensor


class Packed(NamedTuple):
    """A packed forest as int64 arrays; the names are those of PrefixTree, `counts` [S] the predictions of a path."""

    input_ids: np.ndarray
    position: np.ndarray
    end: np.ndarray
    target: np.ndarray
    loss_rows: np.ndarray
    last_rows: np.ndarray
    counts: np.ndarray


def pack_trie(tokens: np.ndarray, lengths: np.ndarray, predicted: np.ndarray) -> Packed:
    """The trie of paths, given one after the other; `predicted` says for each of their tokens whether it is one."""
    starts = np.cumsum(lengths) - lengths
    order = lexicographic(tokens, starts, lengths)
    # Everything below walks the paths' tokens in sorted order; `at` is where each of them stands in `tokens`.
    at, depth = ranges(starts[order], lengths[order]), ranges(0, lengths[order])
    fresh, row = trie_rows(tokens[at], depth, lengths[order])
    end = np.empty(int(fresh.sum()), dtype=np.int64)
    # The paths through a row are neighbours; the last of them ends last, and of equal indices the last is kept.
    end[row] = np.repeat(row[np.cumsum(lengths[order]) - 1] + 1, lengths[order])
    row_of = np.empty_like(row)
    row_of[at] = row
    chosen = np.flatnonzero(predicted)
    return Packed(
        tokens[at[fresh]],
        depth[fresh],
        end,
        tokens[chosen],
        row_of[chosen - 1],
        row_of[starts + lengths - 1],
        np.add.reduceat(predicted, starts, dtype=np.int64),
    )


def pack_nodes(nodes: list[np.ndarray], order: list[int], parent: Sequence[int], predicted: np.ndarray,
               leaves: Sequence[int]) -> Packed:  # fmt: skip
    """The nodes of `order` (depth first) packed as they are, with a path from a root to each of `leaves`.

    `predicted` says for each token of all nodes, one after the other, whether it is a prediction.
    """
    lengths = np.asarray([len(node) for node in nodes])
    first = np.cumsum(lengths) - lengths  # where a node's tokens begin among the tokens of all
    start, depth, tail = np.zeros(len(nodes), np.int64), np.zeros(len(nodes), np.int64), np.full(len(nodes), -1)
    start[order] = np.cumsum(lengths[order]) - lengths[order]
    for k in order:  # `tail` is the last row of the path down to a node, -1 where it has no token yet
        above = parent[k]
        if above >= 0:
            depth[k], tail[k] = depth[above] + lengths[above], tail[above]
        if lengths[k]:
            tail[k] = start[k] + lengths[k] - 1
    end = start + lengths
    for k in reversed(order):
        if parent[k] >= 0:
            end[parent[k]] = max(end[parent[k]], end[k])

    tokens = np.concatenate(nodes)
    before = ranges(start - 1, lengths)  # the row that predicts a token: the one before, or the end of the path above
    filled = np.flatnonzero(lengths)
    before[first[filled]] = [tail[parent[k]] if parent[k] >= 0 else -1 for k in filled.tolist()]
    through = [path_to(leaf, parent) for leaf in leaves]
    chosen, counts = np.flatnonzero(predicted), np.zeros(len(nodes), np.int64)
    counts[filled] = np.add.reduceat(predicted, first[filled], dtype=np.int64) if len(filled) else 0
    walked = np.asarray(list(chain.from_iterable(through)), np.int64)
    taken = chosen[ranges((np.cumsum(counts) - counts)[walked], counts[walked])]
    return Packed(
        np.concatenate([nodes[k] for k in order]),
        np.repeat(depth[order], lengths[order]) + ranges(0, lengths[order]),
        np.repeat(end[order], lengths[order]),
        tokens[taken],
        before[taken],
        tail[list(leaves)],
        np.asarray([counts[path].sum() for path in through], np.int64),
    )


def path_to(node: int, parent: Sequence[int]) -> list[int]:
    """The nodes from a root down to `node`."""
    path = [node]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    return path[::-1]


def depth_first(parent: Sequence[int]) -> list[int]:
    """All nodes, each before its children, roots and children by index. ValueError for bad parents and cycles."""
    children: list[list[int]] = [[] for _ in range(len(parent) + 1)]  # the last list holds the roots
    for i, above in enumerate(parent):
        if not -1 <= above < len(parent):
            raise ValueError(f"parent[{i}]: expected -1 or the index of one of {len(parent)} nodes, got {above}")
        children[above].append(i)
    order: list[int] = []
    waiting = children[-1][::-1]
    while waiting:
        order.append(waiting.pop())
        waiting += children[order[-1]][::-1]
    if len(order) < len(parent):
        lost = min(set(range(len(parent))) - set(order))
        raise ValueError(f"parent[{lost}]: expected a tree, got a cycle: no root is above node {lost}")
    return order


def predictions(predict: Sequence[int | Sequence[int]] | None, lengths: np.ndarray, at_start: np.ndarray) -> np.ndarray:
    """Which of the tokens of all paths (or nodes) are predictions, [sum of lengths] bool.

    at_start [S]: whether the first token has nothing before it, so that nothing predicts it. An entry of `predict` is
    the first predicted index or 0/1 per token; None: every token that something predicts.
    Raises ValueError for another number of entries, and for entries that do not fit their path.
    """
    least = np.minimum(at_start, lengths)
    if predict is None:
        return ranges(0, lengths) >= np.repeat(least, lengths)
    if count(predict, "predict") != len(lengths):
        raise ValueError(f"predict: expected one entry for each of {len(lengths)}, got {len(predict)}")
    froms, masks = np.zeros(len(lengths), np.int64), {}
    for s, (entry, low, length) in enumerate(zip(predict, least.tolist(), lengths.tolist(), strict=True)):
        if is_int(entry):
            fits = low <= entry <= length
            froms[s] = entry if fits else 0
        else:
            mask = masks[s] = array(entry)
            fits = mask.shape == (length,) and bool(np.isin(mask, (0, 1)).all()) and not mask[:low].any()
        if not fits:
            bits = f"{length} zeros and ones" + (", 0 first, since nothing predicts the first token" if low else "")
            raise ValueError(f"predict[{s}]: expected an index from {low} to {length}, or {bits}; got {entry!r}")
    chosen = ranges(0, lengths) >= np.repeat(froms, lengths)
    starts = np.cumsum(lengths) - lengths
    for s, mask in masks.items():
        chosen[starts[s] : starts[s] + lengths[s]] = mask
    return chosen


def is_int(x: object) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def node_table(end: np.ndarray) -> np.ndarray:
    """[K, 4] (start, stop, end, parent) of the runs of one `end`: a row and its only child share it, no others do."""
    start = np.flatnonzero(np.r_[True, end[1:] != end[:-1]])
    stop, last = np.r_[start[1:], len(end)], end[start]
    parent: list[int] = []
    open_nodes: list[tuple[int, int]] = [(-1, len(end) + 1)]
    for k, (row, below) in enumerate(zip(start.tolist(), last.tolist(), strict=True)):
        while open_nodes[-1][1] <= row:
            open_nodes.pop()
        parent.append(open_nodes[-1][0])
        open_nodes.append((k, below))
    return np.stack([start, stop, last, np.asarray(parent)], axis=1)


def rows_to(row: int, table: np.ndarray) -> np.ndarray:
    """The packed rows of the path that ends at `row`, by the node table of its forest."""
    k = int(np.searchsorted(table[:, 0], row, side="right")) - 1
    parts = [np.arange(table[k, 0], row + 1)]
    while (k := int(table[k, 3])) >= 0:
        parts.append(np.arange(table[k, 0], table[k, 1]))
    return np.concatenate(parts[::-1])


def distinct(rows: np.ndarray, M: int) -> tuple[np.ndarray, np.ndarray]:
    """(the distinct values among `rows`, ascending; the place of each of `rows` among them), of M possible ones."""
    found = np.zeros(M, dtype=np.bool_)
    found[rows] = True
    return np.flatnonzero(found), (np.cumsum(found) - 1)[rows]


def ranges(starts: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
    """starts[s], starts[s] + 1, ... (lengths[s] of them) for every s, one after the other."""
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(int(lengths.sum()))


def lexicographic(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The stable order of the paths. As unsigned big-endian bytes they compare by memcmp, which beats lists by far."""
    keys = (tokens.view(np.uint64) ^ np.uint64(1 << 63)).astype(">u8").tobytes()
    slices = [keys[8 * a : 8 * b] for a, b in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]
    return np.asarray(sorted(range(len(slices)), key=slices.__getitem__))


def trie_rows(tokens: np.ndarray, depth: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(fresh, row) of every token of the sorted paths: whether the path before lacks it, and its packed row."""
    before = np.repeat(np.r_[0, lengths[:-1]], lengths)
    differs = (depth >= before) | (tokens != tokens[np.arange(len(tokens)) - before])
    shared = np.minimum.reduceat(np.where(differs, depth, len(tokens)), np.cumsum(lengths) - lengths)
    fresh = depth >= np.repeat(shared, lengths)
    row = (np.cumsum(fresh) - 1) * fresh
    # A shared token has the row of the path before. At one depth rows rise along the sorted paths, so a running maximum
    # fills them in; a lift of depth * M keeps the depths apart. NumPy sorts 16-bit keys by radix, in linear time.
    column = np.argsort(depth.astype(np.min_scalar_type(int(depth.max()))), kind="stable")
    lift = depth[column] * int(fresh.sum())
    row[column] = np.maximum.accumulate(row[column] + lift) - lift
    return fresh, row


def flat_ids(paths: Sequence[Tokens], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all paths one after the other, and their lengths."""
    if all(type(path) is list for path in paths):
        try:
            values = np.asarray(list(chain.from_iterable(paths)))
        except ValueError:  # ragged: the loop below says which
            values = np.empty(0)
        if values.ndim == 1 and values.dtype.kind == "i":
            return values.astype(np.int64), np.asarray([len(path) for path in paths])
    ids = [token_ids(path, f"{name}[{s}]") for s, path in enumerate(paths)]
    return np.concatenate(ids), np.asarray([len(path) for path in ids])


def token_ids(tokens: Tokens, name: str, what: str = "token ids") -> np.ndarray:
    """One list as int64. ValueError for anything but one dimension of integers that int64 holds."""
    values = array(tokens)
    if values.size == 0:
        return np.empty(0, dtype=np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected a list of {what}, got {values.ndim} dimensions of {values.dtype}")
    if values.dtype == np.uint64 and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected {what} that int64 holds, got {values.max()}")
    return values.astype(np.int64)


def array(values: object) -> np.ndarray:
    """As NumPy sees it; what is ragged as one dimension of objects."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    try:
        return np.asarray(values)
    except ValueError:
        return np.asarray([None])


def count(given: Sequence[object] | Tensor, name: str) -> int:
    """How many entries there are. TypeError for what has none."""
    try:
        return len(given)
    except TypeError:
        raise TypeError(f"{name}: expected a list, got {given!r}") from None
