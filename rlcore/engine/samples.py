"""samples.jsonl: some answers of every step, token by token.

A line has step, prompt, answer, reference, reward, and lists with one entry per token of the answer: tokens (its pieces
of text), logp and entropy (nats, under the policy before the step's update), advantage. Lines of earlier versions have
one number as advantage and no lists.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlcore.engine.policy import Policy
from rlcore.engine.rollout import Rollout


@dataclass(frozen=True)
class Seen:
    """How the policy saw an answer when it gave it: per token its text, log-prob and entropy (nats)."""

    tokens: list[str]
    logp: list[float]
    entropy: list[float]


def look(policy: Policy, tokenizer: Any, rollout: Rollout, count: int) -> list[Seen]:
    """The first `count` answers of a rollout as the policy sees them now: to be called before its update."""
    seen: list[Seen] = []
    for prompt, group in zip(rollout.prompts, rollout.responses):
        answers = group[: count - len(seen)]
        if not answers:
            break
        scores = policy.scores([prompt], [answers])
        assert scores.entropy is not None
        lengths = [len(ids) for ids in answers]
        for ids, logp, entropy in zip(answers, scores.logp.split(lengths), scores.entropy.split(lengths)):
            seen.append(Seen(pieces(tokenizer, ids), numbers(logp), numbers(entropy)))
    return seen


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token, special tokens by name.

    What a token adds to the one before it, since some tokenizers drop the space in front of a token that stands alone.
    A character made of several tokens shows as replacement characters.
    """
    alone = tokenizer.batch_decode([[token] for token in ids])
    pairs = tokenizer.batch_decode([list(pair) for pair in zip(ids, ids[1:])])
    rest = [pair.removeprefix(a) if pair.startswith(a) else b for a, b, pair in zip(alone, alone[1:], pairs)]
    return alone[:1] + rest


def line(step: int, rollout: Rollout, s: int, advantage: Tensor, seen: Seen) -> str:
    """Answer s of a step as a line of samples.jsonl; advantage [N] is that of the whole rollout."""
    assert rollout.batch.offsets is not None
    problem = rollout.problems[s // (len(rollout.texts) // len(rollout.problems))]
    start, stop = rollout.batch.offsets[s : s + 2].tolist()
    reward = float(rollout.reward[s])
    record = {"step": step, "prompt": problem.prompt, "answer": rollout.texts[s], "reference": problem.answer}
    record |= {"reward": reward if math.isfinite(reward) else None, "tokens": seen.tokens, "logp": seen.logp}
    record |= {"entropy": seen.entropy, "advantage": numbers(advantage[start:stop])}
    return json.dumps(record, ensure_ascii=False) + "\n"


def numbers(x: Tensor) -> list[Any]:
    """Values for JSON with four decimals, None for what is not finite."""
    return [round(value, 4) if math.isfinite(value) else None for value in x.tolist()]
