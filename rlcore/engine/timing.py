"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by name: `with clock("rollout"): ...` adds to its name; blocks inside blocks count in both."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

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
