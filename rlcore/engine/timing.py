"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

# What a step is for; the rest of it is the loop's own time.
WORK = ("rollout", "reward", "forward_backward", "optimizer")


class Stopwatch:
    """Seconds by name: `with clock("rollout"): ...` adds to its name; blocks inside blocks count in both.

    `before` are seconds by name that passed before it was made and count all the same.
    """

    def __init__(self, **before: float) -> None:
        self.start = time.perf_counter() - sum(before.values())
        self.seconds: dict[str, float] = defaultdict(float, before)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def move(self, source: str, target: str, seconds: float) -> None:
        """Counts seconds of one name under another."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def metrics(self) -> dict[str, float]:
        """time/NAME of each name, time/step since the start, and time/other, what no name accounts for."""
        total = time.perf_counter() - self.start
        named = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        return {**named, "time/other": total - sum(self.seconds.values()), "time/step": total}


def own_share(records: Iterable[Mapping[str, Any]]) -> float:
    """The share of a step that is not WORK, median over the steps among a run's metrics."""
    steps = [record for record in records if "time/step" in record]
    return median(1 - sum(record[f"time/{name}"] for name in WORK) / record["time/step"] for record in steps)
