"""What the methods learn: `python bench/learn.py`, or `make learn`, trains each file of bench/learning/ with each seed.

Writes bench/results/learning.json, .md and .png: held-out accuracy before and after, its rise, minutes, the loop's
own time; and docs/algorithms/RECIPE.png, the curves of each recipe. Runs are kept under runs/learning; a second start
goes on with what is unfinished and repeats nothing that is finished. What the table has of other recipes and seeds
stays in it. `--draw` makes table and pictures from learning.json alone.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from measure import environment

from rlcore.engine.config_file import load_toml
from rlcore.engine.timing import own_share

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "bench" / "learning"
RESULTS = ROOT / "bench" / "results"
PICTURES = ROOT / "docs" / "algorithms"
SMOOTH = 5  # steps whose rewards make one point of a picture


class Asked(NamedTuple):
    """What every seed must reach: held-out accuracy in the end, its rise, minutes of steps and evaluations."""

    accuracy: float
    rise: float
    minutes: float = math.inf

    def __str__(self) -> str:
        parts = [f"{self.accuracy:.0%}"] if self.accuracy else []
        parts.append(f"+{100 * self.rise:.0f} points")
        return ", ".join(parts) + (f" in {self.minutes:.0f} min" if self.minutes < math.inf else "")


DEFAULT_TASK = Asked(0.75, 0.30)
# Recipes of other tasks are trained where --recipes names them: their minutes count, so no more runs than cores then.
OTHER_TASKS = {"countdown": Asked(0.0, 0.20, 15.0)}


class Outcome(NamedTuple):
    """One finished run: held-out accuracy by step, mean reward of steps 1, 2, ..., the minutes that its steps and
    evaluations took, its threads, how many runs there were side by side, and the loop's own share of a step."""

    recipe: str
    seed: int
    accuracy: dict[int, float]
    reward: list[float]
    minutes: float
    threads: int
    jobs: int = 1
    own: float | None = None  # not in files of earlier versions

    @property
    def before(self) -> float:
        return self.accuracy[min(self.accuracy)]

    @property
    def after(self) -> float:
        return self.accuracy[max(self.accuracy)]

    @property
    def asked(self) -> Asked:
        return OTHER_TASKS.get(self.recipe, DEFAULT_TASK)

    @property
    def met(self) -> bool:
        accuracy, rise, minutes = self.asked
        return self.after >= accuracy and self.after - self.before >= rise and self.minutes <= minutes

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Outcome:
        return cls(**{**fields, "accuracy": {int(step): value for step, value in fields["accuracy"].items()}})


def records(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def finished(run: Path) -> bool:
    """Whether a former start of this script has seen the run's command succeed."""
    return (run / "done").exists()


def train(recipe: str, seed: int, directory: Path, threads: int = 0, jobs: int = 1) -> Outcome:
    """Trains one recipe with one seed, or goes on with it, or takes what is there; threads 0: what the recipe says."""
    run = directory / f"{recipe}-seed{seed}"
    if not finished(run):
        command = [sys.executable, "-m", "rlcore.cli", "train"]
        if (run / "config.toml").exists():
            command += ["--resume", str(run)]
        else:
            command += ["--config", str(RECIPES / f"{recipe}.toml"), "--seed", str(seed),
                        "--dir", str(directory), "--name", run.name]  # fmt: skip
            command += ["--threads", str(threads)] if threads else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{run}: {done.stderr.strip() or done.stdout.strip()}")
        (run / "done").write_text(f"{jobs}\n")
    lines = records(run)
    return Outcome(
        recipe,
        seed,
        accuracy={line["step"]: round(line["eval/accuracy"], 4) for line in lines if "eval/accuracy" in line},
        reward=[round(line["reward"], 3) for line in lines if "reward" in line],
        minutes=round(sum(line.get("time/step", 0.0) + line.get("time/eval", 0.0) for line in lines) / 60, 2),
        threads=load_toml(run / "config.toml").threads or 1,
        jobs=int((run / "done").read_text()),
        own=round(own_share(lines), 4),
    )


def by_recipe(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    return {recipe: [o for o in outcomes if o.recipe == recipe] for recipe in dict.fromkeys(o.recipe for o in outcomes)}


def table(outcomes: list[Outcome]) -> str:
    """One line per recipe, seeds side by side."""
    seeds = sorted({o.seed for o in outcomes})
    head = ["recipe", *(f"seed {seed}" for seed in seeds), "mean rise", "minutes", "own time"]
    head += ["runs x threads", "asked", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for recipe, own in by_recipe(outcomes).items():
        shares = [o.own for o in own if o.own is not None]
        shown = {o.seed: f"{o.before:.1%} -> {o.after:.1%}" for o in own}
        cells = [
            recipe,
            *(shown.get(seed, "") for seed in seeds),
            f"{100 * mean(o.after - o.before for o in own):+.1f} points",
            f"{max(o.minutes for o in own):.1f}",
            f"{max(shares):.1%}" if shares else "",
            ", ".join(sorted({f"{o.jobs} x {o.threads}" for o in own})),
            str(own[0].asked),
            "met" if all(o.met for o in own) else "MISSED",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overview(outcomes: list[Outcome], path: Path) -> None:
    """Held-out accuracy over steps, one panel per recipe, one line per seed."""
    from matplotlib.figure import Figure

    recipes = by_recipe(outcomes)
    columns = min(4, len(recipes))
    rows = -(-len(recipes) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for panel, own in zip(panels, recipes.values(), strict=False):
        draw_accuracy(panel, own)
        panel.set_title(own[0].recipe)
    for panel in panels[len(recipes) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=90, metadata={"Software": None})


def curves(outcomes: list[Outcome], path: Path) -> None:
    """Held-out accuracy and reward over steps of one recipe, one line per seed; rewards as means of `SMOOTH` steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_accuracy(left, outcomes)
    left.set(title="held-out accuracy", xlabel="step")
    for o in outcomes:
        starts = range(0, len(o.reward), SMOOTH)
        means = [mean(o.reward[start : start + SMOOTH]) for start in starts]
        right.plot([start + SMOOTH / 2 for start in starts], means, linewidth=1, label=f"seed {o.seed}")
    right.set(title=f"reward, means of {SMOOTH} steps", xlabel="step")
    right.grid(alpha=0.3)
    right.legend(loc="lower right")
    figure.savefig(path, dpi=80, metadata={"Software": None})


def draw_accuracy(panel: Any, outcomes: list[Outcome]) -> None:
    for o in outcomes:
        panel.plot(list(o.accuracy), list(o.accuracy.values()), label=f"seed {o.seed}")
    least = outcomes[0].asked.accuracy
    if least:
        panel.axhline(least, color="grey", linestyle=":")
    panel.set_ylim(0, 1)
    panel.grid(alpha=0.3)


def merged(outcomes: list[Outcome], stored: dict[str, Any] | None, here: dict[str, Any]) -> list[Outcome]:
    """`outcomes` and those of a stored table that was made on the same machine with the same versions, in order."""
    before = [Outcome.from_dict(run) for run in stored["runs"]] if stored and stored["environment"] == here else []
    known = {(o.recipe, o.seed): o for o in [*before, *outcomes]}
    return sorted(known.values(), key=lambda o: (o.recipe in OTHER_TASKS, o.recipe, o.seed))


def write(outcomes: list[Outcome], here: dict[str, Any], results: Path, pictures: Path) -> None:
    """learning.json, one line per run; learning.md; the pictures."""
    results.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    runs = ",\n".join(json.dumps(o._asdict()) for o in outcomes)
    (results / "learning.json").write_text(f'{{"environment": {json.dumps(here)},\n"runs": [\n{runs}\n]}}\n')
    facts = ", ".join(f"{name} {value}" for name, value in here.items())
    (results / "learning.md").write_text(
        f"# What the methods learn\n\n{facts}.\n\nHeld-out accuracy before and after. Asked: of every seed. Minutes: "
        f"steps and evaluations of the slowest seed, with so many runs side by side and so many threads each. Own "
        "time: the median share of a step beside rollout, reward, forward, backward and optimizer; largest seed,"
        " empty for runs of earlier versions.\n\n"
        f"{table(outcomes)}\n\n![held-out accuracy over steps](learning.png)\n"
    )
    overview(outcomes, results / "learning.png")
    for recipe, own in by_recipe(outcomes).items():
        curves(own, pictures / f"{recipe}.png")


def main() -> None:
    known = sorted(path.stem for path in RECIPES.glob("*.toml"))
    usual = [recipe for recipe in known if recipe not in OTHER_TASKS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", choices=known, default=usual, metavar="NAME",
                        help=f"{', '.join(known)}; left out: all but {', '.join(OTHER_TASKS)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=0, help="threads of each; 0: what the recipe says, else one")
    parser.add_argument("--draw", action="store_true", help="train nothing: table and pictures from learning.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args()

    file = options.results / "learning.json"
    stored = json.loads(file.read_text()) if file.exists() else None
    if options.draw:
        if stored is None:
            raise SystemExit(f"--draw: there is no {file} yet; without --draw it is made")
        here = stored["environment"]
    else:
        here = {name: value for name, value in environment(1).items() if name != "threads"}
    outcomes = merged([] if options.draw else trained(options), stored, here)
    write(outcomes, here, options.results, options.pictures)
    print(table(outcomes))


def trained(options: argparse.Namespace) -> list[Outcome]:
    """The outcomes of the asked recipes and seeds, `--jobs` runs at a time."""
    work = [(recipe, seed) for recipe in options.recipes for seed in options.seeds]
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for o in pool.map(lambda w: train(*w, options.runs, options.threads, options.jobs), work):
            outcomes.append(o)
            print(f"{o.recipe:16} seed {o.seed}: {o.before:.1%} -> {o.after:.1%} in {o.minutes:.1f} min", flush=True)
    return outcomes


if __name__ == "__main__":
    main()
