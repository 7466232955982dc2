"""Result files as Markdown tables and bar charts: `python bench/report.py [cpu.json ...]`, by default all of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measure import Row

HEADER = ("family", "measure", "yardstick", "asked", "measured", "spread", "verdict", "ours")
COLOURS = {"met": "#2a7f62", "met (in spread)": "#c9a227", "MISSED": "#b23a48"}


def cells(row: Row) -> tuple[str, ...]:
    unit = "" if row.unit == "x" else f" {row.unit}"
    sign = {"most": "<= ", "least": ">= ", "none": ""}[row.limit]
    asked = "-" if row.asked is None else f"{sign}{row.asked:g}{unit}"
    spread = "-" if row.unit != "x" else f"{row.spread:.1%}"
    digits = f"{row.measured:.3f}" if row.measured < 10 else f"{row.measured:.1f}"
    return (
        row.family, row.measure, row.yardstick, asked, digits + unit, spread, row.verdict, duration(row.ours_seconds)
    )  # fmt: skip


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def plain_table(rows: Sequence[Row]) -> str:
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(environment: dict[str, object], rows: Sequence[Row], chart: str | None) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in environment.items())
    lines = [f"# {environment['cpu']}, {environment['threads']} threads", "", f"{facts}.", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    counted = [row for row in rows if row.asked is not None]
    lines += ["", f"{sum(bool(row.met) for row in counted)} of {len(counted)} limits are met."]
    if chart:
        lines += ["", f"![ratio to the limit]({chart})"]
    return "\n".join(lines) + "\n"


def bar_chart(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Measured over asked (or asked over measured) of every row with a limit: left of 1 it holds."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    drawn = [row for row in rows if row.to_limit is not None][::-1]
    if not drawn:
        return False
    values = [row.to_limit or 0.0 for row in drawn]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(drawn)), layout="constrained")
    axes.barh(
        [f"{row.measure} / {row.yardstick}" for row in drawn], values, color=[COLOURS[row.verdict] for row in drawn],
        xerr=[[0] * len(drawn), [v * row.spread for v, row in zip(values, drawn, strict=True)]],
        error_kw={"ecolor": "#555555", "capsize": 2, "linewidth": 0.8},
    )  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("ratio to the limit (less is better; whisker: A-against-A spread)")
    axes.set_title(title)
    axes.tick_params(axis="y", labelsize=7)
    labels = [Patch(color=colour, label=verdict.lower()) for verdict, colour in COLOURS.items()]
    figure.legend(handles=labels, fontsize=7, loc="outside lower left", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return True


def render(file: Path) -> None:
    stored = json.loads(file.read_text())
    rows = [Row.from_dict(row) for row in stored["rows"]]
    environment = stored["environment"]
    chart = file.with_suffix(".png")
    drawn = bar_chart(rows, f"{environment['cpu']}, {environment['threads']} threads", chart)
    file.with_suffix(".md").write_text(markdown(environment, rows, chart.name if drawn else None))


if __name__ == "__main__":
    for found in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(Path(__file__).parent.glob("results/*/cpu.json")):
        render(found)
