"""The emulation must report what it is there for: without any one of its barriers, the tests of the policy loss fail.

The barrier before the counter is left out: it orders blocks, and these run one after another here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

SOURCE = emulated.CSRC / "cuda" / "policy_loss.cu"
BARRIER = "    __syncthreads();\n"
BEHIND = {
    "sums": "shared.warps[warp_of_block()][k] =",
    "last": "shared.is_last = atomicAdd",
    "all": "shared.all[warp_of_block()][k] =",
}


def without_barrier(name: str) -> Path:
    """The source without the first barrier behind some text, in a file."""
    text = SOURCE.read_text()
    place = text.index(BARRIER, text.index(BEHIND[name]))
    spoilt = emulated.FOLDER / f"without-{name}" / SOURCE.name
    spoilt.parent.mkdir(parents=True, exist_ok=True)
    spoilt.write_text(text[:place] + text[place + len(BARRIER) :])
    return spoilt


@pytest.mark.parametrize("name", ["sums", *(pytest.param(x, marks=pytest.mark.slow) for x in ("last", "all"))])
def test_a_missing_barrier_is_reported(name):
    sources = tuple(without_barrier(name) if file == SOURCE else file for file in emulated.SOURCES)
    # A process of its own: pybind11 gives the module that was loaded first to whoever loads one of its name.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line"]
    chosen = ["tests/cuda/test_policy_loss.py", "-k", "test_many_rows and token-token_mean"]
    environment = {**os.environ, "RLCORE_EMULATED": str(emulated.build(sources=sources)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *chosen], cwd=emulated.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout
    assert "nan" in done.stdout or "not all threads reached a barrier" in done.stdout
