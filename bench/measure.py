"""How a row of the benchmark is measured: interleaved rounds, the minimum of medians, and a verdict with its spread."""

from __future__ import annotations

import gc
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

TRIAL = 3  # rounds whose median makes one estimate; the smallest estimate counts
SHORTEST = 0.005  # seconds; faster functions are called several times per measurement
LONG_ROUND = 20.0  # seconds; a race of such rounds has five of them, so that a full run stays below eight minutes
Function = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One measured line: `measured` must be at most (limit "most") or at least ("least") `asked`, or has no limit."""

    key: str
    family: str
    measure: str
    yardstick: str
    measured: float
    unit: str = "x"
    limit: str = "none"
    asked: float | None = None
    spread: float = 0.0
    rounds: int = 1
    ours_seconds: float | None = None
    yardstick_seconds: float | None = None

    @property
    def to_limit(self) -> float | None:
        """measured over asked, turned so that 1 is the limit and less is better."""
        if self.asked is None:
            return None
        return self.measured / self.asked if self.limit == "most" else self.asked / self.measured

    @property
    def met(self) -> bool | None:
        """Whether the limit holds; a miss inside the run's own spread counts as met."""
        ratio = self.to_limit
        return None if ratio is None else ratio <= 1 + self.spread

    @property
    def verdict(self) -> str:
        if self.to_limit is None:
            return "-"
        if not self.met:
            return "MISSED"
        return "met" if self.to_limit <= 1 else "met (in spread)"

    def as_dict(self) -> dict[str, Any]:
        numbers = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**numbers, "met": self.met}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Row:
        return cls(**{k: v for k, v in fields.items() if k != "met"})

    def regression(self, committed: Row | None) -> str | None:
        """What is wrong with this row, or None: a missed limit; if it was missed before, one that got worse."""
        if self.met is not False:
            return None
        asked = f"{self.measure}: {self.measured:.3g} {self.unit}, asked {self.asked:g}, spread {self.spread:.1%}"
        if committed is None or committed.met is not False or committed.asked != self.asked:
            return asked
        now, before = self.to_limit, committed.to_limit
        assert now is not None and before is not None
        if now > before * (1 + self.spread + committed.spread):
            return f"{asked}; {committed.measured:.3g} in the committed result"
        return None


@dataclass(frozen=True)
class Race:
    """Seconds per call of every contestant, one per round."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, *names: str) -> list[float]:
        """Per round, the seconds of these contestants one after the other."""
        return [sum(rounds) for rounds in zip(*(self.seconds[name] for name in names), strict=True)]

    def row(
        self, key: str, family: str, measure: str, ours: Iterable[str], over: Iterable[str], yardstick: str,
        most: float | None = None, least: float | None = None, speedup: bool = False,
    ) -> Row:  # fmt: skip
        """ours / over under an upper limit; the speed-up over / ours under a lower one or with `speedup`."""
        a, b = self.of(*ours), self.of(*over)
        mine, other = min_of_medians(a), min_of_medians(b)
        up = speedup or least is not None
        limit = "most" if most is not None else "least" if least is not None else "none"
        return Row(
            key, family, measure, yardstick, measured=other / mine if up else mine / other, limit=limit,
            asked=least if most is None else most, spread=max(a_against_a(a), a_against_a(b)), rounds=len(a),
            ours_seconds=mine, yardstick_seconds=other,
        )  # fmt: skip


def run_race(
    contestants: Mapping[str, Function], seconds: float, quick: bool = False, long_round: float = LONG_ROUND,
    long_rounds: int = 5,
) -> Race:  # fmt: skip
    """Calls every contestant once per round until about `seconds` are spent, at least two trials (of rounds of more
    than `long_round` seconds: `long_rounds`), each round in another order. The caller has run each of them before, to
    check its result.
    """
    names = list(contestants)
    loops = dict.fromkeys(names, 1)
    times: dict[str, list[float]] = {name: [] for name in names}
    rounds, enabled = 2 if quick else 2 * TRIAL, gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, i = perf_counter(), 0
        while i < rounds:
            for name in names[i % len(names) :] + names[: i % len(names)]:
                spent = timed(contestants[name], loops[name])
                if i == 0 and spent < SHORTEST and not quick:
                    loops[name] = math.ceil(SHORTEST / spent)
                    spent = timed(contestants[name], loops[name])
                times[name].append(spent)
            i += 1
            if i == 1 and perf_counter() - start > long_round:
                rounds = min(rounds, long_rounds)
            if i == rounds and not quick and rounds < 60 and (perf_counter() - start) * (1 + 2 * TRIAL / i) < seconds:
                rounds += 2 * TRIAL
    finally:
        if enabled:
            gc.enable()
    return Race(times)


def timed(function: Function, loops: int) -> float:
    start = perf_counter()
    for _ in range(loops):
        function()
    return max(perf_counter() - start, 1e-9) / loops


def min_of_medians(times: Sequence[float]) -> float:
    return min(median(times[i : i + TRIAL]) for i in range(0, len(times), TRIAL))


def a_against_a(times: Sequence[float]) -> float:
    """How far the same estimate from the even and from the odd rounds lies apart, relative."""
    even, odd = min_of_medians(times[::2]), min_of_medians(times[1::2])
    return max(even, odd) / min(even, odd) - 1


def check(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    """Every tensor is finite and within `tolerance` of the expected one in norm; a wrong result is never timed."""
    assert len(actual) == len(expected), what
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and bool(a.isfinite().all()), f"{what}: result {i} is not finite or has a wrong shape"
        error, size = float((a.double() - e.double()).norm()), float(e.double().norm())
        assert error <= tolerance * size + 1e-7, f"{what}: result {i} is off by {error / max(size, 1e-30):.1e}"


def cpu_model() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def environment(threads: int) -> dict[str, Any]:
    """What the numbers depend on; nothing that names a machine."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine_class(threads: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {threads} threads".lower()).strip("-")
