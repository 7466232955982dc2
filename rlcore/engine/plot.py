"""Curves of one run or several in one picture, from their metrics.jsonl: `rlcore plot`, and every run's curves.png.

Runs whose names differ only in the seed are drawn as one: their mean, and a band from the least to the greatest.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlcore.engine.errors import UserError
from rlcore.engine.records import read, write_whole

# Title and metrics of each panel; a panel is left out where no run has any of its metrics.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("held-out accuracy", ("eval/accuracy",)),
    ("reward", ("reward", "accuracy")),
    ("entropy (nats per token)", ("policy/entropy",)),
    ("KL (nats per token)", ("policy/ref_kl_k3", "policy/old_kl_k3", "policy/rollout_kl_k3")),
    ("clipped share of tokens", ("policy/clip_low_fraction", "policy/clip_high_fraction")),
    ("answer length (tokens)", ("length", "eval/length")),
    ("gradient norm", ("policy/grad_norm",)),
    ("tokens per second", ("time/tokens_per_s",)),
    ("mismatch sampler / trainer", ("mismatch_max", "mismatch_mean")),
)
STYLES = ("-", "--", ":")
SEED = re.compile(r"(seed[-_=]?)\d+")
FORMATS = (".png", ".svg", ".pdf")


class Curves(NamedTuple):
    """What the legend calls one or several runs, and the metrics of each."""

    name: str
    runs: list[list[dict[str, Any]]]


@dataclass
class Plot:
    """Draw the curves of one run or several into one picture.

    Reward, accuracy, entropy, KL, clipped shares, lengths, throughput, gradient norm. Runs whose names differ only in
    the seed (a-seed0, a-seed1) become a mean and a band from the least to the greatest.
    """

    runs: tuple[Path, ...]
    """Directories of runs."""
    out: Path | None = None
    """The picture: .png, .svg or .pdf. If not given, plot.png in the directory that holds the first run."""


def plot(command: Plot) -> None:
    """`rlcore plot`: writes the picture and says where it is. Raises UserError, SaveError."""
    if not command.runs:
        raise UserError("rlcore plot needs the directory of at least one run")
    out = command.out or command.runs[0].resolve().parent / "plot.png"
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out must be a file that ends with {', '.join(FORMATS)}, got {str(out)!r}")
    figure = draw(by_seed({path: metrics(path) for path in command.runs}))
    write_whole(out, picture(figure, out.suffix[1:].lower()))
    print(out)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run; UserError where it is none or has none yet."""
    if not os.path.isfile(run / "metrics.jsonl"):
        raise UserError(f"{str(run)!r} is not the directory of a run: it has no metrics.jsonl")
    try:
        records = read(run / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"cannot read {run / 'metrics.jsonl'}: {error.strerror}") from None
    if not records:
        raise UserError(f"{run / 'metrics.jsonl'} holds no metrics yet")
    return records


def by_seed(runs: dict[Path, list[dict[str, Any]]]) -> list[Curves]:
    """Runs in the order given, those whose names differ only in the seed together as `name-seed*`."""
    names = legend_names(list(runs))
    groups: dict[str, list[Path]] = {}
    for path in runs:
        groups.setdefault(SEED.sub(r"\1*", names[path]), []).append(path)
    return [
        Curves(f"{stem} ({len(paths)} runs)" if len(paths) > 1 else names[paths[0]], [runs[path] for path in paths])
        for stem, paths in groups.items()
    ]


def legend_names(paths: list[Path]) -> dict[Path, str]:
    """The last part of each path, or the whole path where two runs would be named alike."""
    short = {path: path.resolve().name for path in paths}
    return {path: name if list(short.values()).count(name) == 1 else str(path) for path, name in short.items()}


def series(runs: Sequence[Sequence[dict[str, Any]]], key: str) -> tuple[list[int], list[list[float]]]:
    """Steps at which every run that has the metric at all has a finite value, and the values there, run by run."""
    points = [{r["step"]: float(r[key]) for r in records if is_number(r.get(key))} for records in runs]
    points = [values for values in points if values]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    return steps, [[values[step] for step in steps] for values in points]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def draw(groups: list[Curves]) -> Any:
    """A matplotlib figure with a panel per entry of PANELS that any run has something for.

    Colours tell runs apart, line styles the metrics of a panel.
    """
    from matplotlib.figure import Figure

    there = [
        (title, [key for key in keys if any(series(group.runs, key)[0] for group in groups)]) for title, keys in PANELS
    ]
    panels = [(title, keys) for title, keys in there if keys]
    rows, columns = max(1, math.ceil(len(panels) / 3)), min(3, max(1, len(panels)))
    legend = 0.28 * len(groups) if len(groups) > 1 else 0.0
    height = 3.0 * rows + 0.6 + legend
    figure = Figure(figsize=(4 * columns, height))
    top = 1 - (0.65 + legend) / height
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.45 / height, top=top, hspace=0.42)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, keys) in zip(axes, panels):
        for group, colour in zip(groups, colours(len(groups))):
            for key, style in zip(keys, STYLES):
                curve(axis, group, key, colour if len(groups) > 1 else None, style if len(groups) > 1 else "-")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            key_legend(axis, keys, plain=len(groups) > 1)
    for axis in axes[len(panels) :]:
        axis.remove()
    if len(groups) > 1:
        lines = [proxy(color=colour, label=group.name) for group, colour in zip(groups, colours(len(groups)))]
        figure.legend(handles=lines, loc="upper center")
    else:
        figure.suptitle(groups[0].name)
    return figure


def curve(axis: Any, group: Curves, key: str, colour: Any, style: str) -> None:
    """One metric of a group: its line, or the mean and the band of several runs."""
    steps, values = series(group.runs, key)
    if not steps:
        return
    mean = [sum(column) / len(values) for column in zip(*values)]
    marker = "o" if key.startswith("eval/") else ""
    (line,) = axis.plot(steps, mean, style, color=colour, marker=marker, markersize=4, label=f"{group.name}: {key}")
    if len(values) > 1:
        low, high = [min(column) for column in zip(*values)], [max(column) for column in zip(*values)]
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def key_legend(axis: Any, keys: list[str], plain: bool) -> None:
    """Names the metrics of a panel: by line style (plain) where colours stand for runs, else by colour."""
    if plain:
        axis.legend(handles=[proxy(color="gray", linestyle=s, label=k) for k, s in zip(keys, STYLES)], fontsize="small")
    else:
        axis.legend(axis.lines, keys, fontsize="small")


def proxy(**style: Any) -> Any:
    """A line for a legend alone."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def colours(count: int) -> list[Any]:
    """Colours that stay apart: matplotlib's ten, and a gradient where there are more runs."""
    import matplotlib

    return (
        [f"C{i}" for i in range(count)]
        if count <= 10
        else list(matplotlib.colormaps["turbo"].resampled(count)(range(count)))
    )


def picture(figure: Any, form: str = "png") -> bytes:
    """The figure as the contents of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format=form)
    return buffer.getvalue()
