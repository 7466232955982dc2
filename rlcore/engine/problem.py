"""What a problem is, and how its prompt is made from a template."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

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
