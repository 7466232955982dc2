"""The GPU benchmark's Markdown table: every row, those without a figure as not measured, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from report import cells, duration
from targets import Result, Target, all_targets

HEADER = ("family", "measure", "beside", "asked", "measured", "spread", "verdict", "device time", "beside it",
          "call time", "beside it", "note")  # fmt: skip


def markdown(environment: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], targets: Sequence[Target],
             rows: Mapping[str, Mapping[str, Any]], measurement: bool) -> str:  # fmt: skip
    """rows: what family.py wrote, by key."""
    facts = ", ".join(f"{name} {value}" for name, value in environment.items() if not isinstance(value, list))
    lines = [f"# {environment['gpu']}", "", f"{facts}.", ""]
    if not measurement:
        lines += ["**Tiny shapes or no GPU: this checks the script and is no measurement.**", ""]
    lines += ["| part | state | seconds | |", "|---|---|---|---|"]
    lines += [f"| {part['name']} | {part['state']} | {part['seconds']:.0f} | {part['note']} |" for part in parts]
    lines += ["", line(HEADER), "|---" * len(HEADER) + "|"]
    lines += [line(row_cells(target, rows.get(target.key, {}), measurement)) for target in targets]
    counted = [Result.from_dict(row) for row in rows.values() if row.get("asked") is not None]
    limits = sum(target.asked is not None for target in targets)
    if measurement:
        met = sum(bool(row.met) for row in counted)
        lines += ["", f"{met} of {limits} limits are met, {limits - len(counted)} are not measured."]
    return "\n".join(lines) + "\n"


def row_cells(target: Target, row: Mapping[str, Any], measurement: bool) -> tuple[str, ...]:
    if "measured" not in row:
        return (*asked(target), "not measured", *("-",) * 6, row.get("reason", ""))
    result = Result.from_dict(row)
    measured, spread, verdict = cells(result)[4:7]
    times = (result.ours_seconds, result.yardstick_seconds, result.ours_call_seconds, result.yardstick_call_seconds)
    judged = verdict if measurement else "no measurement"
    return (*asked(target), measured, spread, judged, *map(duration, times), result.note)


def asked(target: Target) -> tuple[str, ...]:
    return cells(target.number(1.0))[:4]


def rows_without_figures() -> str:
    """What docs/benchmarking.md holds as long as nothing was measured."""
    lines = [line((*HEADER[1:4], "measured")), "|---|---|---|---|"]
    return "\n".join(lines + [line((*asked(target)[1:], "not measured")) for target in all_targets()])


def line(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "/") for value in values) + " |"
