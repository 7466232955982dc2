"""What a problem is, and how its prompt is made from a template."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Problem:
    """One question: the prompt that the model sees, the reference answer, the record that it comes from, its task.

    entry: `question`, `answer` and `metadata`; for a data file the metadata is the whole row.
    """

    prompt: str
    answer: str
    entry: dict[str, Any]
    task: str = ""


class Problems(Sequence[Problem]):
    """Problems by place, each made when it is asked for."""

    @overload
    def __getitem__(self, i: int) -> Problem: ...
    @overload
    def __getitem__(self, i: slice) -> list[Problem]: ...
    def __getitem__(self, i: int | slice) -> Problem | list[Problem]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.at(i % len(self))

    @abstractmethod
    def at(self, i: int) -> Problem:
        """The problem at place i, 0 <= i < len(self)."""


def render(template: str, entry: dict[str, Any]) -> str:
    """The prompt of an entry: {question}, and {name} for every name in its metadata; other braces stay as they are."""
    values = {**entry["metadata"], "question": entry["question"]}
    return NAME.sub(lambda match: plain(values.get(match[1], match[0])), template)


def plain(value: Any) -> str:
    """A value as it stands in a prompt: the parts of a list with spaces between them."""
    return " ".join(map(plain, value)) if isinstance(value, (list, tuple)) else str(value)


def is_held_out(question: str, fraction: float) -> bool:
    """Whether a question belongs to the held-out side: sha256(question) / 2^256 < fraction."""
    return key_of(question) < fraction * 2**64


def key_of(question: str) -> int:
    """The first 64 bits of sha256(question)."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big")


def excerpt(value: object, length: int = 60) -> str:
    """The beginning of a value, for a message of one line."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."
