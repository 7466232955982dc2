"""What answers are worth: named channels with weights, and what happens where one of them fails.

A channel scores answers one by one, or all of a step at once where it is a user's function that takes lists. A score
that raises, takes too long or is no finite number is a failure: the run stops with the sample named, or the score is 0,
counted and told.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlcore.engine.config import RewardConfig
from rlcore.engine.errors import UserError, told
from rlcore.engine.problem import Problem, excerpt
from rlcore.engine.reward_kinds import Channel, make
from rlcore.engine.time_limit import TimeUp, time_limit

# The channel where none is configured.
DEFAULT = {"correct": "verifier"}


@dataclass(frozen=True)
class Scores:
    """What S answers are worth: total = sum over channels of weight * score."""

    total: Tensor  # [S] float32
    channels: dict[str, Tensor]  # [S] float32 each
    correct: Tensor  # [S] bool
    failures: list[str]  # a sentence for every score that failed


class Rewards:
    """The channels of a config; `verify` is the task's own verifier."""

    def __init__(self, config: RewardConfig, verify: Callable[[Problem, str], float]) -> None:
        self.config = config
        kinds = config.channels or DEFAULT
        self.channels = {name: make(name, kind, config, verify) for name, kind in kinds.items()}
        self.correct = config.correct or next(iter(kinds))

    def __call__(self, problems: list[Problem], texts: list[str], step: int | None = None) -> Scores:
        """The scores of answers, `texts` [S], to `problems` [S]."""
        failures: list[str] = []
        scores = {}
        for name, channel in self.channels.items():
            answers = Answers(name, problems, texts, step, self.config, failures)
            with one_process():
                values = answers.one_by_one(channel) if channel.one else answers.at_once(channel)
            scores[name] = torch.tensor(values, dtype=torch.float32)
        total = torch.zeros(len(texts))
        for name, score in scores.items():
            total = total + self.config.weights.get(name, 1.0) * score
        return Scores(total, scores, scores[self.correct] >= 1, failures)


@contextmanager
def one_process() -> Iterator[None]:
    """Ends what a reward function has forked and let come back: two processes would go on with one run."""
    own = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != own:
            os._exit(1)


@dataclass(frozen=True)
class Answers:
    """The answers of a step before one channel, and what becomes of failures."""

    channel: str
    problems: Sequence[Problem]  # S
    texts: Sequence[str]  # S
    step: int | None
    config: RewardConfig
    failures: list[str]

    def one_by_one(self, channel: Channel) -> list[float]:
        """The score of every answer, 0 where it fails. When the time is over, the rest fails with the one at hand."""
        scores, at = [0.0] * len(self.texts), 0
        try:
            with time_limit(self.config.seconds if channel.limited else math.inf):
                for at in range(len(self.texts)):
                    try:
                        scores[at] = self.ask(channel, at)
                    except (Exception, SystemExit) as error:  # whatever a reward function may raise
                        self.fail(at, told(error))
        except TimeUp:
            self.fail(at, f"not done after {self.config.seconds:g} s (reward.seconds)")
            for rest in range(at + 1, len(self.texts)):
                self.fail(rest, "no time was left for it")
        return scores

    def ask(self, channel: Channel, at: int) -> float:
        """The score of one answer."""
        problem, text = self.problems[at], self.texts[at]
        if channel.one:
            return finite(channel.one(problem, text))
        assert channel.batch is not None
        return finite(listed(channel.batch([problem], [text]), 1)[0])

    def at_once(self, channel: Channel) -> list[float]:
        """The scores of all answers in one call. Where it raises, it is called again for one answer at a time: to find
        the answer, and to keep the scores of the others."""
        assert channel.batch is not None
        try:
            with time_limit(self.config.seconds if channel.limited else math.inf):
                values = listed(channel.batch(self.problems, self.texts), len(self.texts))
        except TimeUp:
            for at in range(len(self.texts)):
                self.fail(
                    at, f"not done with {len(self.texts)} answers after {self.config.seconds:g} s (reward.seconds)"
                )
            return [0.0] * len(self.texts)
        except WrongLength as error:
            for at in range(len(self.texts)):
                self.fail(at, str(error))
            return [0.0] * len(self.texts)
        except (Exception, SystemExit):  # whatever a reward function may raise
            return self.one_by_one(channel)
        scores = [0.0] * len(self.texts)
        for at, value in enumerate(values):
            try:
                scores[at] = finite(value)
            except ValueError as error:
                self.fail(at, told(error))
        return scores

    def fail(self, at: int, reason: str) -> None:
        """Notes a failure, or raises UserError where the config says so."""
        when = "" if self.step is None else f" in step {self.step}"
        sample = f"prompt {excerpt(self.problems[at].prompt)}, response {excerpt(self.texts[at])}"
        message = f"reward.channels.{self.channel} failed{when}: {reason}; {sample}"
        if self.config.on_error == "stop":
            raise UserError(f"{message} (reward.on_error can be zero)")
        self.failures.append(message)


class WrongLength(Exception):
    """A function gave more or fewer scores than there were answers."""


def listed(values: Any, count: int) -> list[Any]:
    """A function's scores as a list of `count`."""
    if isinstance(values, (str, bytes, dict, set, frozenset)):
        # Each has a length, and characters, keys or an order that are no scores.
        raise WrongLength(f"expected a list of {count} scores, got {excerpt(values)}")
    try:
        scores = list(values)
    except TypeError:
        raise WrongLength(f"expected a list of {count} scores, got {excerpt(values)}") from None
    if len(scores) != count:
        raise WrongLength(f"expected {count} scores, got {len(scores)}")
    return scores


def finite(value: Any) -> float:
    """A score as a float; ValueError where it is none, or stands in its place. A text is none, also where it spells a
    number."""
    if isinstance(value, ValueError):
        raise value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        score = float(value)
    except Exception:  # a value of any type may raise anything: an integer beyond all floats, a tensor of two elements
        raise ValueError(f"expected a number, got {excerpt(value)}") from None
    if not math.isfinite(score):
        raise ValueError(f"expected a finite number, got {score}")
    return score
