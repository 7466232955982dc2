"""Packing of shared prefixes: token paths as one flat depth-first sequence in which every shared token occurs once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Tokens = Sequence[int]


class Nodes(NamedTuple):
    """Unbranched runs of the packed sequence, host-side. Node i owns rows start[i]:stop[i]; parent is -1 for a root."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    parent: tuple[int, ...]


class TreeStats(NamedTuple):
    """What sharing saves. Bounds are the largest possible speed-ups of per-token work and of attention."""

    tokens_before: int
    tokens_after: int
    token_bound: float
    attention_bound: float


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A forest of token paths packed depth first, so that the descendants of every token are contiguous.

    M packed rows, S sequences (paths), N predictions (one row per path and predicted token).

    input_ids [M] the packed tokens; position [M] their depth; end [M] the row after the last descendant:
    row i attends to row j  iff  j <= i < end[j].
    target [N] the predicted tokens in path order; offsets [S+1] as in TokenBatch; loss_rows [N] the packed row that
    predicts target[n]; group [S] the group (or tree) of a path.
    node_table [K, 4] (start, stop, end, parent) of the unbranched runs; it stays on the host.
    depth: the longest path, in tokens.
    """

    input_ids: Tensor
    position: Tensor
    end: Tensor
    target: Tensor
    offsets: Tensor
    loss_rows: Tensor
    group: Tensor
    node_table: Tensor
    depth: int

    @classmethod
    def from_groups(
        cls,
        prompts: Sequence[Tokens],
        responses: Sequence[Sequence[Tokens]],
        device: torch.device | str | None = None,
    ) -> PrefixTree:
        """Packs each prompt once, followed by its responses; several groups make a forest.

        The predictions are the response tokens; the prompt's last row predicts the first token of every response.
        An empty response is a sequence of length 0. prompts: G lists of ids; responses: G lists of lists of ids.
        Raises ValueError for an empty prompt, no prompts, or lists of different lengths.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"responses: expected one list per prompt ({len(prompts)}), got {len(responses)}")
        if not prompts:
            raise ValueError("prompts: expected at least one prompt, got none")
        ids: list[np.ndarray] = []
        position: list[np.ndarray] = []
        end: list[np.ndarray] = []
        target: list[np.ndarray] = []
        loss_rows: list[np.ndarray] = []
        lengths: list[int] = []
        group: list[int] = []
        cursor = 0
        for g, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
            head = _ids(prompt, f"prompts[{g}]")
            if not len(head):
                raise ValueError(f"prompts[{g}]: expected at least one token, got an empty prompt")
            bodies = [_ids(answer, f"responses[{g}][{s}]") for s, answer in enumerate(answers)]
            stop = cursor + len(head) + sum(len(body) for body in bodies)
            last = cursor + len(head) - 1
            ids.append(head)
            position.append(np.arange(len(head)))
            end.append(np.full(len(head), stop))
            cursor += len(head)
            for body in bodies:
                rows = np.arange(cursor - 1, cursor + len(body) - 1)
                rows[:1] = last
                cursor += len(body)
                ids.append(body)
                position.append(np.arange(len(head), len(head) + len(body)))
                end.append(np.full(len(body), cursor))
                target.append(body)
                loss_rows.append(rows)
                lengths.append(len(body))
                group.append(g)
        return _assemble(ids, position, end, target, loss_rows, lengths, group, device)

    @classmethod
    def from_paths(cls, paths: Sequence[Tokens], device: torch.device | str | None = None) -> PrefixTree:
        """Packs token paths as a trie: whatever two paths share from their start on is stored once, at any depth.

        One prediction per path and token after the first, in the order of `paths`; duplicates, prefixes of other paths
        and one-token paths are allowed. The packed order is lexicographic, whatever the order of `paths`.
        `group` numbers the trees (paths with the same first token) in order of first appearance.
        Raises ValueError for an empty path or no paths.
        """
        if not len(paths):
            raise ValueError("paths: expected at least one path, got none")
        tokens = [_ids(path, f"paths[{s}]") for s, path in enumerate(paths)]
        for s, path in enumerate(tokens):
            if not len(path):
                raise ValueError(f"paths[{s}]: expected at least one token, got an empty path")
        order = sorted(range(len(tokens)), key=lambda s: tokens[s].tolist())
        rows_of: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(tokens)
        ids: list[np.ndarray] = []
        position: list[np.ndarray] = []
        end = np.zeros(sum(len(path) for path in tokens), dtype=np.int64)
        cursor = 0
        rows = path = np.empty(0, dtype=np.int64)
        for s in order:
            shared = min(len(path), len(tokens[s]))
            differs = np.flatnonzero(path[:shared] != tokens[s][:shared])
            shared = int(differs[0]) if len(differs) else shared
            # A path that merely repeats the beginning of the open one closes nothing: the longer one stays open.
            if shared < len(tokens[s]):
                end[rows[shared:]] = cursor
                fresh = np.arange(cursor, cursor + len(tokens[s]) - shared)
                ids.append(tokens[s][shared:])
                position.append(np.arange(shared, len(tokens[s])))
                rows = np.concatenate([rows[:shared], fresh])
                path = tokens[s]
                cursor += len(fresh)
            rows_of[s] = rows[: len(tokens[s])]
        end[rows] = cursor
        firsts: dict[int, int] = {}
        group = [firsts.setdefault(int(p[0]), len(firsts)) for p in tokens]
        return _assemble(
            ids,
            position,
            [end[:cursor]],
            [p[1:] for p in tokens],
            [rows[:-1] for rows in rows_of],
            [len(p) - 1 for p in tokens],
            group,
            device,
        )

    @property
    def M(self) -> int:
        return self.input_ids.shape[0]

    @property
    def N(self) -> int:
        return self.target.shape[0]

    @property
    def S(self) -> int:
        return self.group.shape[0]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def nodes(self) -> Nodes:
        """The unbranched runs as host tuples (start, stop, parent)."""
        start, stop, _, parent = (tuple(column) for column in self.node_table.T.tolist())
        return Nodes(start, stop, parent)

    def to(self, device: torch.device | str) -> PrefixTree:
        """The same tree with its index tensors on `device`; the node table stays on the host."""
        moved = ("input_ids", "position", "end", "target", "offsets", "loss_rows", "group")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})

    def stats(self) -> TreeStats:
        """Tokens and the largest possible speed-ups against one padded-free row per path. Not for use inside a step.

        Attention is counted in query-key pairs: L(L+1)/2 per path before, depth + 1 per packed row after.
        A path without predictions would not be in a batch of repeated prompts and counts as nothing.
        """
        lengths = self.offsets.diff()
        first = self.offsets[:-1][lengths > 0]
        total = (lengths[lengths > 0] + self.position[self.loss_rows[first]] + 1).double()
        before = int(total.sum())
        pairs = float((total * (total + 1) / 2).sum())
        return TreeStats(before, self.M, before / self.M, pairs / float((self.position.double() + 1).sum()))


def node_table(position: np.ndarray, end: np.ndarray) -> np.ndarray:
    """[K, 4] (start, stop, end, parent) of the runs of one `end`: a row and its only child share it, no others do."""
    start = np.flatnonzero(np.r_[True, end[1:] != end[:-1]])
    stop = np.r_[start[1:], len(end)]
    parent = np.full(len(start), -1)
    open_nodes: list[int] = []
    for k, row in enumerate(start.tolist()):
        while open_nodes and end[start[open_nodes[-1]]] <= row:
            open_nodes.pop()
        parent[k] = open_nodes[-1] if open_nodes else -1
        open_nodes.append(k)
    return np.stack([start, stop, end[start], parent], axis=1)


def _ids(tokens: Tokens, name: str) -> np.ndarray:
    values = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if values.size == 0:
        return np.empty(0, dtype=np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected a list of token ids, got {values.ndim} dimensions of {values.dtype}")
    return values.astype(np.int64)


def _assemble(
    ids: list[np.ndarray],
    position: list[np.ndarray],
    end: list[np.ndarray],
    target: list[np.ndarray],
    loss_rows: list[np.ndarray],
    lengths: list[int],
    group: list[int],
    device: torch.device | str | None,
) -> PrefixTree:
    def flat(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device or "cpu")

    positions, ends = flat(position), flat(end)
    return PrefixTree(
        input_ids=tensor(flat(ids)),
        position=tensor(positions),
        end=tensor(ends),
        target=tensor(flat(target)),
        offsets=tensor(np.cumsum([0, *lengths], dtype=np.int64)),
        loss_rows=tensor(flat(loss_rows)),
        group=tensor(np.asarray(group, dtype=np.int64)),
        node_table=torch.from_numpy(node_table(positions, ends).astype(np.int64)),
        depth=int(positions.max()) + 1,
    )
