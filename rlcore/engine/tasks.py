"""Problems with a verifier: reasoning-gym tasks, split into training and held-out questions.

reasoning-gym seeds item i of a data set with seed + i, so two data sets with different seeds are almost the same one,
shifted: a split by seed leaks. Here one pool of distinct questions is generated, and the hash of a question's text
alone decides on which side it lies. The warm start and the reinforcement learning see training questions only.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import re
from dataclasses import dataclass
from typing import Any

from rlcore.engine.config import TaskConfig
from rlcore.engine.errors import UserError
from rlcore.engine.seeding import permutation


@dataclass(frozen=True)
class Problem:
    """One question: the prompt that the model sees, the reference answer and the verifier's own record."""

    prompt: str
    answer: str
    entry: dict[str, Any]


def is_held_out(question: str, fraction: float) -> bool:
    """Whether a question belongs to the held-out side: sha256(question) / 2^256 < fraction."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


# What a small model can learn within minutes; a config's own options come on top.
PRESETS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
}
# The sentence around chain_sum's expression never changes; without it the small model learns about twice as fast.
TEMPLATES = {"chain_sum": "{expression} ="}
NAME = re.compile(r"\{(\w+)\}")


class Task:
    """A reasoning-gym task: `train` and `held_out` problems without a common question, and `score`, its verifier."""

    def __init__(self, config: TaskConfig) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if config.name not in DATASETS:
            near = difflib.get_close_matches(config.name, DATASETS, n=3)
            raise UserError(f"task.name: reasoning-gym has no task {config.name!r}" + hint(near))
        options = PRESETS.get(config.name, {}) | {key: literal(value) for key, value in config.options.items()}
        try:
            self.dataset = reasoning_gym.create_dataset(config.name, size=config.pool, seed=config.seed, **options)
        except (TypeError, AssertionError, ValueError) as error:
            raise UserError(f"task.options do not fit the task {config.name!r}: {error}") from None
        self.name, self.partial_credit = config.name, config.partial_credit
        template = config.template or TEMPLATES.get(config.name, "{question}\n")
        known = {"question", *self.dataset[0]["metadata"]}
        if not known & set(NAME.findall(template)):
            there = ", ".join(f"{{{name}}}" for name in sorted(known))
            raise UserError(f"task.template: {template!r} shows nothing of a problem; there are {there}")
        self.train: list[Problem] = []
        self.held_out: list[Problem] = []
        seen: set[str] = set()
        for entry in self.dataset:
            question = entry["question"]
            if question in seen:
                continue
            seen.add(question)
            problem = Problem(render(template, entry), entry["answer"], entry)
            if not is_held_out(question, config.held_out_fraction):
                self.train.append(problem)
            elif len(self.held_out) < config.held_out:
                self.held_out.append(problem)
        if not self.train or not self.held_out:
            raise UserError(
                f"task {config.name!r}: {len(seen)} distinct questions are too few to split into training and "
                "held-out; raise task.pool or task.held_out_fraction"
            )

    def score(self, problem: Problem, response: str) -> float:
        """The verifier's reward for a response, 1.0 where it is right."""
        score = float(self.dataset.score_answer(response.strip(), problem.entry))
        return score if self.partial_credit else float(score >= 1.0)

    def prompts(self, step: int, count: int, seed: int) -> list[Problem]:
        """The `count` training problems of a step: every epoch is a fresh permutation of all of them."""
        first = step * count
        epochs: dict[int, list[int]] = {}
        chosen = []
        for i in range(first, first + count):
            epoch, place = divmod(i, len(self.train))
            if epoch not in epochs:
                epochs[epoch] = permutation(len(self.train), seed, "prompts", epoch)
            chosen.append(self.train[epochs[epoch][place]])
        return chosen


def render(template: str, entry: dict[str, Any]) -> str:
    """The prompt of an entry: {question}, and {name} for every name in its metadata; other braces stay as they are."""
    values = {**entry["metadata"], "question": entry["question"]}
    return NAME.sub(lambda match: str(values.get(match[1], match[0])), template)


def literal(text: str) -> Any:
    """An option as the Python value that it spells (2, 0.5, True, (1, 2)), or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def hint(near: list[str]) -> str:
    """The end of an error message about an unknown name."""
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
