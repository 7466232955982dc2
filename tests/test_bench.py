"""The benchmark runs: every row with small shapes, its table, its JSON, its report and its guard."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_benchmark_and_report(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--benchmark-quiet", "--quick",
               "-p", "no:cacheprovider", "--threads", "1", "--results", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "rlcore beside its limits" in done.stdout
    (file,) = tmp_path.glob("*/cpu.json")
    stored = json.loads(file.read_text())
    assert {row["family"] for row in stored["rows"]} == {"policy_loss", "prefix_attention", "segments", "vocab_head"}
    assert all(row["measured"] > 0 for row in stored["rows"])
    load("report").render(file)
    assert file.with_suffix(".md").read_text().count("\n| vocab_head |") >= 11


def test_verdicts_and_guard() -> None:
    row = load("measure").Row("key", "family", "ours", "theirs", 1.2, limit="most", asked=1.1, spread=0.05)
    assert row.verdict == "MISSED" and "1.2" in row.regression(None)
    inside = replace(row, spread=0.1)
    assert inside.verdict == "met (in spread)" and inside.regression(None) is None
    assert replace(row, measured=1.0).verdict == "met"
    assert row.regression(replace(row, measured=1.19)) is None  # missed before, and no worse now
    assert row.regression(replace(row, measured=1.05)) is not None
    assert replace(row, measured=1.5).regression(row) is not None
    faster = replace(row, limit="least", asked=2.0, measured=1.0)
    assert faster.verdict == "MISSED" and faster.to_limit == 2.0
    assert replace(faster, measured=3.0).verdict == "met"
    unlimited = replace(row, limit="none", asked=None)
    assert unlimited.met is None and unlimited.regression(None) is None
    assert type(row).from_dict(row.as_dict()) == row


def test_minimum_of_medians_and_spread() -> None:
    measure = load("measure")
    assert measure.min_of_medians([9.0, 5.0, 7.0, 4.0, 6.0, 50.0]) == 6.0
    assert measure.a_against_a([1.0, 2.0] * 3) == 1.0
    race = measure.run_race({"a": lambda: None, "b": lambda: sum(range(1000))}, seconds=0.1)
    assert len(race.of("a", "b")) >= 6 and race.of("a", "b")[0] > race.of("a")[0] > 0


def test_prefix_grid_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are kept one by one, and a second start measures those that are missing alone."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    grid = load("prefix_grid")
    picture = str(tmp_path / "p.png")
    common = ["--quick", "--no-flex", "--threads", "1", "--results", str(tmp_path), "--picture", picture]
    threads = torch.get_num_threads()
    try:
        grid.main([*common, "--points", "6,3,2"])
        (file,) = tmp_path.glob("*/prefix_grid.json")
        (first,) = json.loads(file.read_text())["points"]
        grid.main([*common, "--points", "6,3,2", "1,9,2"])
    finally:
        torch.set_num_threads(threads)
    stored = json.loads(file.read_text())["points"]
    assert [m["point"] for m in stored] == [[1, 9, 2], [6, 3, 2]] and stored[1] == first
    assert file.with_suffix(".md").read_text().count("\n| 6 | 3 | 2 |") == 1 and Path(picture).exists()


def test_prefix_grid_fills_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    grid = load("prefix_grid")
    m = grid.Measured(grid.Point(512, 32, 4), 1.0, 2.0, 0.7, 1.3, None, 1.0, None, 0.0, 6, 0.1)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{grid.BEGIN}old\n{grid.END}after\n")
    monkeypatch.setattr(grid, "PAGE", page)
    text = grid.section({"cpu": "A CPU", "threads": 2}, [m], None, "table.md")
    grid.fill_page(text)
    assert page.read_text() == f"before\n{grid.BEGIN}{text}{grid.END}after\n"
    assert "2.00x to 2.00x" in text and "1.30x to 1.30x" in text and "70% to 70%" in text and "0 of 1 points" in text
    real = (ROOT / "docs" / "prefix_attention.md").read_text()
    assert real.count(grid.BEGIN) == real.count(grid.END) == 1


def test_prefix_grid_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    grid = load("prefix_grid")
    m = grid.Measured(grid.Point(512, 32, 4), 1.0, 2.0, 0.7, 1.3, None, 1.0, None, 0.0, 6, 0.1)
    assert m.speedup == 2.0 and m.missed == ["bound"]  # 70 % of a bound of 2.9
    assert replace(m, spread=0.2).missed == [] and replace(m, ideal=0.8).missed == []
    assert replace(m, ideal=0.8, grouper=1.2).missed == ["prefix-grouper"]
    assert replace(m, repeated=0.9, ideal=0.85, point=grid.Point(8, 128, 8)).missed == ["repeated"]
