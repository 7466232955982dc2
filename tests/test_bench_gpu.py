"""bench/gpu.sh runs without a GPU as far as it can, and its rows stand in the docs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("segments", "policy_loss", "prefix_attention", "vocab_head")
# Why a row may have no figure on a CPU.
REASONS = ("No module named", "not live", "not built", "No viable backend")


def gpu_sh(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "OUT"} | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def quick(out: Path, parts: str) -> dict:
    done = gpu_sh("--quick", "--out", out, "--only", parts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no measurement" in (out / "gpu.md").read_text()
    assert sorted(file.name for file in out.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]
    return json.loads((out / "gpu.json").read_text())


def test_one_family(tmp_path):
    found = quick(tmp_path, "segments")
    assert [part["name"] for part in found["parts"]] == ["segments"] and not found["measurement"]
    assert {row["key"] for row in found["rows"] if "measured" in row} >= {"segments.gae", "segments.copy"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_row_and_every_part(tmp_path):
    found = quick(tmp_path, "build,tests," + ",".join(FAMILIES))
    states = {part["name"]: part["state"] for part in found["parts"]}
    assert states == dict.fromkeys(("build", "peers"), "left out") | dict.fromkeys(
        (*FAMILIES, "tests of kernels", "tests elsewhere"), "done"
    )
    assert all("collected" in tested["result"] and not tested["wrong"] for tested in found["tests"])
    for row in found["rows"]:
        assert "measured" in row or any(reason in row["reason"] for reason in REASONS), row
    listed = gpu_sh("--list").stdout.count("not measured")
    assert len(found["rows"]) == listed > 25


def test_what_runs_over_its_time_or_fails_is_written_down(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "gpu"))
    from run import Run

    run = Run(tmp_path, quick=True)
    slow = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    assert "begun" in run.command("slow", [sys.executable, "-c", slow], seconds=1.5)
    run.command("wrong", [sys.executable, "-c", "raise SystemExit(3)"], seconds=30)
    assert [part.state for part in run.parts] == ["out of time", "failed"] and "3" in run.parts[1].note


def test_the_docs_hold_every_row():
    listed = gpu_sh("--list").stdout.strip()
    if not list(ROOT.glob("bench/results/*/gpu.json")):
        assert listed in (ROOT / "docs" / "benchmarking.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured():
    done = gpu_sh()
    assert done.returncode == 2 and "no GPU" in done.stderr
