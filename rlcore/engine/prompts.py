"""Prompts as the model gets them: through its chat template, and no longer than its context."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlcore.engine.config import TaskConfig
from rlcore.engine.errors import UserError
from rlcore.engine.problem import Problem, Problems
from rlcore.engine.screen import watched

# How many prompts are tokenized at a time.
BATCH = 1024


class View(Problems):
    """Some of a sequence's problems, in their order, each changed by `finish` when it is asked for."""

    def __init__(
        self, problems: Sequence[Problem], finish: Callable[[Problem], Problem], chosen: np.ndarray | None = None
    ) -> None:
        self.problems, self.finish, self.chosen = problems, finish, chosen

    def __len__(self) -> int:
        return len(self.problems if self.chosen is None else self.chosen)

    def at(self, i: int) -> Problem:
        return self.finish(self.problems[i if self.chosen is None else int(self.chosen[i])])


class Chain(Problems):
    """Several sequences one after the other."""

    def __init__(self, parts: list[Sequence[Problem]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def at(self, i: int) -> Problem:
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)
        raise IndexError(i)


def unchanged(problem: Problem) -> Problem:
    return problem


def bytes_of(problems: Sequence[Problem]) -> np.ndarray:
    """UTF-8 bytes of every prompt, [R] int64."""
    return np.array([len(problem.prompt.encode()) for problem in problems], np.int64)


def chat_renderer(tokenizer: Any, config: TaskConfig) -> Callable[[Problem], Problem]:
    """What turns the prompt of a problem into a chat: the system message, then the prompt as the user's, or the
    messages that stand in the data; the generation prompt at the end. Raises UserError without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("task.chat needs a chat template, and the model's tokenizer has none")
    # Where the tokenizer itself puts the beginning-of-text token before every text, the template's would be a second.
    start = tokenizer.bos_token or ""
    doubled = bool(start) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]

    def finish(problem: Problem) -> Problem:
        messages = messages_of(problem)
        if config.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system}, *messages]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template is a program of the tokenizer's author
            raise UserError(
                f"task.chat: the chat template of the model's tokenizer refuses a prompt: {error}"
            ) from None
        return replace(problem, prompt=text.removeprefix(start) if doubled else text)

    return finish


def messages_of(problem: Problem) -> list[dict[str, str]]:
    """The messages of a problem: its prompt, or the chat that the data holds in its place."""
    if problem.prompt:
        return [{"role": "user", "content": problem.prompt}]
    return json.loads(problem.entry["question"])


def token_counts(tokenizer: Any, problems: Sequence[Problem], sizes: np.ndarray, limit: int) -> np.ndarray:
    """Tokens of every prompt, [R]; 0 where `sizes`, the UTF-8 bytes, show that there are at most `limit`.

    No token is shorter than a byte, but for the few that a tokenizer puts around a text.
    """
    around = tokenizer.num_special_tokens_to_add()
    counts = np.zeros(len(problems), np.int64)
    doubtful = np.flatnonzero(sizes.astype(np.int64) + around > limit)
    for start in watched(range(0, len(doubtful), BATCH), f"tokenizing blocks of {BATCH:,} prompts"):
        some = doubtful[start : start + BATCH]
        texts = [problems[int(i)].prompt for i in some]
        counts[some] = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    return counts


def cutter(tokenizer: Any, limit: int, finish: Callable[[Problem], Problem]) -> Callable[[Problem], Problem]:
    """What shortens a problem's question from its start, word by word no more than needed, until it has at most
    `limit` tokens after `finish`. Raises UserError where what is around the question alone is longer."""

    def length(problem: Problem) -> int:
        return len(tokenizer(finish(problem).prompt)["input_ids"])

    def finish_cut(problem: Problem) -> Problem:
        whole = finish(problem)
        if len(whole.prompt.encode()) + tokenizer.num_special_tokens_to_add() <= limit or length(problem) <= limit:
            return whole
        low, high = 0, len(question_text(problem))  # dropping `high` characters is enough, dropping `low` is not
        if length(without(problem, high)) > limit:
            raise UserError(
                f"task.too_long: what the chat template puts around a question is longer than {limit} tokens by itself"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if length(without(problem, middle)) <= limit else (middle, high)
        return finish(without(problem, high))

    return finish_cut


def question_text(problem: Problem) -> str:
    """The text that `without` shortens: the prompt, or the last message of a chat."""
    return problem.prompt or messages_of(problem)[-1]["content"]


def without(problem: Problem, count: int) -> Problem:
    """The problem without the first `count` characters of its question."""
    if problem.prompt:
        return replace(problem, prompt=problem.prompt[count:] or " ")
    messages = messages_of(problem)
    messages[-1]["content"] = messages[-1]["content"][count:]
    return replace(problem, entry={**problem.entry, "question": json.dumps(messages)})
