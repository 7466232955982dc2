"""samples.jsonl: some answers of every step, token by token.

A line has step, prompt, answer, reference, reward, and lists with one entry per token of the answer: tokens (its pieces
of text), logp and entropy (nats, under the policy before the step's update), advantage. Lines of earlier versions have
one number as advantage and no lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from rlcore.engine.rollout import Rollout


class Seen(NamedTuple):
    """How a step saw the N tokens of its rollout: log-prob and entropy (nats) before the update, and advantage."""

    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    advantage: Tensor  # [N]


def lines(step: int, rollout: Rollout, seen: Seen, tokenizer: Any, count: int) -> Iterator[str]:
    """The first `count` answers of a step as lines of samples.jsonl."""
    assert rollout.batch.offsets is not None
    each = len(rollout.texts) // len(rollout.problems)
    offsets = rollout.batch.offsets[: count + 1].tolist()
    answers = chain.from_iterable(rollout.responses)
    for s, (ids, start, stop) in enumerate(zip(answers, offsets, offsets[1:])):
        problem, reward = rollout.problems[s // each], float(rollout.reward[s])
        record = {"step": step, "prompt": problem.prompt, "answer": rollout.texts[s], "reference": problem.answer}
        record |= {"reward": reward if math.isfinite(reward) else None, "tokens": pieces(tokenizer, ids)}
        record |= {name: numbers(x[start:stop]) for name, x in seen._asdict().items()}
        yield json.dumps(record, ensure_ascii=False) + "\n"


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token, special tokens by name.

    What a token adds to the one before it, since some tokenizers drop the space in front of a token that stands alone.
    A character made of several tokens shows as replacement characters.
    """
    alone = [text(tokenizer, token) for token in ids]
    pairs = [text(tokenizer, *pair) for pair in zip(ids, ids[1:])]
    rest = [pair.removeprefix(a) if pair.startswith(a) else b for a, b, pair in zip(alone, alone[1:], pairs)]
    return alone[:1] + rest


@lru_cache(maxsize=2**16)
def text(tokenizer: Any, *ids: int) -> str:
    """What some tokens read as. Kept, since decoding a few tokens takes as long as writing them."""
    return tokenizer.decode(ids)


def numbers(x: Tensor) -> list[Any]:
    """Values for JSON with four decimals, None for what is not finite."""
    return [round(value, 4) if math.isfinite(value) else None for value in x.tolist()]
