"""Packing of shared prefixes: token paths as one flat depth-first sequence in which every shared token occurs once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
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
    predicts target[n]; last_rows [S] the packed row of a path's last token; group [S] the group (or tree) of a path.
    node_table [K, 4] (start, stop, end, parent) of the unbranched runs; it stays on the host.
    depth: the longest path, in tokens.
    """

    input_ids: Tensor
    position: Tensor
    end: Tensor
    target: Tensor
    offsets: Tensor
    loss_rows: Tensor
    last_rows: Tensor
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
        last_rows: list[int] = []
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
                last_rows.append(cursor - 1 if len(body) else last)
                lengths.append(len(body))
                group.append(g)
        return _assemble(ids, position, end, target, loss_rows, last_rows, lengths, group, device)

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
        tokens, lengths = _flat_ids(paths, "paths")
        if not lengths.all():
            raise ValueError(f"paths[{int(lengths.argmin())}]: expected at least one token, got an empty path")
        starts = np.cumsum(lengths) - lengths
        order = _lexicographic(tokens, starts, lengths)
        # Everything below walks the paths' tokens in sorted order; `at` is where each of them stands in `tokens`.
        at, depth = _ranges(starts[order], lengths[order]), _ranges(0, lengths[order])
        fresh, row = _trie_rows(tokens[at], depth, lengths[order])
        end = np.empty(int(fresh.sum()), dtype=np.int64)
        # The paths through a row are neighbours; the last of them ends last, and of equal indices the last is kept.
        end[row] = np.repeat(row[np.cumsum(lengths[order]) - 1] + 1, lengths[order])
        row_of = np.empty_like(row)
        row_of[at] = row
        firsts: dict[int, int] = {}
        predicted = _ranges(starts + 1, lengths - 1)
        return _assemble(
            [tokens[at[fresh]]],
            [depth[fresh]],
            [end],
            [tokens[predicted]],
            [row_of[predicted - 1]],
            row_of[starts + lengths - 1],
            lengths - 1,
            [firsts.setdefault(first, len(firsts)) for first in tokens[starts].tolist()],
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
        moved = ("input_ids", "position", "end", "target", "offsets", "loss_rows", "last_rows", "group")
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


def _ranges(starts: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
    """starts[s], starts[s] + 1, ... (lengths[s] of them) for every s, one after the other."""
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(int(lengths.sum()))


def _lexicographic(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The stable order of the paths. As unsigned big-endian bytes they compare by memcmp, which beats lists by far."""
    keys = (tokens.view(np.uint64) ^ np.uint64(1 << 63)).astype(">u8").tobytes()
    slices = [keys[8 * a : 8 * b] for a, b in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]
    return np.asarray(sorted(range(len(slices)), key=slices.__getitem__))


def _trie_rows(tokens: np.ndarray, depth: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _flat_ids(paths: Sequence[Tokens], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all paths one after the other, and their lengths."""
    if all(type(path) is list for path in paths):
        try:
            values = np.asarray(list(chain.from_iterable(paths)))
        except ValueError:  # ragged: the loop below says which
            values = np.empty(0)
        if values.ndim == 1 and values.dtype.kind in "iu":
            return values.astype(np.int64), np.asarray([len(path) for path in paths])
    ids = [_ids(path, f"{name}[{s}]") for s, path in enumerate(paths)]
    return np.concatenate(ids), np.asarray([len(path) for path in ids])


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
    last_rows: list[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
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
        offsets=tensor(np.r_[0, np.cumsum(lengths)].astype(np.int64)),
        loss_rows=tensor(flat(loss_rows)),
        last_rows=tensor(np.asarray(last_rows, dtype=np.int64)),
        group=tensor(np.asarray(group, dtype=np.int64)),
        node_table=torch.from_numpy(node_table(ends).astype(np.int64)),
        depth=int(positions.max()) + 1,
    )
