"""Packing of shared prefixes: token paths as one flat depth-first sequence in which every shared token occurs once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlcore import prefix_tree_build as build
from rlcore.prefix_tree_build import Tokens

# What `predict` holds for a path or a node: the first predicted index, or 0/1 per token.
Predict = Sequence[int | Sequence[int]]
# Sharing is on from so many tokens, or query-key pairs, of all paths apart per packed one. Below that it saves 5 % of
# the work per token at best, and attention that is composed of one call per run pays for every branch.
SHARE_FROM = 1.05


class Nodes(NamedTuple):
    """Unbranched runs of the packed sequence, host-side. Node i owns rows start[i]:stop[i]; parent is -1 for a root."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    parent: tuple[int, ...]


class TreeStats(NamedTuple):
    """What sharing saves, or would where it is off (`shared`).

    Bounds are the largest possible speed-ups of per-token work and of attention.
    """

    tokens_before: int
    tokens_after: int
    token_bound: float
    attention_bound: float
    shared: bool


class Reads(NamedTuple):
    """Rows that are read, each once: rows [n] ascending, and at [N] the place among them of every read."""

    rows: Tensor
    at: Tensor

    def to(self, device: torch.device | str) -> Reads:
        return Reads(self.rows.to(device), self.at.to(device))


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """A forest of token paths packed depth first, so that the descendants of every token are contiguous.

    M packed rows, S sequences (paths), N predictions (one row per path and predicted token).

    input_ids [M] the packed tokens; position [M] their depth; end [M] the row after the last descendant:
    row i attends to row j  iff  j <= i < end[j].
    target [N] the predicted tokens in path order; offsets [S+1] as in TokenBatch; loss_rows [N] the packed row that
    predicts target[n]; last_rows [S] the packed row of a path's last token; group [S] the group (or tree) of a path.
    loss_reads, last_reads: loss_rows and last_rows, each row once.
    node_table [K, 4] (start, stop, end, parent) of the unbranched runs; it stays on the host.
    depth: the longest path, in tokens.
    if_shared: what sharing would save, in a tree whose paths are kept apart.
    """

    input_ids: Tensor
    position: Tensor
    end: Tensor
    target: Tensor
    offsets: Tensor
    loss_rows: Tensor
    last_rows: Tensor
    loss_reads: Reads
    last_reads: Reads
    group: Tensor
    node_table: Tensor
    depth: int
    if_shared: TreeStats | None = None

    @classmethod
    def from_groups(
        cls,
        prompts: Sequence[Tokens],
        responses: Sequence[Sequence[Tokens]],
        share: bool | None = None,
        device: torch.device | str | None = None,
    ) -> PrefixTree:
        """Packs each prompt once, followed by its responses; several groups make a forest.

        The predictions are the response tokens; the prompt's last row predicts the first token of every response.
        An empty response is a sequence of length 0. prompts: G lists of ids; responses: G lists of lists of ids.
        share: False repeats the prompt for every response; None does so where sharing would not pay.
        Raises ValueError for an empty prompt, no prompts, or lists of different lengths.
        """
        if build.count(prompts, "prompts") != build.count(responses, "responses"):
            raise ValueError(f"responses: expected one list per prompt ({len(prompts)}), got {len(responses)}")
        if not len(prompts):
            raise ValueError("prompts: expected at least one prompt, got none")
        nodes: list[np.ndarray] = []
        parent: list[int] = []
        group: list[int] = []
        for g, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
            nodes.append(build.token_ids(prompt, f"prompts[{g}]"))
            parent.append(-1)
            if not len(nodes[-1]):
                raise ValueError(f"prompts[{g}]: expected at least one token, got an empty prompt")
            parent += [len(nodes) - 1] * build.count(answers, f"responses[{g}]")
            group += [g] * len(answers)
            nodes += [build.token_ids(answer, f"responses[{g}][{s}]") for s, answer in enumerate(answers)]
        leaves = [k for k, above in enumerate(parent) if above >= 0]
        predicted = np.repeat(np.asarray(parent) >= 0, [len(node) for node in nodes])
        packed = build.pack_nodes(nodes, list(range(len(nodes))), parent, predicted, leaves)
        return _shared(_tree(packed, group), share, device)

    @classmethod
    def from_paths(
        cls,
        paths: Sequence[Tokens],
        predict: Predict | None = None,
        group: Sequence[int] | Tensor | None = None,
        share: bool | None = None,
        device: torch.device | str | None = None,
    ) -> PrefixTree:
        """Packs token paths as a trie: whatever two paths share from their start on is stored once, at any depth.

        The predictions come in the order of `paths`. predict: which tokens of each path they are, by an index n >= 1
        (every token from there on) or by 0/1 per token, 0 for the first; None: all after the first. Duplicates,
        prefixes of other paths and one-token paths are allowed. The packed order is lexicographic, whatever the order
        of `paths`. group [S] ids; None numbers the trees (paths with the same first token) by first appearance.
        share: False keeps every path apart; None does so where sharing would not pay.
        Raises ValueError for an empty path, no paths, or entries of `predict` and `group` that do not fit.
        """
        if not build.count(paths, "paths"):
            raise ValueError("paths: expected at least one path, got none")
        tokens, lengths = build.flat_ids(paths, "paths")
        if not lengths.all():
            raise ValueError(f"paths[{int(lengths.argmin())}]: expected at least one token, got an empty path")
        packed = build.pack_trie(tokens, lengths, build.predictions(predict, lengths, np.ones_like(lengths)))
        first = tokens[np.cumsum(lengths) - lengths].tolist()
        return _shared(_tree(packed, _groups(group, first)), share, device)

    @classmethod
    def from_nodes(
        cls,
        tokens: Sequence[Tokens],
        parent: Sequence[int],
        predict: Predict | None = None,
        leaves: Sequence[int] | None = None,
        group: Sequence[int] | Tensor | None = None,
        share: bool | None = None,
        device: torch.device | str | None = None,
    ) -> PrefixTree:
        """Packs a tree whose nodes are known, as a tree of rollouts is: node i holds tokens[i] and follows parent[i].

        tokens[i] may be empty; parent[i] is the index of any node, -1 for a root. A path leads to each of `leaves`, in
        their order; None: the nodes without children, by index. Nodes that no path goes through are left out. Nodes
        are never merged, even where their tokens agree. predict: as in from_paths, but per node and with index 0
        allowed where a node follows another token; None: all but the first tokens of the paths. A path has its own
        prediction of every token, shared or not. Packed order: roots and children by index. group [S] ids; None numbers
        the roots by first appearance. share: as in from_paths.
        Raises ValueError for bad parents, cycles, paths without tokens, nothing at all, and predictions of a first
        token.
        """
        above = build.token_ids(parent, "parent", "indices").tolist()
        if build.count(tokens, "tokens") != len(above):
            raise ValueError(f"parent: expected one index for each of {len(tokens)} nodes, got {len(above)}")
        if not above:
            raise ValueError("tokens: expected at least one node, got none")
        nodes = [build.token_ids(own, f"tokens[{i}]") for i, own in enumerate(tokens)]
        order = build.depth_first(above)
        if leaves is None:
            leaves = sorted(set(range(len(nodes))) - set(above))
        leaves = build.token_ids(leaves, "leaves", "indices").tolist()
        for s, leaf in enumerate(leaves):
            if not 0 <= leaf < len(nodes):
                raise ValueError(f"leaves[{s}]: expected the index of one of {len(nodes)} nodes, got {leaf}")
        through = [build.path_to(leaf, above) for leaf in leaves]
        for leaf, path in zip(leaves, through, strict=True):
            if not any(len(nodes[k]) for k in path):
                raise ValueError(f"tokens: expected at least one on every path, got none on the one to node {leaf}")
        used = set().union(*through)
        if not used:
            raise ValueError("leaves: expected at least one node, got none")
        follows = np.zeros(len(nodes), bool)  # whether a token stands before the node
        for k in order:
            follows[k] = above[k] >= 0 and (follows[above[k]] or len(nodes[above[k]]) > 0)
        predicted = build.predictions(predict, np.asarray([len(node) for node in nodes]), ~follows)
        packed = build.pack_nodes(nodes, [k for k in order if k in used], above, predicted, leaves)
        return _shared(_tree(packed, _groups(group, [path[0] for path in through])), share, device)

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
        moved = ("input_ids", "position", "end", "target", "offsets", "loss_rows", "last_rows", "group",
                 "loss_reads", "last_reads")  # fmt: skip
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})

    def unshared(self) -> PrefixTree:
        """The same predictions in the same order, with every path a tree of its own: what sharing is compared with."""
        if self.if_shared is not None or not self.S:
            return self
        host = self.to("cpu")
        table = self.node_table.numpy()
        rows = [build.rows_to(row, table) for row in host.last_rows.tolist()]
        lengths = np.asarray([len(path) for path in rows])
        start, counts = np.cumsum(lengths) - lengths, host.offsets.diff().numpy()
        packed = build.Packed(
            host.input_ids.numpy()[np.concatenate(rows)],
            build.ranges(0, lengths),
            np.repeat(start + lengths, lengths),
            host.target.numpy(),
            # A path's row at some depth is that many rows after its first one.
            np.repeat(start, counts) + host.position.numpy()[host.loss_rows.numpy()],
            start + lengths - 1,
            counts,
        )
        alone = replace(_tree(packed, host.group.numpy()), if_shared=self.stats()._replace(shared=False))
        return alone.to(self.device)

    def stats(self) -> TreeStats:
        """Tokens and the largest possible speed-ups against one padded-free row per path. Not for use inside a step.

        Attention is counted in query-key pairs: L(L+1)/2 per path before, depth + 1 per packed row after.
        A path without predictions would not be in a batch of repeated prompts and counts as nothing. Bounds are 1 where
        nothing is predicted at all.
        """
        if self.if_shared is not None:
            return self.if_shared
        # NumPy: torch would wake its threads for index arithmetic that takes microseconds.
        position, last, counts = (x.cpu().numpy() for x in (self.position, self.last_rows, self.offsets.diff()))
        total = (position[last[counts > 0]] + 1).astype(np.float64)
        before, pairs = int(total.sum()), float((total * (total + 1) / 2).sum())
        if not before:
            return TreeStats(0, self.M, 1.0, 1.0, True)
        return TreeStats(before, self.M, before / self.M, pairs / float((position + 1.0).sum()), True)


def _shared(tree: PrefixTree, share: bool | None, device: torch.device | str | None) -> PrefixTree:
    if share is None:
        lengths = tree.position[tree.last_rows] + 1
        repeated, pairs = int(lengths.sum()), int((lengths * (lengths + 1)).sum()) // 2
        # A long prompt among many short paths: few tokens less, but most of what attention does.
        little = pairs < SHARE_FROM * int((tree.position + 1).sum())
        share = not (tree.M < repeated < SHARE_FROM * tree.M and little)
    return (tree if share else tree.unshared()).to(device or "cpu")


def _groups(given: Sequence[int] | Tensor | None, trees: list[int]) -> np.ndarray:
    """The group ids of the paths; None: 0 in the tree of the first path, 1 in the next new tree, and so on."""
    if given is None:
        seen: dict[int, int] = {}
        return np.asarray([seen.setdefault(tree, len(seen)) for tree in trees])
    if build.count(given, "group") != len(trees):
        raise ValueError(f"group: expected one id for each of {len(trees)} paths, got {len(given)}")
    return build.token_ids(given, "group", "ids")


def _tree(packed: build.Packed, group: Sequence[int] | np.ndarray) -> PrefixTree:
    def tensor(values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

    return PrefixTree(
        input_ids=tensor(packed.input_ids),
        position=tensor(packed.position),
        end=tensor(packed.end),
        target=tensor(packed.target),
        offsets=tensor(np.r_[0, np.cumsum(packed.counts)]),
        loss_rows=tensor(packed.loss_rows),
        last_rows=tensor(packed.last_rows),
        loss_reads=Reads(*map(tensor, build.distinct(packed.loss_rows, len(packed.end)))),
        last_reads=Reads(*map(tensor, build.distinct(packed.last_rows, len(packed.end)))),
        group=tensor(group),
        node_table=tensor(build.node_table(packed.end)),
        depth=int(packed.position.max()) + 1,
    )
