"""Problems with a verifier, split into training and held-out questions: reasoning-gym tasks, files, mixtures of them.

reasoning-gym seeds item i of a data set with seed + i, so two data sets with different seeds are almost the same one,
shifted: a split by seed leaks. Here one pool of distinct questions is generated, and the hash of a question's text
alone decides on which side it lies. The warm start and the reinforcement learning see training questions only.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlcore.engine import countdown
from rlcore.engine.config import RewardConfig, TaskConfig
from rlcore.engine.data import Rows
from rlcore.engine.errors import UserError
from rlcore.engine.problem import NAME, Problem, is_held_out, render
from rlcore.engine.prompts import Chain, View, bytes_of, chat_renderer, cutter, token_counts, unchanged
from rlcore.engine.reward_kinds import same_text
from rlcore.engine.rewards import Rewards, Scores
from rlcore.engine.screen import watched
from rlcore.engine.seeding import generator

# What a small model can learn within minutes; a config's own options come on top.
PRESETS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "countdown": {
        "min_numbers": 3, "max_numbers": 3, "min_value": 1, "max_value": 25, "min_target": 1, "max_target": 99,
        "operators": ("+", "-", "*"),
    },
}  # fmt: skip
# The sentences around these never change what is asked; without them the small model learns about twice as fast.
TEMPLATES = {"chain_sum": "{expression} =", "countdown": "{numbers} -> {target}:"}
# Keys of the configuration that go with a task where it is practised alone. The warm start of countdown ends with its
# steps: a problem has several right answers, and the probability of the reference answer alone stays low.
DEFAULTS: dict[str, dict[str, Any]] = {
    "countdown": {
        "task.pool": 40000, "model.layers": 3, "model.warm_steps": 400, "model.warm_accuracy": 0.25,
        "rollout.max_new_tokens": 12,
    }
}  # fmt: skip
DATA = "data"
# The order in which a mixture's tasks follow one another is made in blocks of this many prompts.
BLOCK = 1000


@dataclass
class Part:
    """The problems of one task or of the files, and their verifier.

    sizes [R]: bytes of the training prompts; digest: a hash of what is in the files.
    """

    name: str
    train: Sequence[Problem]
    held_out: list[Problem]
    verify: Callable[[Problem, str], float]
    sizes: np.ndarray
    notes: list[str] = field(default_factory=list)
    digest: str = ""


class Task:
    """What is practised: `train` and `held_out` problems without a common question, and how answers are scored.

    `notes` tells, in a sentence each, what was left out or cut.
    """

    def __init__(self, config: TaskConfig, reward: RewardConfig | None = None) -> None:
        self.config, self.name = config, label(config)
        weights = config.mixture or {DATA if config.data else config.name: 1.0}
        self.parts = {name: file_part(config) if name == DATA else gym_part(name, config) for name in weights}
        self.notes = [note for part in self.parts.values() for note in part.notes]
        # At least one prompt of every task in a block; the likeliest takes what rounding leaves.
        share = np.array(list(weights.values()))
        self.in_block = np.maximum(1, np.floor(BLOCK * share / share.sum())).astype(int)
        self.in_block[self.in_block.argmax()] += BLOCK - self.in_block.sum()
        self.rewards = Rewards(reward or RewardConfig(), self.score)
        self.orders: dict[tuple[object, ...], torch.Tensor] = {}
        self.fitted = False
        self.collect()

    def collect(self) -> None:
        """Puts `train` and `held_out` together from the parts."""
        parts = list(self.parts.values())
        wanted = np.ceil(self.config.held_out * self.in_block / BLOCK).astype(int)
        self.train: Sequence[Problem] = parts[0].train if len(parts) == 1 else Chain([part.train for part in parts])
        self.held_out = [problem for part, count in zip(parts, wanted) for problem in part.held_out[:count]]

    @property
    def digest(self) -> str:
        """What the config does not say about the problems: a hash of what is in the files."""
        return "".join(part.digest for part in self.parts.values())

    def score(self, problem: Problem, response: str) -> float:
        """The verifier's reward for a response, 1.0 where it is right."""
        score = float(self.parts[problem.task].verify(problem, response))
        return score if self.config.partial_credit else float(score >= 1.0)

    def scores(self, problems: list[Problem], texts: list[str], step: int | None = None) -> Scores:
        """The rewards of answers, `texts` [S], to `problems` [S]; `step` is named where a reward fails."""
        return self.rewards(problems, texts, step)

    def prompts(self, step: int, count: int, seed: int) -> list[Problem]:
        """The `count` training problems of a step: every epoch is a fresh permutation of all of them.

        In a mixture every block of 1000 prompts holds its tasks at their weights, in an order of its own.
        """
        names = list(self.parts)
        chosen = []
        for i in range(step * count, (step + 1) * count):
            number, place = self.place(i, seed)
            train = self.parts[names[number]].train
            epoch, at = divmod(place, len(train))
            purpose = ("prompts", epoch) if len(names) == 1 else ("prompts", names[number], epoch)
            chosen.append(train[int(self.order(len(train), seed, *purpose)[at])])
        return chosen

    def place(self, i: int, seed: int) -> tuple[int, int]:
        """Which part prompt i of a run belongs to, and how many of that part came before it."""
        if len(self.parts) == 1:
            return 0, i
        block, at = divmod(i, BLOCK)
        dealt = torch.repeat_interleave(torch.from_numpy(self.in_block))[self.order(BLOCK, seed, "mixture", block)]
        number = int(dealt[at])
        return number, block * int(self.in_block[number]) + int((dealt[:at] == number).sum())

    def order(self, size: int, *name: object) -> torch.Tensor:
        """The permutation of a name; the latest few are kept, for they are as long as the data."""
        if name not in self.orders:
            if len(self.orders) > 4 * len(self.parts):
                self.orders.clear()
            self.orders[name] = torch.randperm(size, generator=generator(*name))
        return self.orders[name]

    def fit(self, tokenizer: Any, context: int | None, answer_length: int) -> None:
        """Makes the prompts those of a model: renders them by its chat template where configured, and deals with those
        that leave no room in its context for an answer of `answer_length` tokens as task.too_long says.

        Once per task; raises UserError.
        """
        if self.fitted:
            return
        finish = chat_renderer(tokenizer, self.config) if self.config.chat else unchanged
        for part in self.parts.values():
            if context is not None:
                self.make_fit(part, finish, tokenizer, context, answer_length)
            elif self.config.chat:
                part.train, part.held_out = View(part.train, finish), list(map(finish, part.held_out))
        self.fitted = True
        self.collect()

    def make_fit(
        self, part: Part, finish: Callable[[Problem], Problem], tokenizer: Any, context: int, answer_length: int
    ) -> None:
        """`fit` for one part."""
        limit, how = context - answer_length, self.config.too_long
        train, held_out = View(part.train, finish), View(part.held_out, finish)
        lengths = (
            token_counts(tokenizer, train, part.sizes + added_bytes(finish), limit),
            token_counts(tokenizer, held_out, bytes_of(held_out), limit),
        )
        longest, number = max(int(n.max()) for n in lengths), sum(int((n > limit).sum()) for n in lengths)
        if number and (how == "error" or limit < 1):
            raise UserError(
                f"the longest prompt has {longest} tokens and an answer up to {answer_length}: "
                f"{longest + answer_length} together, but the model's context is {context}; lower "
                "rollout.max_new_tokens, set task.too_long to skip or cut, or choose another model"
            )
        if number and how == "skip":
            train, held_out = (
                View(problems, finish, np.flatnonzero(n <= limit))
                for problems, n in zip((part.train, part.held_out), lengths)
            )
            if not len(train) or not len(held_out):
                raise UserError(f"task.too_long: no prompts of {part.name!r} are left that have at most {limit} tokens")
        elif number:
            cut = cutter(tokenizer, limit, finish)
            train, held_out = View(part.train, cut), View(part.held_out, cut)
        part.train, part.held_out = train, list(held_out)
        if number:
            done = {"skip": "left out", "cut": "cut at their start"}[how]
            self.notes.append(f"{part.name}: {number} prompts of more than {limit} tokens are {done}")


def gym_part(name: str, config: TaskConfig) -> Part:
    """A pool of distinct questions of a reasoning-gym task, split by the hash of each."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        key = "task.mixture" if config.mixture else "task.name"
        raise UserError(f"{key}: reasoning-gym has no task {name!r}" + hint(difflib.get_close_matches(name, DATASETS)))
    options = PRESETS.get(name, {}) | options_of(name, config)
    try:
        dataset = reasoning_gym.create_dataset(name, size=config.pool, seed=config.seed, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"task.options do not fit the task {name!r}: {error}") from None
    template = ("" if config.mixture else config.template) or TEMPLATES.get(name, "{question}\n")
    known = {"question", *dataset[0]["metadata"]}
    if not known & set(NAME.findall(template)):
        there = ", ".join(f"{{{name}}}" for name in sorted(known))
        raise UserError(f"task.template: {template!r} shows nothing of a problem; there are {there}")
    train: list[Problem] = []
    held_out: list[Problem] = []
    seen: set[str] = set()
    for entry in watched(dataset, f"making problems of {name}"):
        question = countdown.identity(entry) if name == "countdown" else entry["question"]
        if question in seen:
            continue
        seen.add(question)
        problem = Problem(render(template, entry), answer_of(name, entry), entry, name)
        if not is_held_out(question, config.held_out_fraction):
            train.append(problem)
        elif len(held_out) < config.held_out:
            held_out.append(problem)
    if not train or not held_out:
        raise UserError(
            f"task {name!r}: {len(seen)} distinct questions are too few to split into training and held-out; raise "
            "task.pool or task.held_out_fraction"
        )
    verify: Callable[[Problem, str], float]
    if name == "countdown":
        verify = lambda problem, text: float(countdown.is_solution(text, problem.entry))  # noqa: E731
    else:
        verify = lambda problem, text: dataset.score_answer(text.strip(), problem.entry)  # noqa: E731
    return Part(name, train, held_out, verify, bytes_of(train))


def answer_of(name: str, entry: dict[str, Any]) -> str:
    """The reference answer as a text; that of countdown without spaces, which a model would have to learn."""
    answer = "" if entry["answer"] is None else str(entry["answer"])
    return answer.replace(" ", "") if name == "countdown" else answer


def options_of(name: str, config: TaskConfig) -> dict[str, Any]:
    """The configured options of a task; in a mixture those that begin with its name and a dot."""
    if not config.mixture:
        return {key: literal(value) for key, value in config.options.items()}
    for key in config.options:
        if key.partition(".")[0] not in config.mixture:
            raise UserError(f"task.options: in a mixture an option is written TASK.OPTION, got {key!r}")
    mine = {key: value for key, value in config.options.items() if key.startswith(f"{name}.")}
    return {key.partition(".")[2]: literal(value) for key, value in mine.items()}


def file_part(config: TaskConfig) -> Part:
    """The rows of the data files; held out is a share by the hash of the question, or a file of its own."""
    rows = Rows(config, "task.data", config.data)
    notes = [f"task.data: {note}" for note in rows.report]
    if config.held_out_data:
        other = Rows(config, "task.held_out_data", config.held_out_data)
        notes += [f"task.held_out_data: {note}" for note in other.report]
        held_out: Sequence[Problem] = other
        keep = ~np.isin(rows.keys, other.keys)
        if not keep.all():
            notes.append(f"task.data: {(~keep).sum()} rows left out that are held-out problems")
    else:
        keep = rows.keys >= np.uint64(int(config.held_out_fraction * 2**64))
        held_out = View(rows, unchanged, np.flatnonzero(~keep))
    index = np.flatnonzero(keep)
    if not len(index) or not len(held_out):
        raise UserError(
            f"task.data: {len(rows)} distinct problems are too few to split into training and held-out; raise "
            "task.held_out_fraction or name files in task.held_out_data"
        )
    verify = lambda problem, text: same_text(text, problem.answer)  # noqa: E731
    train = View(rows, unchanged, index)
    return Part(
        DATA, train, list(held_out[: config.held_out]), verify, rows.sizes[index].astype(np.int64), notes, rows.digest
    )


def label(config: TaskConfig) -> str:
    """A short name of what is practised, for the name of a run."""
    if config.mixture:
        return "+".join(config.mixture)
    return Path(config.data[0]).stem if config.data else config.name


def added_bytes(finish: Callable[[Problem], Problem]) -> int:
    """How many bytes a chat template puts around a prompt of one."""
    return len(finish(Problem("x", "", {})).prompt.encode()) - 1


def literal(text: str) -> Any:
    """An option as the Python value that it spells (2, 0.5, True, (1, 2)), or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def hint(near: list[str]) -> str:
    """The end of an error message about an unknown name."""
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
