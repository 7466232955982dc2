"""Sampling that branches: a tree of sequences, any prefix of which can be continued any number of times.

A sequence is a node: the first `at` tokens of its parent, and its own. At rest a node holds keys and values of its own
tokens alone; while it runs it is a row of a batch, which holds the whole prefix. So what runs is copied and nothing
else, and no prefix is computed again: a branch passes the last token of its prefix through the model, once for all its
sequences, to draw their first tokens; prompts, and what is read after a prefix, pass without their last.
Token t of a sequence is drawn with a number made from the seed, the sequence's place in the tree and t, so that it does
not depend on what else runs, on when others finish, or on the order in which branches are made.
Sliding windows are in the mask alone: every layer keeps all keys, since a prefix from before the window may go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcore.adapters.transformers import EXACT_LAYERS, decoder, max_depth, unwrap
from rlcore.engine.sampler import check_depth, draw, prefill, shared_length
from rlcore.engine.seeding import generator
from rlcore.prefix_tree_build import Tokens, count, is_int, token_ids

KeysValues = list[tuple[Tensor, Tensor]]  # per layer [heads, tokens, head size]


@dataclass
class Node:
    """A sequence: the first `at` tokens of its parent (-1: none), then its own, with the log-probs they were drawn at.

    `behaviour_logp` and `model_logp` are those of `Samples`; what is read has none, and limit 0. `kv` begins one token
    before the own ones, with the one that the branch passed, and ends before the last, which nothing followed.
    """

    parent: int
    at: int
    name: str
    limit: int = 0
    uniform: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    behaviour_logp: list[float] = field(default_factory=list)
    model_logp: list[float] = field(default_factory=list)
    running: bool = False
    kv: KeysValues = field(default_factory=list)
    branches: Counter[str] = field(default_factory=Counter)


class NodeTable(NamedTuple):
    """A tree cut where it branches, for `PrefixTree.from_nodes`: its nodes, and where the sequences asked for end.

    predict says from which of a node's tokens on they were sampled: 0, or the node's length where they were read.
    """

    tokens: list[list[int]]
    parent: list[int]
    predict: list[int]
    leaves: list[int]


@dataclass
class _Row:
    """A row of the running batch: sequences that share all tokens so far; all but the last token are in the cache."""

    nodes: list[int]
    cached: int
    last: int


class Sampler:
    """Samples from a Hugging Face causal LM, token by token, from prompts and from any prefix of what was sampled.

    Sequences end with `eos_id` or after `max_new_tokens` of their own, unless a branch has another limit. temperature,
    top_k and top_p are those of `sample`. The weights must not change while a sampler is used. Sequences are named by
    their index in `nodes`.
    Raises ValueError for settings out of range and for models with layers that no branch can follow.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_new_tokens: int,
        eos_id: int,
        pad_id: int,
        seed: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        _check_positive("max_new_tokens", max_new_tokens)
        for name, got, fits, expected in (
            ("temperature", temperature, isinstance(temperature, int | float) and temperature > 0, "a positive number"),
            ("top_k", top_k, is_int(top_k) and top_k >= 0, "an int of at least 0"),
            ("top_p", top_p, isinstance(top_p, int | float) and 0 < top_p <= 1, "a number above 0 and at most 1"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {got!r}")
        kinds = sorted(set(getattr(decoder(unwrap(model)).config, "layer_types", None) or ()) - EXACT_LAYERS)
        if kinds:
            raise ValueError(f"model: expected layers that attend to all keys or a window, got {', '.join(kinds)}")
        self.model, self.seed, self.max_new_tokens = model, seed, max_new_tokens
        self.eos_id, self.pad_id = eos_id, pad_id
        self.shape = (temperature, top_k, top_p)
        self.max_depth = max_depth(unwrap(model))
        embedding = unwrap(model).get_input_embeddings().weight
        self.vocabulary, self.device = embedding.shape[0], embedding.device
        self.nodes: list[Node] = []
        self._started = 0
        self._rows: list[_Row] = []
        self._joining: list[_Row] = []
        self._cache = _empty_cache()

    def path(self, node: int) -> list[int]:
        """All tokens of a sequence, its prompt's included. Raises ValueError for what is no node."""
        self._check_node("node", node)
        parts: list[list[int]] = []
        end = None
        while node >= 0:
            it = self.nodes[node]
            parts.append(it.tokens if end is None else it.tokens[: end - it.at])
            node, end = it.parent, it.at
        return [token for part in reversed(parts) for token in part]

    @torch.no_grad()
    def start(self, prompts: Sequence[Tokens]) -> list[int]:
        """Passes prompts through the model, what they have in common once, and returns a node for each.

        Raises ValueError for empty prompts, those too long as in `branch`, ids that the model has no embedding for, and
        models that keep no key per token.
        """
        count(prompts, "prompts")
        ids = [self._ids(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        for i, prompt in enumerate(ids):
            check_depth(f"prompts[{i}]", len(prompt), 0, self.max_depth)
        heads = [prompt[:-1] for prompt in ids if len(prompt) > 1]
        rows: list[KeysValues] = []
        if heads:
            _, cache, mask, _ = prefill(self.model, heads, self.pad_id, self.device, keep_all=True)
            if cache.get_seq_length() != mask.shape[1] or any(layer.keys.ndim != 4 for layer in cache.layers):
                raise ValueError(f"model: {type(unwrap(self.model)).__name__} does not keep one key per token")
            for r, real in enumerate(mask.bool()):
                rows.append([(layer.keys[r][:, real], layer.values[r][:, real]) for layer in cache.layers])
        parent, at = -1, shared_length(ids)
        if at:
            parent = self._add(Node(-1, 0, f"{self._started}-", tokens=ids[0][:at], kv=_cut(rows[0], 0, at)))
        first = len(self.nodes)
        held = iter(rows)
        for prompt in ids:
            kv = _cut(next(held), max(at - 1, 0), len(prompt) - 1) if len(prompt) > 1 else []
            self._add(Node(parent, at, str(self._started), tokens=prompt[at:], kv=kv))
            self._started += 1
        return list(range(first, len(self.nodes)))

    @torch.no_grad()
    def extend(self, node: int, tokens: Tokens, at: int | None = None) -> int:
        """A node for `tokens` that are read after the first `at` tokens of a sequence (None: all), and not sampled.

        A tool's answer, a forced beginning, the question of a probe: `branch` goes on from it as from a prompt. Also a
        sampled end token may be the last of the prefix. Raises ValueError as `branch` and for bad tokens.
        """
        asked, owner, at, path = self._place(node, at)
        own = self._ids(tokens, "tokens")
        check_depth("tokens", at + len(own), 0, self.max_depth)
        cache = _empty_cache()
        for index, (keys, values) in enumerate(self._prefix(owner, at - 1)):
            cache.update(keys[None], values[None], index)
        self.model(
            torch.tensor([[path[at - 1], *own[:-1]]], device=self.device),
            position_ids=torch.arange(at - 1, at - 1 + len(own), device=self.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        kv = _cut([(layer.keys[0], layer.values[0]) for layer in cache.layers], at - 1, at - 1 + len(own))
        return self._add(Node(owner, at, self._name(asked, f"{at}+"), tokens=own, kv=kv))

    @torch.no_grad()
    def branch(
        self, node: int, n: int = 1, at: int | None = None, max_new_tokens: int | None = None
    ) -> list[int]:
        """n new sequences that go on after the first `at` tokens of a sequence, its prompt's included (None: all).

        The sequence may be a prompt, run or have ended. max_new_tokens: of each new sequence; None: the sampler's.
        Raises ValueError for what is not one of its prefixes, for a sampled end token as the last of them, and where
        the new sequences could get longer than rotary frequencies allow that depend on the longest sequence.
        """
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        _check_positive("n", n)
        _check_positive("max_new_tokens", limit)
        asked, owner, at, path = self._place(node, at)
        check_depth("at", at, limit, self.max_depth)
        if path[at - 1] == self.eos_id and self.nodes[owner].limit:
            raise ValueError(f"at: expected a prefix that goes on; the last of the {at} tokens is the end token")
        new = []
        for _ in range(n):
            name = self._name(asked, f"{at}.")
            uniform = torch.rand(limit, generator=generator(self.seed, "branch", name)).tolist()
            new.append(self._add(Node(owner, at, name, limit, uniform, running=True)))
        self._wait(owner, at, path[at - 1], new)
        return new

    @torch.no_grad()
    def step(self) -> list[int]:
        """One token for every sequence that runs; returns those that ended with it."""
        self._join()
        if not self._rows:
            return []
        logits = self._forward()
        places = [(node, r) for r, row in enumerate(self._rows) for node in row.nodes]
        uniform = [self.nodes[node].uniform[len(self.nodes[node].tokens)] for node, _ in places]
        if len(places) > len(self._rows):
            logits = logits[torch.tensor([r for _, r in places], device=self.device)]
        drawn = draw(logits, torch.tensor(uniform, device=self.device), *self.shape)
        rows, keep, ended = [], [], []
        for (node, r), token, behaviour_logp, model_logp in zip(places, *(x.tolist() for x in drawn), strict=True):
            it = self.nodes[node]
            it.tokens.append(token)
            it.behaviour_logp.append(behaviour_logp)
            it.model_logp.append(model_logp)
            if token == self.eos_id or len(it.tokens) == it.limit:
                ended.append(node)
                it.kv, it.running = [(k.clone(), v.clone()) for k, v in self._own(node, r)], False
            else:
                rows.append(_Row([node], self._rows[r].cached, token))
                keep.append(r)
        self._keep(rows, keep)
        return ended

    def run(self) -> list[int]:
        """Steps until nothing runs; returns what ended, in order."""
        ended = []
        while self._rows or self._joining:
            ended += self.step()
        return ended

    def table(self, sequences: list[int] | None = None) -> NodeTable:
        """The tree as it is, with a leaf for each of `sequences` (None: all but prompts), in their order.

        Raises ValueError for what is no node.
        """
        if sequences is None:
            sequences = [i for i, node in enumerate(self.nodes) if node.limit]
        count(sequences, "sequences")
        for s, asked in enumerate(sequences):
            self._check_node(f"sequences[{s}]", asked)
        cuts: list[set[int]] = [{node.at + len(node.tokens)} for node in self.nodes]
        for node in self.nodes:
            if node.parent >= 0:
                cuts[node.parent].add(node.at)
        tokens: list[list[int]] = []
        parent: list[int] = []
        predict: list[int] = []
        place: dict[tuple[int, int], int] = {}
        for i, node in enumerate(self.nodes):
            begin, above = node.at, place.get((node.parent, node.at), -1)
            for end in sorted(cuts[i]):
                tokens.append(node.tokens[begin - node.at : end - node.at])
                parent.append(above)
                predict.append(0 if node.limit else end - begin)
                above = place[i, end] = len(tokens) - 1
                begin = end
        return NodeTable(tokens, parent, predict, [place[i, max(cuts[i])] for i in sequences])

    def _add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _check_node(self, name: str, node: int) -> None:
        if not is_int(node) or not 0 <= node < len(self.nodes):
            raise ValueError(f"{name}: expected one of {len(self.nodes)} nodes, got {node!r}")

    def _ids(self, tokens: Tokens, name: str) -> list[int]:
        ids: list[int] = token_ids(tokens, name).tolist()
        if not ids:
            raise ValueError(f"{name}: expected at least one token, got none")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise ValueError(f"{name}: expected ids below {self.vocabulary}, got {min(ids)} to {max(ids)}")
        return ids

    def _place(self, node: int, at: int | None) -> tuple[Node, int, int, list[int]]:
        """The sequence asked for, the one that the last of its first `at` tokens belongs to, `at`, and its path."""
        path, asked = self.path(node), self.nodes[node]
        at = len(path) if at is None else at
        if not is_int(at) or not 1 <= at <= len(path):
            raise ValueError(f"at: expected 1 to {len(path)}, the tokens of node {node}, got {at!r}")
        while at <= self.nodes[node].at:
            node = self.nodes[node].parent
        return asked, node, at, path

    def _name(self, asked: Node, place: str) -> str:
        asked.branches[place] += 1
        return f"{asked.name}/{place}{asked.branches[place] - 1}"

    def _wait(self, node: int, at: int, last: int, new: list[int]) -> None:
        """Puts new sequences where their prefix is about to pass through the model, or makes a row for them."""
        for row in self._joining:
            first = self.nodes[row.nodes[0]]
            if (first.parent, first.at) == (node, at):
                row.nodes += new
                return
        for row in self._rows:
            if node in row.nodes and row.cached == at - 1:
                row.nodes += new
                return
        self._joining.append(_Row(list(new), at - 1, last))

    def _own(self, node: int, row: int | None = None) -> KeysValues:
        """Keys and values of a node from one token before its own on: views of the batch while it runs."""
        it = self.nodes[node]
        if not it.running:
            return it.kv
        if row is None:
            row = next(r for r, waiting in enumerate(self._rows) if node in waiting.nodes)
        begin = max(it.at - 1, 0) - self._rows[row].cached + self._width()
        return [(layer.keys[row, :, begin:], layer.values[row, :, begin:]) for layer in self._cache.layers]

    def _prefix(self, node: int, end: int) -> KeysValues:
        """Keys and values [heads, end, head size] of the first tokens of a sequence, gathered along its path."""
        pieces: list[KeysValues] = []
        while end > 0:
            begin = max(self.nodes[node].at - 1, 0)
            if begin < end:
                pieces.insert(0, _cut(self._own(node), 0, end - begin, copy=False))
                end = begin
            node = self.nodes[node].parent
        return [tuple(torch.cat(parts, 1) for parts in zip(*layer)) for layer in zip(*pieces)]  # type: ignore[misc]

    def _join(self) -> None:
        """Rows that wait become rows of the batch: all are padded on the left to the longest."""
        if not self._joining:
            return
        before, width = self._width(), max(row.cached for row in (*self._rows, *self._joining))
        prefixes = [self._prefix(self.nodes[row.nodes[0]].parent, row.cached) for row in self._joining]
        known = next((kv for kv in prefixes if kv), [(x.keys[0], x.values[0]) for x in self._cache.layers])
        cache = _empty_cache()
        for index, sample in enumerate(known if width else []):
            whole = []
            for side, like in enumerate(sample):
                new = like.new_zeros(len(self._rows) + len(prefixes), like.shape[0], width, like.shape[2])
                if self._rows:
                    layer = self._cache.layers[index]
                    new[: len(self._rows), :, width - before :] = (layer.keys, layer.values)[side]
                for r, kv in enumerate(prefixes, len(self._rows)):
                    if kv:
                        new[r, :, width - kv[index][side].shape[1] :] = kv[index][side]
                whole.append(new)
            cache.update(*whole, index)
        self._rows += self._joining
        self._joining, self._cache = [], cache

    def _forward(self) -> Tensor:
        """Passes the last token of every row through the model, which caches it: logits [rows, V]."""
        width = self._width() + 1
        for row in self._rows:
            row.cached += 1
        cached = torch.tensor([row.cached for row in self._rows], device=self.device)[:, None]
        return self.model(
            torch.tensor([[row.last] for row in self._rows], device=self.device),
            attention_mask=(torch.arange(width, device=self.device) >= width - cached).long(),
            position_ids=cached - 1,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]

    def _keep(self, rows: list[_Row], keep: list[int]) -> None:
        """The batch of these rows alone; columns that none of them needs are left out."""
        if keep != list(range(len(self._rows))):
            self._cache.batch_select_indices(torch.tensor(keep, dtype=torch.long, device=self.device))
        spare = self._width() - max((row.cached for row in rows), default=0)
        for layer in self._cache.layers if spare else []:
            layer.keys, layer.values = layer.keys[:, :, spare:], layer.values[:, :, spare:]
        self._rows = rows
        if not rows:
            self._cache = _empty_cache()

    def _width(self) -> int:
        return self._cache.get_seq_length() if self._cache.layers else 0


def _cut(kv: KeysValues, begin: int, end: int, copy: bool = True) -> KeysValues:
    """Tokens begin:end; a copy does not keep the whole alive."""
    parts = [(k[:, begin:end], v[:, begin:end]) for k, v in kv]
    return [(k.clone(), v.clone()) for k, v in parts] if copy else parts


def _check_positive(name: str, got: int) -> None:
    if not is_int(got) or got < 1:
        raise ValueError(f"{name}: expected a positive int, got {got!r}")


def _empty_cache() -> Any:
    """A cache that keeps all keys of all layers: it is not told of the model's windows."""
    from transformers import DynamicCache

    return DynamicCache()
