"""Prefix trees over (P, S, G): `python bench/prefix_grid.py`, or `make grid`, measures a training step at every point.

P tokens of prompt, G responses of S tokens. Per point, in one process and in rounds that alternate (measure.py): the
step of prefix_cases.py on the tree, on the repeated batch and with the prefix-grouper package, after losses and all
gradients were found equal; attention's forward pass beside FlexAttention's. Beside the speed-up stands its bound:

    bound = repeated / (floor + layers * pairs * seconds per pair)

repeated is that batch's measured step. floor is the step of the tree's rows through the same model without attention,
packed before: embedding, matrix products at just that number of rows, norms, the head, which is not shared, and the
loss, forward and backward. pairs are the query-key pairs of the tree, and a pair costs what it costs in the faster of
torch's attention and ours on whole paths of P + S tokens, about as many rows in all, where nothing is shared. So the
bound grants the tree free packing, free gathers, and attention as fast as without a tree. It is that of sharing alone:
floor and pairs are of all rows in all layers, while the tree's last layer computes only the rows that the loss reads.
A step may so be faster than its bound.

Writes prefix_grid.json and .md under bench/results/<machine>/, docs/prefix_grid.png, and what docs/prefix_attention.md
says of them. Every point is kept as soon as
it is there; a second start goes on with those that are missing. `--draw` makes table and picture from the JSON alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from measure import TRIAL, a_against_a, check, environment, machine_class, min_of_medians, run_race
from prefix_cases import MICRO, Attention, Point, Size, Steps

ROOT = Path(__file__).resolve().parents[1]
GRID = [Point(*sizes) for sizes in product((128, 512, 2048), (32, 128, 512), (4, 8, 16))]
# Where next to nothing is shared, sharing must at least cost nothing.
UNSHARED = [Point(4, 128, 8), Point(8, 512, 4)]
QUICK = [Point(16, 8, 2), Point(32, 8, 4), Point(2, 16, 2)]
# One trial has to do where a round takes longer, in seconds: the whole grid is to take half an hour on two cores.
LONG_ROUND = 4.0
MEMORY_POINT = Point(2048, 128, 16)
# Asked: this share of the bound where the bound is over 1.5; this speed-up where it is under 1.1; over prefix-grouper.
OF_BOUND, NO_SLOWER, OVER_GROUPER, MEMORY = 0.8, 0.97, 1.25, 0.25


@dataclass(frozen=True)
class Measured:
    """One point: seconds of a step, and of one layer's attention. What was not measured is None."""

    point: Point
    tree: float
    repeated: float
    ideal: float
    grouper: float | None
    grouped: float | None
    attention: float
    flex: float | None
    spread: float
    rounds: int
    minutes: float

    @property
    def bound(self) -> float:
        return self.repeated / self.ideal

    @property
    def speedup(self) -> float:
        return self.repeated / self.tree

    @property
    def missed(self) -> list[str]:
        """What the point is asked and misses by more than the spread."""
        limits = []
        if self.bound > 1.5:
            limits.append(("bound", self.ideal / self.tree, OF_BOUND))
        if self.bound < 1.1:
            limits.append(("repeated", self.speedup, NO_SLOWER))
        if self.grouper is not None and self.point.prompt >= 512:
            limits.append(("prefix-grouper", self.grouper / self.tree, OVER_GROUPER))
        return [name for name, got, asked in limits if got * (1 + self.spread) < asked]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Measured:
        return cls(**{**fields, "point": Point(*fields["point"])})


def measure(point: Point, size: Size, seconds: float, quick: bool, flex: bool) -> Measured:
    start = perf_counter()
    steps, attention = Steps(point, size), Attention(point, size)
    names = ["tree", "repeated", *(["grouper", "grouped"] if find_spec("prefix_grouper") else [])]
    functions = {name: steps.function(name) for name in names}
    expected = functions["repeated"]()
    for name in names:
        if name != "repeated":
            check(f"{name} at {point}", functions[name](), expected)
    functions["floor"] = steps.function("floor")
    unshared = {f"unshared {name}": attention.unshared(name) for name in ("torch", "ours")}
    for function in (functions["floor"], *unshared.values()):
        function()
    race = run_race(functions | unshared, seconds, quick, LONG_ROUND, TRIAL)
    best = {name: min_of_medians(race.of(name)) for name in race.seconds}
    per_pair = min(best[name] for name in unshared) / attention.pairs
    tree_attention = attention.forward_of_tree(flex)
    if flex:
        check(f"FlexAttention at {point}", [tree_attention["flex"]()], [tree_attention["ours"]()])
    forward = run_race(tree_attention, seconds / 8, quick)
    return Measured(
        point, best["tree"], best["repeated"], best["floor"] + size.layers * point.pairs * per_pair,
        best.get("grouper"), best.get("grouped"), min_of_medians(forward.of("ours")),
        min_of_medians(forward.of("flex")) if flex else None,
        max(a_against_a(race.of(name)) for name in names), len(race.of("tree")), (perf_counter() - start) / 60,
    )  # fmt: skip


def memory(point: Point, threads: int, quick: bool) -> dict[str, Any]:
    """Peak MiB of the step beside its gradients, in a fresh process per layout."""
    found: dict[str, Any] = {"point": point}
    for name in ("tree", "repeated"):
        command = [sys.executable, __file__, "--memory-of", name, "--points", ",".join(map(str, point)),
                   "--threads", str(threads), *(["--quick"] if quick else [])]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"memory of {name}: {done.stderr.strip()}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_of(name: str, point: Point, size: Size) -> float:
    from memory import MIB, growth, large_blocks_from_the_system

    large_blocks_from_the_system()
    functions = []
    # The small one first: code, threads and the buffers of the matrix library are no part of the step.
    for at in (Point(16, 8, 2), point):
        steps = Steps(at, size)
        functions.append(steps.function("tree") if name == "tree" else steps.whole)
        if at != point:
            functions[-1]()
    return growth(functions[-1], hidden=64 * MIB)[0]


HEADER = ("P", "S", "G", "tree", "repeated", "speed-up", "bound", "of bound", "prefix-grouper", "its bound",
          "with our head", "FlexAttention", "spread", "missed")  # fmt: skip


def cells(m: Measured) -> list[str]:
    def ratio(other: float | None, own: float) -> str:
        return "-" if other is None else f"{other / own:.2f}x"

    return [
        *map(str, m.point), f"{1000 * m.tree:.0f} ms", f"{1000 * m.repeated:.0f} ms", f"{m.speedup:.2f}x",
        f"{m.bound:.2f}x", f"{m.ideal / m.tree:.0%}", ratio(m.grouper, m.tree), ratio(m.grouper, m.ideal),
        ratio(m.grouped, m.tree), ratio(m.flex, m.attention), f"{m.spread:.1%}", ", ".join(m.missed) or "nothing",
    ]  # fmt: skip


def plain_table(found: Sequence[Measured]) -> str:
    lines = [list(HEADER), *map(cells, found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def memory_line(peak: dict[str, Any] | None) -> str:
    if peak is None:
        return "Peak memory: not measured."
    point = Point(*peak["point"])
    share = peak["tree"] / peak["repeated"]
    verdict = "met" if share <= MEMORY else "MISSED"
    return (f"Peak memory of the step at P {point.prompt}, S {point.response}, G {point.responses}, beside gradients: "
            f"{peak['tree']:.0f} MiB, {share:.1%} of the {peak['repeated']:.0f} MiB of the repeated batch as a whole "
            f"(asked: at most {MEMORY:.0%}; {verdict}).")  # fmt: skip


def markdown(here: dict[str, Any], found: Sequence[Measured], peak: dict[str, Any] | None) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in here.items())
    text = (
        f"# Prefix trees over (P, S, G)\n\n{facts}. Qwen3 with 4 layers of 256, V 1000, float32. A step is forward, "
        f"loss and backward. The repeated batch runs in micro-batches of at most {MICRO:,} tokens. prefix-grouper: its "
        "step over the tree's, as its documentation uses it; its bound: the same over the least step of a tree, which "
        "the bound is made of; with our head: its hidden states in our head. FlexAttention: its forward pass over "
        "ours, one layer, compiled. Bound: see `bench/prefix_grid.py`.\n\n"
    )
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += ["| " + " | ".join(cells(m)) + " |" for m in found]
    missed = sum(bool(m.missed) for m in found)
    return text + "\n".join(lines) + (
        f"\n\nAsked: {OF_BOUND:.0%} of the bound where it is over 1.5x, {NO_SLOWER}x where it is under 1.1x, "
        f"{OVER_GROUPER}x over prefix-grouper where P >= 512; {len(found) - missed} of {len(found)} points meet all "
        f"that they are asked.\n\n{memory_line(peak)}\n"
    )  # fmt: skip


def draw(found: Sequence[Measured], path: Path) -> None:
    """Speed-up over P/S, one panel per G, one colour per S: the bound as a line, measured points on it or below."""
    from matplotlib.figure import Figure

    groups, lengths = (sorted({m.point[i] for m in found}) for i in (2, 1))
    figure = Figure(figsize=(3.6 * len(groups), 3.4), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, G in zip(panels, groups, strict=True):
        for S, colour in zip(lengths, ("#2a6f97", "#c9762a", "#2a7f62"), strict=False):
            line = sorted((m for m in found if m.point[1:] == (S, G)), key=lambda m: m.point.prompt)
            x = [m.point.prompt / S for m in line]
            panel.plot(x, [m.bound for m in line], color=colour, linewidth=1, label=f"bound, S {S}")
            panel.plot(x, [m.speedup for m in line], "o", color=colour, markersize=5, label=f"tree, S {S}")
            known = [(at, m.repeated / m.grouper) for at, m in zip(x, line, strict=True) if m.grouper is not None]
            panel.plot(*zip(*known, strict=True) if known else ([], []), "x", color=colour, markersize=5)
        panel.set(xlabel="P / S", title=f"G = {G}")
        panel.set_xscale("log", base=4)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}x")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("speed-up of a step over the repeated batch")
    panels[0].plot([], [], "x", color="#555555", label="prefix-grouper")
    panels[0].legend(fontsize=7, loc="upper left")  # bounds rise to the right
    figure.savefig(path, dpi=110, metadata={"Software": None})


PAGE = ROOT / "docs" / "prefix_attention.md"
BEGIN, END = "<!-- grid: written by `make grid` -->\n", "<!-- end of grid -->\n"


def section(here: dict[str, Any], found: Sequence[Measured], peak: dict[str, Any] | None, table: str) -> str:
    """What the page says of the grid; `table` is the link to it."""
    faster = [m.speedup for m in found if m.point not in UNSHARED]
    over = [m.grouper / m.tree for m in found if m.grouper is not None and m.point.prompt >= 512]
    share = [m.ideal / m.tree for m in found if m.bound > 1.5]
    missed = sum(bool(m.missed) for m in found)
    lines = [
        "![speed-up of a step over P / S](prefix_grid.png)\n",
        f"On {here['cpu']}, {here['threads']} threads: a step on the tree is {min(faster):.2f}x to {max(faster):.2f}x",
        "as fast as on the repeated batch;",
        *([f"{min(over):.2f}x to {max(over):.2f}x as fast as with prefix-grouper where P >= 512;"] if over else []),
        *([f"{min(share):.0%} to {max(share):.0%} of the bound where that is over 1.5x."] if share else []),
        f"{len(found) - missed} of {len(found)} points meet all that they are asked. {memory_line(peak)}",
        f"[All points]({table}).",
    ]
    return "\n".join(lines) + "\n"


def fill_page(text: str) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2])


class Store:
    """The JSON file: the points in order, and the peak memory. Of other versions or machines it keeps nothing. Without
    a file all is forgotten.
    """

    def __init__(self, file: Path | None, here: dict[str, Any]) -> None:
        self.file, self.here = file, here
        stored = json.loads(file.read_text()) if file and file.exists() else {}
        if stored.get("environment") != here:
            stored = {}
        self.points = {m.point: m for m in map(Measured.from_dict, stored.get("points", []))}
        self.memory: dict[str, Any] | None = stored.get("memory")

    @property
    def found(self) -> list[Measured]:
        return [self.points[point] for point in sorted(self.points)]

    def write(self) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        points = ",\n".join(json.dumps(rounded(asdict(m))) for m in self.found)
        self.file.write_text(
            f'{{"environment": {json.dumps(self.here)},\n"memory": {json.dumps(rounded(self.memory))},\n'
            f'"points": [\n{points}\n]}}\n'
        )


def rounded(numbers: dict[str, Any] | None) -> dict[str, Any] | None:
    return numbers and {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in numbers.items()}


def points_of(text: str) -> Point:
    try:
        P, S, G = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected P,S,G, three numbers; got {text!r}") from None
    return Point(P, S, G)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", nargs="+", type=points_of, metavar="P,S,G", help="these instead of the grid")
    parser.add_argument("--seconds", type=float, default=10.0, help="for one point's rounds, of which there are 3 or 6")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure also what is stored")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles at every point")
    parser.add_argument("--quick", action="store_true", help="a small model and points: that it works; nothing is kept")
    parser.add_argument("--draw", action="store_true", help="measure nothing: table and picture from the JSON")
    parser.add_argument("--results", type=Path, help="where the JSON goes (default: bench/results; --quick: nowhere)")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "prefix_grid.png")
    parser.add_argument("--memory-of", choices=("tree", "repeated"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    size = Size(2, 64, 100) if options.quick else Size()
    if options.memory_of:
        print(memory_of(options.memory_of, options.points[0], size))
        return
    directory = options.results or (None if options.quick else ROOT / "bench" / "results")
    here = environment(options.threads)
    store = Store(directory and directory / machine_class(options.threads) / "prefix_grid.json", here)
    if not options.draw:
        fill(store, options, size)
    if not store.found:
        raise SystemExit(f"there is no {store.file} of this machine and these versions; without --draw it is made")
    print(plain_table(store.found))
    print(memory_line(store.memory))
    if store.file:
        store.file.with_suffix(".md").write_text(markdown(store.here, store.found, store.memory))
        draw([m for m in store.found if m.point not in UNSHARED], options.picture)
        if directory == ROOT / "bench" / "results" and len(store.found) == len(UNSHARED + GRID):
            table = f"../bench/results/{store.file.parent.name}/prefix_grid.md"
            fill_page(section(store.here, store.found, store.memory, table))


def fill(store: Store, options: argparse.Namespace, size: Size) -> None:
    """Measures what is missing, and keeps it point by point."""
    points = options.points or (QUICK if options.quick else UNSHARED + GRID)
    missing = [point for point in points if options.again or point not in store.points]
    for i, point in enumerate(missing):
        print(f"[{i + 1}/{len(missing)}] P {point.prompt}, S {point.response}, G {point.responses} ...", flush=True)
        m = store.points[point] = measure(point, size, options.seconds, options.quick, not options.no_flex)
        store.write()
        print(f"    {m.speedup:.2f}x, bound {m.bound:.2f}x, in {m.minutes:.1f} min", flush=True)
    if not options.points and (options.again or store.memory is None):
        store.memory = memory(QUICK[1] if options.quick else MEMORY_POINT, options.threads, options.quick)
        store.write()


if __name__ == "__main__":
    main()
