"""What a run shows while it goes on."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
# Seconds after which a piece of work that is not a step says how far it is.
PATIENCE = 5.0


class Screen:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, first_step: int, steps: int) -> None:
        self.done_before, self.steps, self.start = max(0, first_step - 1), steps, time.monotonic()
        self.accuracy = math.nan
        self.bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True), TextColumn("left"),
            )  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=self.done_before)
            self.bar.start()

    def step(self, step: int, record: dict[str, float]) -> None:
        self.accuracy = record.get("eval/accuracy", self.accuracy)
        if "reward" not in record:
            return
        speed = record["time/tokens_per_s"]
        accuracy = "unknown" if math.isnan(self.accuracy) else f"{self.accuracy:.1%}"
        line = f"reward {record['reward']:.3f}  held-out {accuracy}  {speed:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=step, description=line)
        elif step == self.steps or step % max(1, self.steps // 25) == 0:
            left = (time.monotonic() - self.start) / (step - self.done_before) * (self.steps - step)
            print(f"step {step}/{self.steps}  {line}  {left:.0f} s left", flush=True)

    def say(self, message: str) -> None:
        if self.bar:
            self.bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def watched(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, one by one; where that takes long, stderr tells how far it is: a bar on a terminal, else lines."""
    total = len(items) if isinstance(items, Sized) else None
    bar: Any = None
    start = time.monotonic()
    due = start + PATIENCE
    try:
        for count, item in enumerate(items, 1):
            yield item
            if (now := time.monotonic()) < due:
                continue
            if not sys.stderr.isatty():
                share = f" of {total:,}" if total else ""
                print(f"{what}: {count:,}{share} after {now - start:.0f} s", file=sys.stderr, flush=True)
                due = now + min(60.0, now - start)
                continue
            if bar is None:
                from rich.console import Console
                from rich.progress import Progress

                bar = Progress(console=Console(stderr=True), transient=True)
                bar.add_task(what, total=total)
                bar.start()
            bar.update(bar.task_ids[0], completed=count)
            due = now + 0.2
    finally:
        if bar:
            bar.stop()
