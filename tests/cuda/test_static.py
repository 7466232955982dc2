"""What the CUDA kernels compile to, for GPUs that are not here: no spills, no atomics, no unnoticed growth."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))  # after tests: some names are in both

import compile_cuda as static  # noqa: E402

# Growth that a change of the compiler's version may bring; more is to be looked at, then recorded by `make static`.
GROWTH = 1.10
# Without opting in.
SHARED_LIMIT = 48 * 1024
needs_nvcc = pytest.mark.skipif(static.compiler() is None or shutil.which("c++filt") is None, reason="needs nvcc")

CASES = [
    pytest.param(source, target, marks=[] if target == "sm_90" else pytest.mark.slow)
    for source in static.SOURCES
    for target in static.TARGETS
]


@needs_nvcc
@pytest.mark.parametrize(("source", "target"), CASES)
def test_kernels_compile_within_limits(source, target):
    recorded = json.loads(static.RECORD.read_text())[target][source]
    found = static.compile_source(source, target)
    assert [f.kernel for f in found] == [r["kernel"] for r in recorded], "the kernels have changed: run `make static`"
    for facts, record in zip(found, recorded):
        assert facts.shared <= min(SHARED_LIMIT, GROWTH * record["shared"])
        assert facts.registers <= max(GROWTH * record["registers"], record["registers"] + 8)
        assert facts.stack <= record["stack"]
        assert target != "sm_90" or facts.stack == 0, f"{facts.kernel}: registers go to memory"


def test_every_kernel_is_recorded_without_a_spill_on_sm_90():
    recorded = json.loads(static.RECORD.read_text())
    assert all(set(recorded[target]) == set(static.SOURCES) for target in static.TARGETS)
    assert all(r["stack"] == 0 for kernels in recorded["sm_90"].values() for r in kernels)


# Picks the block that adds what all blocks have left: the counter orders them, and no result has it in it. What threads
# have stored is out before their block is counted; none of the last block reads before that.
LAST_BLOCK = """
    __threadfence();
    __syncthreads();
    if (thread_of_block() == 0) shared.is_last = atomicAdd(turn, 1u) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
"""


def test_no_atomics_but_the_one_that_picks_the_last_block():
    for file in (static.CSRC / "cuda").iterdir():
        text = file.read_text()
        assert text.count(LAST_BLOCK) == (file.name == "policy_loss.cu")
        text = text.replace(LAST_BLOCK, "")
        assert not re.search(r"\batomic\w*\(|\b(?:atom|red)\.", text), file.name
