"""What goes through the models at a time: the minibatches of a pass, and the packs that they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import rlcore as rl
from rlcore.engine.config import UpdateConfig
from rlcore.engine.rollout import Rollout


@dataclass(frozen=True, eq=False)
class Pack:
    """Some answers to each of some prompts, as token ids. All that is computed on it, by any model, shares one tree."""

    prompts: list[list[int]]
    responses: list[list[list[int]]]
    device: torch.device

    @property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer of every sequence."""
        return [(p, answer) for p, answers in zip(self.prompts, self.responses, strict=True) for answer in answers]

    @cached_property
    def tree(self) -> rl.PrefixTree:
        """A trie of prompts and answers whose predictions are the answers' tokens alone.

        Beyond one copy of each prompt it shares what prompts have in common (an instruction) and what answers begin
        with.
        """
        return rl.PrefixTree.from_paths(
            [prompt + answer for prompt, answer in self.pairs],
            predict=[len(prompt) for prompt, _ in self.pairs],
            group=[g for g, answers in enumerate(self.responses) for _ in answers],
            device=self.device,
        )


class Minibatch(NamedTuple):
    """What one optimizer step learns from: sequences [K] of the rollout, in packs that each hold some of the K."""

    sequences: Tensor
    packs: list[tuple[list[int], Pack]]


def minibatch_of(
    rollout: Rollout, groups: list[int], config: UpdateConfig, layout: str, whole_groups: bool
) -> Minibatch:
    """The answers to the given prompts, in packs of at most `micro_tokens`.

    A tree holds a prompt once, padded rows repeat it before every answer. A tree that does not share, because that
    would save less than 5 %, holds so much more.
    """
    device = rollout.batch.device
    prompts, responses = [rollout.prompts[g] for g in groups], [rollout.responses[g] for g in groups]
    once = [len(prompt) if layout == "tree" else 0 for prompt in prompts]
    each = [
        [len(answer) + len(prompt) - shared for answer in answers]
        for prompt, answers, shared in zip(prompts, responses, once, strict=True)
    ]
    G = len(responses[0])
    packs = []
    for sequences in rl.pack_groups(once, each, config.micro_tokens, whole_groups):
        chosen: dict[int, list[list[int]]] = {}
        for s in sequences:
            chosen.setdefault(s // G, []).append(responses[s // G][s % G])
        packs.append((sequences, Pack([prompts[i] for i in chosen], list(chosen.values()), device)))
    return Minibatch(torch.tensor([g * G + i for g in groups for i in range(G)], device=device), packs)
