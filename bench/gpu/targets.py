"""The rows of the GPU benchmark: what each measures, beside what, and what it must reach.

A family's file declares them on its functions; a row that no function brings stands in the table as not measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from measure import Race, Row

FAMILIES = ("vocab_head", "prefix_attention", "policy_loss", "segments")


@dataclass(frozen=True)
class Result(Row):
    """A measured row: `ours_seconds` and `yardstick_seconds` are device times, and call times stand beside them."""

    ours_call_seconds: float | None = None
    yardstick_call_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """A row that could not be measured, and why."""

    key: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GpuRace:
    """Seconds per call of every contestant and round: on the device, and as the caller waits for them."""

    device: Race
    call: Race


@dataclass(frozen=True)
class Target:
    """One row: `asked` is an upper limit ("most"), a lower one ("least"), or there is none."""

    key: str  # family.name
    measure: str
    yardstick: str
    limit: str = "none"
    asked: float | None = None
    unit: str = "x"
    call: bool = False  # the ratio is one of call times

    @property
    def family(self) -> str:
        return self.key.split(".")[0]

    def of_race(self, race: GpuRace, ours: Iterable[str], over: Iterable[str], note: str = "", factor: float = 1.0,
                speedup: bool = False) -> Result:  # fmt: skip
        """Ours over the yardstick under an upper limit, the speed-up otherwise; times `factor`."""
        ours, over = list(ours), list(over)
        sides = [times.row(self.key, self.family, self.measure, ours, over, self.yardstick,
                           speedup=speedup or self.limit == "least") for times in (race.device, race.call)]  # fmt: skip
        fields = asdict(sides[self.call]) | {
            "measured": sides[self.call].measured * factor, "limit": self.limit, "asked": self.asked,
            "ours_seconds": sides[0].ours_seconds, "yardstick_seconds": sides[0].yardstick_seconds,
            "ours_call_seconds": sides[1].ours_seconds, "yardstick_call_seconds": sides[1].yardstick_seconds,
            "note": note,
        }  # fmt: skip
        return Result(**fields)

    def number(self, measured: float, note: str = "", spread: float = 0.0) -> Result:
        return Result(self.key, self.family, self.measure, self.yardstick, measured, self.unit, self.limit, self.asked,
                      spread, note=note)  # fmt: skip

    def missing(self, reason: str) -> Missing:
        return Missing(self.key, reason)


Found = Iterator[Result | Missing]
_functions: dict[Callable[..., Found], tuple[Target, ...]] = {}


def measures(*targets: Target) -> Callable[[Callable[..., Found]], Callable[..., Found]]:
    """Marks the function of a family that brings these rows."""

    def keep(function: Callable[..., Found]) -> Callable[..., Found]:
        _functions[function] = targets
        return function

    return keep


def functions(family: str) -> list[tuple[Callable[..., Found], tuple[Target, ...]]]:
    importlib.import_module(family)
    return [(f, targets) for f, targets in _functions.items() if targets[0].family == family]


def all_targets() -> list[Target]:
    return [target for family in FAMILIES for _, targets in functions(family) for target in targets]
