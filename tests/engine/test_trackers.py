"""Trackers, by packages that are made up: what they are sent, and that nothing they do stops a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlcore.engine.config import LogConfig
from rlcore.engine.errors import UserError
from rlcore.engine.logging import RunLog
from rlcore.engine.records import read
from rlcore.engine.trackers import trackers
from rlcore.engine.trainer import train

FAKE = """
import json, pathlib
path = pathlib.Path({path!r})
def note(*call):
    with path.open("a") as file:
        file.write(json.dumps(call) + "\\n")
    if call[0] == {broken!r}:
        raise {error}
def init(**arguments):
    note("init", arguments)
def log(metrics, step):
    note("log", step, metrics)
def finish():
    note("finish")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a package of a name, whose function `broken` raises; returns where its calls are noted."""
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    (tmp_path / "packages").mkdir()

    def make(name: str, broken: str = "", error: str = "OSError('no network')") -> Path:
        path = tmp_path / f"{name}.calls"
        text = FAKE.format(path=str(path), broken=broken, error=error)
        (tmp_path / "packages" / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        return path

    yield make
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def calls(path: Path) -> list[list]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_sends_its_metrics(tiny, fake, tmp_path):
    paths = fake("wandb"), fake("trackio")
    config = tiny(log=LogConfig(wandb="mine", trackio="other"), steps=2)
    train(config)
    records = read(tmp_path / "run" / "metrics.jsonl")
    for path, project in zip(paths, ("mine", "other")):
        (_, arguments), *logged, last = calls(path)
        assert arguments["project"] == project and arguments["name"] == "run"
        assert arguments["config"]["update.lr"] == config.update.lr
        assert last == ["finish"]
        expected = [["log", r["step"], {k: v for k, v in r.items() if k != "step" and v is not None}] for r in records]
        assert logged == expected
    assert calls(paths[0])[0][1]["dir"] == str(tmp_path / "run")


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
@pytest.mark.parametrize("error", ["OSError('no network')", "SystemExit(1)", "ValueError()"])
def test_a_failure_is_told_once_and_stops_nothing(tiny, fake, tmp_path, capsys, broken, error):
    path = fake("trackio", broken, error)
    config = tiny(log=LogConfig(trackio="mine"))
    with RunLog(tmp_path, 0, 3, trackers(config, tmp_path)) as log:
        for step in range(3):
            log.step(step, {"eval/accuracy": 0.5, "bad": float("nan")})
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    told = capsys.readouterr().out
    assert told.count("trackio failed") == 1 and ("no network" in told) == ("network" in error)
    assert [call[0] for call in calls(path)].count(broken) == 1


def test_a_package_that_breaks_on_import(tiny, fake, tmp_path, capsys):
    fake("trackio")
    (tmp_path / "packages" / "trackio.py").write_text("raise RuntimeError('built for another python')")
    with RunLog(tmp_path, 0, 3, trackers(tiny(log=LogConfig(trackio="mine")), tmp_path)) as log:
        log.step(0, {"x": 1.0})
    assert "built for another python" in capsys.readouterr().out


def test_a_package_that_is_not_there_is_a_mistake(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log.wandb needs the package 'wandb': pip install 'rlcore\[track\]'"):
        trackers(tiny(log=LogConfig(wandb="mine")), tmp_path)
    assert trackers(tiny(), tmp_path) == []
