"""`rlcore show`: logged answers of a run, every token coloured by its advantage, log-prob and entropy.

In the terminal, and as one HTML file without scripts. What a model wrote is not to be trusted: control characters and
those that change the direction of text are shown as signs, and everything is escaped in HTML.
"""

from __future__ import annotations

import os
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from rlcore.engine.config import AT_LEAST_ONE
from rlcore.engine.config_rules import check_ranges
from rlcore.engine.errors import UserError
from rlcore.engine.plot import is_number
from rlcore.engine.records import read, write_whole

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
ORANGE: Colour = (230, 120, 20)
BLUE: Colour = (40, 120, 220)
PURPLE: Colour = (140, 60, 170)
GREEN: Colour = (20, 150, 110)


@dataclass
class Show:
    """Show logged answers of a run, token by token, coloured by advantage, log-prob and entropy.

    Without options those of the last step; --best, --worst and --random choose among all steps, or those of --step.
    """

    run: Path
    """Directory of a run."""
    step: Annotated[int | None, AT_LEAST_ONE] = None
    """Answers of this step."""
    best: bool = False
    """Those with the highest rewards, the latest first."""
    worst: bool = False
    """Those with the lowest rewards, the latest first."""
    random: bool = False
    """A random choice, by --seed."""
    seed: int = 0
    """Seed of --random."""
    count: Annotated[int, AT_LEAST_ONE] = 8
    """How many at most."""
    html: Path | None = None
    """Write a page to this file in place of the terminal."""


class Measure(NamedTuple):
    """What colours tokens: values from 0 to the greatest magnitude shown go from white to `high`, below 0 to `low`."""

    key: str
    title: str
    low: Colour
    high: Colour


MEASURES = (
    Measure("advantage", "advantage", ORANGE, BLUE),
    Measure("logp", "log-prob", PURPLE, PURPLE),
    Measure("entropy", "entropy", GREEN, GREEN),
)


class Sample(NamedTuple):
    """A line of samples.jsonl, made safe to show. values: by measure, one number or None per token."""

    step: int
    prompt: str
    reference: str
    reward: float | None
    tokens: list[str]
    values: dict[str, list[float | None]]


def show(command: Show) -> None:
    """Raises UserError and SaveError, whose messages are meant for the user."""
    check_ranges(command, "--")
    samples = choose(load(command.run), command)
    if command.html is not None:
        from rlcore.engine.show_html import page

        write_whole(command.html, page(visible(command.run.resolve().name), samples).encode())
        print(command.html)
    else:
        from rlcore.engine.show_terminal import print_samples

        print_samples(samples)


def load(run: Path) -> list[Sample]:
    """All logged answers of a run, in order; lines that hold none are passed over."""
    path = run / "samples.jsonl"
    if not os.path.isfile(path):
        raise UserError(f"{str(run)!r} is not the directory of a run with samples: it has no samples.jsonl")
    try:
        records = read(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    samples = [sample_of(record) for record in records if isinstance(record.get("answer"), str)]
    if not samples:
        raise UserError(f"{path} holds no answers (log_samples in the config says how many of each step are kept)")
    return samples


def sample_of(record: dict[str, Any]) -> Sample:
    """A record as a Sample; the answer is one token where it was logged without tokens."""
    tokens = record.get("tokens")
    if not isinstance(tokens, list):
        tokens = [record["answer"]]
    values = {measure.key: fitted(record.get(measure.key), len(tokens)) for measure in MEASURES}
    (reward,) = fitted(record.get("reward"), 1)
    return Sample(
        step=record["step"],
        prompt=visible(str(record.get("prompt", ""))),
        reference=visible(str(record.get("reference", ""))),
        reward=reward,
        tokens=[visible(str(token)) for token in tokens],
        values=values,
    )


def fitted(values: Any, length: int) -> list[float | None]:
    """One number or None per token: a list of that length, or one number for all tokens."""
    if not isinstance(values, list):
        values = [values] * length
    return [float(x) if is_number(x) else None for x in values] if len(values) == length else [None] * length


def choose(samples: list[Sample], command: Show) -> list[Sample]:
    """The answers that a command asks for."""
    if command.best + command.worst + command.random > 1:
        raise UserError("--best, --worst and --random exclude each other")
    steps = sorted({sample.step for sample in samples})
    by_reward = command.best or command.worst
    if command.step is not None:
        if command.step not in steps:
            raise UserError(f"--step: there are answers of steps {steps[0]} to {steps[-1]}, got {command.step}")
        samples = [sample for sample in samples if sample.step == command.step]
    elif not (by_reward or command.random):
        samples = [sample for sample in samples if sample.step == steps[-1]]
    if command.random:
        return random.Random(command.seed).sample(samples, min(command.count, len(samples)))
    if by_reward:
        sign = -1 if command.best else 1
        samples = [sample for sample in samples if sample.reward is not None]
        samples = sorted(samples, key=lambda sample: (sign * (sample.reward or 0.0), -sample.step))
    return samples[: command.count]


def visible(text: str) -> str:
    """A text in which nothing acts on the screen: control, format and other unprintable characters become signs.

    Line breaks stay, after a sign of their own.
    """
    return "".join(map(sign, text))


def sign(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "↵\n"
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "␡"
    # Cc controls, Cf direction and joining, Cs halves of characters, Co private, Cn unassigned, Zl and Zp breaks
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"\\u{code:04x}"
    return character


def scales(samples: list[Sample]) -> dict[str, float]:
    """The greatest magnitude of each measure among all answers shown: where its colour is full."""
    return {
        measure.key: max((abs(x) for s in samples for x in s.values[measure.key] if x is not None), default=0.0)
        for measure in MEASURES
    }


def colour(measure: Measure, value: float | None, scale: float) -> Colour:
    """The background of a token: white at 0 and where there is no value."""
    if value is None or scale == 0:
        return WHITE
    share = min(1.0, abs(value) / scale)
    end = measure.high if value > 0 else measure.low
    r, g, b = (round(255 + (x - 255) * share) for x in end)
    return r, g, b


def heading(sample: Sample) -> str:
    reward = "unknown" if sample.reward is None else f"{sample.reward:g}"
    return f"step {sample.step}, reward {reward}, reference {sample.reference}"


def told(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
