"""The learning table: what is asked, how seeds stand side by side, and a start that goes on where the last stopped."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


def test_a_recipe_meets_what_is_asked_with_every_seed_or_not_at_all(learn: ModuleType) -> None:
    good = learn.Outcome("a", 0, {0: 0.40, 10: 0.80, 20: 0.90}, 2.0)
    assert good.met and (good.before, good.after) == (0.40, 0.90)
    assert not learn.Outcome("a", 1, {0: 0.10, 20: 0.74}, 2.0).met  # ends too low
    assert not learn.Outcome("a", 1, {0: 0.60, 20: 0.89}, 2.0).met  # rises too little
    worse = learn.Outcome("a", 1, {0: 0.40, 20: 0.50}, 3.0)
    (row,) = learn.table([worse, good]).splitlines()[2:]
    assert row == "| a | 40.0% -> 90.0% | 40.0% -> 50.0% | +30.0 points | 3.0 | MISSED |"
    assert "met" in learn.table([good]).splitlines()[2]


def test_an_interrupted_start_goes_on_and_what_is_finished_stays(
    learn: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    (tmp_path / "tiny.toml").write_text(RECIPE.replace("CACHE", str(tmp_path / "cache")))
    monkeypatch.setattr(learn, "RECIPES", tmp_path)
    runs = tmp_path / "runs"
    first = learn.train("tiny", 0, runs)
    assert sorted(first.accuracy) == [0, 1, 2] and first.minutes > 0

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
