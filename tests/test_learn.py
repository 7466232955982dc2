"""The learning table: what is asked, how seeds stand side by side, and a start that goes on where the last stopped."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
steps = 2
checkpoint_every = 1
[task]
pool = 2000
held_out = 10
options = { max_digits = "1" }
[model]
hidden_size = 32
heads = 2
warm_steps = 20
warm_batch = 16
cache = "CACHE"
[rollout]
prompts = 4
samples = 4
[eval]
every = 1
samples = 2
"""


@pytest.fixture
def learn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_learn", ROOT / "bench" / "learn.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(
    learn: ModuleType, accuracy: dict[int, float], recipe: str = "a", seed: int = 1, minutes: float = 2.0
) -> Any:
    return learn.Outcome(recipe, seed, accuracy, [0.5] * max(accuracy), minutes, threads=1, jobs=2, own=0.0149)


def test_a_recipe_meets_what_is_asked_with_every_seed_or_not_at_all(learn: ModuleType) -> None:
    good = outcome(learn, {0: 0.40, 10: 0.80, 20: 0.90}, seed=0)
    assert good.met and (good.before, good.after) == (0.40, 0.90)
    assert not outcome(learn, {0: 0.10, 20: 0.74}).met  # ends too low
    assert not outcome(learn, {0: 0.60, 20: 0.89}).met  # rises too little
    worse = outcome(learn, {0: 0.40, 20: 0.50}, minutes=3.0)
    (row,) = learn.table([good, worse]).splitlines()[2:]
    assert row == (
        "| a | 40.0% -> 90.0% | 40.0% -> 50.0% | +30.0 points | 3.0 | 1.5% | 2 x 1 | 75%, +30 points | MISSED |"
    )
    assert " met " in learn.table([good]).splitlines()[2]


def test_another_task_has_its_own_target_and_its_own_seeds(learn: ModuleType) -> None:
    usual = [outcome(learn, {0: 0.40, 20: 0.90}, seed=seed) for seed in (0, 1)]
    other = outcome(learn, {0: 0.30, 20: 0.51}, "countdown", 0, minutes=14.0)
    assert other.met
    assert not outcome(learn, {0: 0.30, 20: 0.49}, "countdown").met
    assert not outcome(learn, {0: 0.30, 20: 0.60}, "countdown", minutes=15.1).met
    row = learn.table([*usual, other]).splitlines()[3]
    assert row == "| countdown | 30.0% -> 51.0% |  | +21.0 points | 14.0 | 1.5% | 2 x 1 | +20 points in 15 min | met |"


def test_the_table_keeps_other_recipes_and_is_drawn_again_from_its_file(
    learn: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    here = {"cpu": "c", "torch": "t"}
    old = outcome(learn, {0: 0.40, 20: 0.90}, "b")
    stale, new = outcome(learn, {0: 0.40, 20: 0.50}, "a"), outcome(learn, {0: 0.40, 20: 0.80}, "a")
    learn.write([stale, old], here, tmp_path, tmp_path)
    stored = json.loads((tmp_path / "learning.json").read_text())
    assert learn.merged([new], stored, here) == [new, old]
    assert learn.merged([new], stored, {**here, "torch": "u"}) == [new]

    names = ("learning.md", "learning.png", "a.png", "b.png", "learning.json")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names[:-1]:
        (tmp_path / name).unlink()
    monkeypatch.setattr(sys, "argv", ["learn.py", "--draw", "--results", str(tmp_path), "--pictures", str(tmp_path)])
    learn.main()
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_an_interrupted_start_goes_on_and_what_is_finished_stays(
    learn: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    (tmp_path / "tiny.toml").write_text(RECIPE.replace("CACHE", str(tmp_path / "cache")))
    monkeypatch.setattr(learn, "RECIPES", tmp_path)
    runs = tmp_path / "runs"
    first = learn.train("tiny", 0, runs)
    assert sorted(first.accuracy) == [0, 1, 2] and len(first.reward) == 2
    assert first.own is not None and 0 < first.own < 1

    commands = []
    real = subprocess.run
    monkeypatch.setattr(learn.subprocess, "run", lambda c, **k: commands.append(c) or real(c, **k))
    assert learn.train("tiny", 0, runs) == first
    assert not commands
    (runs / "tiny-seed0" / "done").unlink()
    assert learn.train("tiny", 0, runs) == first
    assert "--resume" in commands[0]


def test_the_committed_table_names_what_it_was_run_with() -> None:
    file = ROOT / "bench" / "results" / "learning.json"
    if not file.exists():
        pytest.skip("no table is committed")
    stored = json.loads(file.read_text())
    recipes = {path.stem for path in (ROOT / "bench" / "learning").glob("*.toml")}
    assert {run["recipe"] for run in stored["runs"]} <= recipes
    assert {"cpu", "torch"} <= stored["environment"].keys()


def test_help_runs() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "learn.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--recipes" in done.stdout
