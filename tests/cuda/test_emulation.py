"""The emulation must report what it is there for: without any one of its barriers, the tests of the policy loss fail.

The barrier before the counter is left out: it orders blocks, and these run one after another here.
"""

from __future__ import annotations

import os
import subprocess
import sys

import emulated
import pytest

SOURCE = emulated.CSRC / "cuda" / "policy_loss.cu"
BARRIER = "    __syncthreads();\n"
BEHIND = {
    "sums": "shared.warps[warp_of_block()][k] =",
    "last": "shared.is_last = atomicAdd",
    "all": "shared.all[warp_of_block()][k] =",
}


def without_barrier(name: str) -> str:
    """The source without the first barrier behind some text."""
    text = SOURCE.read_text()
    place = text.index(BARRIER, text.index(BEHIND[name]))
    return text[:place] + text[place + len(BARRIER) :]


def with_source(name: str, text: str, chosen: str) -> subprocess.CompletedProcess[str]:
    """The tests of the policy loss with another source in its place."""
    changed = emulated.FOLDER / name / SOURCE.name
    changed.parent.mkdir(parents=True, exist_ok=True)
    changed.write_text(text)
    sources = tuple(changed if file == SOURCE else file for file in emulated.SOURCES)
    # A process of its own: pybind11 gives the module that was loaded first to whoever loads one of its name.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line"]
    environment = {**os.environ, "RLCORE_EMULATED": str(emulated.build(sources=sources)), "CUDA_VISIBLE_DEVICES": ""}
    command += ["tests/cuda/test_policy_loss.py", "-k", chosen]
    return subprocess.run(command, cwd=emulated.ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["sums", *(pytest.param(x, marks=pytest.mark.slow) for x in ("last", "all"))])
def test_a_missing_barrier_is_reported(name):
    done = with_source(f"without-{name}", without_barrier(name), "test_many_rows and token-token_mean")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout
    assert "nan" in done.stdout or "not all threads reached a barrier" in done.stdout


@pytest.mark.slow
def test_launches_leave_their_counter_at_zero():
    """With one counter for all: each launch but the first finds what the one before it has left."""
    text = SOURCE.read_text()
    assert "kTurns = 1 << 14;" in text
    done = with_source("one-turn", text.replace("kTurns = 1 << 14;", "kTurns = 1;"), "test_many_rows and segment")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
