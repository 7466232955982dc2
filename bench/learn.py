"""What the methods learn: `python bench/learn.py`, or `make learn`, trains each file of bench/learning/ with each seed.

Writes bench/results/learning.json, .md and .png: held-out accuracy before and after, its rise, minutes. Runs are kept
under runs/learning; a second start goes on with what is unfinished and repeats nothing that is finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from measure import environment

HERE = Path(__file__).parent
RECIPES = HERE / "learning"
LEAST_ACCURACY, LEAST_RISE = 0.75, 0.30  # what is asked of every method on the default task


class Outcome(NamedTuple):
    """One finished run: held-out accuracy by step, and the minutes that its steps and evaluations took."""

    recipe: str
    seed: int
    accuracy: dict[int, float]
    minutes: float

    @property
    def before(self) -> float:
        return self.accuracy[min(self.accuracy)]

    @property
    def after(self) -> float:
        return self.accuracy[max(self.accuracy)]

    @property
    def met(self) -> bool:
        return self.after >= LEAST_ACCURACY and self.after - self.before >= LEAST_RISE


def records(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def finished(run: Path) -> bool:
    """Whether a former start of this script has seen the run's command succeed."""
    return (run / "done").exists()


def train(recipe: str, seed: int, directory: Path) -> Outcome:
    """Trains one recipe with one seed, or goes on with it, or takes what is there."""
    run = directory / f"{recipe}-seed{seed}"
    if not finished(run):
        command = [sys.executable, "-m", "rlcore.cli", "train"]
        if (run / "config.toml").exists():
            command += ["--resume", str(run)]
        else:
            command += ["--config", str(RECIPES / f"{recipe}.toml"), "--seed", str(seed), "--threads", "1",
                        "--dir", str(directory), "--name", run.name]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{run}: {done.stderr.strip() or done.stdout.strip()}")
        (run / "done").touch()
    lines = records(run)
    seconds = sum(line.get("time/step", 0.0) + line.get("time/eval", 0.0) for line in lines)
    accuracy = {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line}
    return Outcome(recipe, seed, accuracy, seconds / 60)


def table(outcomes: list[Outcome]) -> str:
    """One line per recipe, seeds side by side."""
    seeds = sorted({o.seed for o in outcomes})
    head = ["recipe", *(f"seed {seed}" for seed in seeds), "mean rise", "minutes", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for recipe in dict.fromkeys(o.recipe for o in outcomes):
        own = sorted((o for o in outcomes if o.recipe == recipe), key=lambda o: o.seed)
        cells = [f"{o.before:.1%} -> {o.after:.1%}" for o in own]
        rise = mean(o.after - o.before for o in own)
        verdict = "met" if all(o.met for o in own) else "MISSED"
        minutes = max(o.minutes for o in own)
        lines.append("| " + " | ".join([recipe, *cells, f"{100 * rise:+.1f} points", f"{minutes:.1f}", verdict]) + " |")
    return "\n".join(lines)


def chart(outcomes: list[Outcome], path: Path) -> None:
    """Held-out accuracy over steps, one panel per recipe, one line per seed."""
    from matplotlib.figure import Figure

    recipes = list(dict.fromkeys(o.recipe for o in outcomes))
    columns = min(4, len(recipes))
    rows = -(-len(recipes) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for panel, recipe in zip(panels, recipes, strict=False):
        for o in outcomes:
            if o.recipe == recipe:
                panel.plot(list(o.accuracy), list(o.accuracy.values()), label=f"seed {o.seed}")
        panel.axhline(LEAST_ACCURACY, color="grey", linestyle=":")
        panel.set(title=recipe, ylim=(0, 1))
        panel.grid(alpha=0.3)
    for panel in panels[len(recipes) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=90)


def main() -> None:
    known = sorted(path.stem for path in RECIPES.glob("*.toml"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()

    work = [(recipe, seed) for recipe in options.recipes for seed in options.seeds]
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for o in pool.map(lambda w: train(*w, options.runs), work):
            outcomes.append(o)
            print(f"{o.recipe:16} seed {o.seed}: {o.before:.1%} -> {o.after:.1%} in {o.minutes:.1f} min", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(1), "runs": [o._asdict() for o in outcomes]}
    (options.results / "learning.json").write_text(json.dumps(content, indent=1) + "\n")
    facts = ", ".join(f"{name} {value}" for name, value in content["environment"].items())
    asked = f"Asked of every seed: {LEAST_ACCURACY:.0%} or more, and a rise of {100 * LEAST_RISE:.0f} points or more."
    (options.results / "learning.md").write_text(
        f"# What the methods learn\n\n{facts}.\n\n{asked} Minutes: the slowest seed, {options.jobs} runs side by side."
        f"\n\n{table(outcomes)}\n\n![held-out accuracy over steps](learning.png)\n"
    )
    chart(outcomes, options.results / "learning.png")
    print(table(outcomes))


if __name__ == "__main__":
    main()
