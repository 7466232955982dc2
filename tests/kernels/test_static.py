"""What every Triton kernel compiles to, for targets that are not here: no spills, no atomics, no unnoticed growth."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from interpreter import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))  # after tests, which have names in common

import compile_kernels as static  # noqa: E402
from static_cases import FAMILIES, QUICK  # noqa: E402

# Growth that a change of the compiler's version may bring; more is to be looked at, then recorded by `make static`.
GROWTH = 1.10
# Programs that count themselves, for the last of them to add what all have stored, in one order: no sum is atomic.
COUNTS = {"policy_loss_kernel": 1}


def cases(family: str):
    return [
        pytest.param(family, label, target, marks=[] if label in QUICK[family] else pytest.mark.slow)
        for label in FAMILIES[family]
        for target in static.TARGETS
    ]


@pytest.mark.parametrize(("family", "label", "target"), [case for family in FAMILIES for case in cases(family)])
def test_kernels_compile_within_limits(family, label, target):
    recorded = json.loads((static.STATIC / f"{family}.json").read_text())[target][label]
    found = static.compile_family({label: FAMILIES[family][label]}, target)[label]
    assert [f.kernel for f in found] == [r["kernel"] for r in recorded], "the launches have changed: run `make static`"
    for facts, record in zip(found, recorded):
        atomics = COUNTS.get(facts.kernel, 0)
        assert facts.atomics == atomics, f"{facts.kernel}: the result would depend on the order of programs"
        assert facts.shared <= static.SHARED_LIMIT[target]
        assert facts.shared <= GROWTH * record["shared"]
        assert facts.registers <= max(GROWTH * record["registers"], record["registers"] + 8)
        assert facts.stack <= record["stack"]
        assert target != "sm_90" or facts.stack == 0, f"{facts.kernel}: registers go to memory"
        assert (facts.tensor_core > 0) == (record["tensor_core"] > 0)


# Every thread keeps hundreds of values until all have been summed.
BLOCK = 16384
PLANTED = """
import triton
import triton.language as tl

@triton.jit
def planted_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.atomic_add(y_ptr, tl.sum(x, 0))
    tl.store(y_ptr + i, x)
"""


def test_the_guard_sees_spills_and_atomics(tmp_path):
    source = tmp_path / "planted.py"
    source.write_text(PLANTED)
    sys.path.insert(0, str(tmp_path))
    try:
        from planted import planted_kernel
    finally:
        sys.path.remove(str(tmp_path))
    for target in static.TARGETS:
        with static.compiling(target) as found:
            planted_kernel[(1,)](torch.empty(BLOCK), torch.empty(BLOCK), BLOCK=BLOCK, num_warps=1)
        (facts,) = found
        assert facts.atomics > 0, target
        assert facts.stack > 0 or target == "gfx942", target  # its 512 registers a thread hold all of them
