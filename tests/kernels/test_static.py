"""What every Triton kernel compiles to, for targets that are not here: no spills, no atomics, no unnoticed growth."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

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


def wrong(facts: static.Facts, record: dict[str, Any], target: str) -> list[str]:
    """What the guard has against a kernel, beside what was recorded of it."""
    limits = {
        "its result would depend on the order of programs": facts.atomics == COUNTS.get(facts.kernel, 0),
        "shared memory that no block can have": facts.shared <= static.SHARED_LIMIT[target],
        "more shared memory": facts.shared <= GROWTH * record["shared"],
        "more registers": facts.registers <= max(GROWTH * record["registers"], record["registers"] + 8),
        "registers go to memory": facts.stack <= (0 if target == "sm_90" else record["stack"]),
        "other units for its products": (facts.tensor_core > 0) == (record["tensor_core"] > 0),
    }
    return [what for what, kept in limits.items() if not kept]


def recorded(family: str, target: str) -> dict[str, list[dict[str, Any]]]:
    return json.loads((static.STATIC / f"{family}.json").read_text())[target]


@pytest.mark.parametrize(("family", "label", "target"), [case for family in FAMILIES for case in cases(family)])
def test_kernels_compile_within_limits(family, label, target):
    records = recorded(family, target)[label]
    found = static.compile_family({label: FAMILIES[family][label]}, target)[label]
    assert [f.kernel for f in found] == [r["kernel"] for r in records], "the launches have changed: run `make static`"
    assert not [f"{f.kernel}: {what}" for f, r in zip(found, records) for what in wrong(f, r, target)]


@pytest.mark.parametrize(("target", "change", "what"), [
    ("sm_90", {}, []), ("sm_80", {"stack": 16, "registers": 110, "shared": 55_000, "tensor_core": 1}, []),
    ("sm_90", {"stack": 8}, ["registers go to memory"]), ("sm_100", {"stack": 24}, ["registers go to memory"]),
    ("gfx942", {"registers": 111}, ["more registers"]), ("sm_80", {"shared": 56_000}, ["more shared memory"]),
    ("gfx942", {"shared": 70_000}, ["shared memory that no block can have", "more shared memory"]),
    ("sm_90", {"tensor_core": 0}, ["other units for its products"]),
    ("sm_100", {"tensor_core": 0}, ["other units for its products"]),
    ("sm_90", {"atomics": 1}, ["its result would depend on the order of programs"]),
])  # fmt: skip
def test_the_guard_objects(target, change, what):
    record = {"registers": 100, "stack": 16, "shared": 50_000, "tensor_core": 8}
    facts = static.Facts("some_kernel", 8, **(record | {"stack": 0, "atomics": 0} | change))
    assert wrong(facts, record, target) == what


@pytest.mark.parametrize("target", static.TARGETS)
def test_every_kernel_and_case_is_recorded_and_make_test_compiles_each_kernel(target):
    source = "\n".join(file.read_text() for file in sorted((ROOT / "kernels").glob("*.py")))
    written, compiled = set(re.findall(r"^def (\w+_kernel)\(", source, re.M)), set()
    for family, cases in FAMILIES.items():
        records = recorded(family, target)
        assert list(records) == list(cases)
        compiled |= {r["kernel"] for label in QUICK[family] for r in records[label]}
    assert len(written) > 15 and compiled == written


# In the names of instructions: mma.sync, wgmma, tcgen05 or mfma, as bench/compile_kernels.py counts them.
PRODUCTS = ("prefix_attention_forward_kernel", "prefix_attention_dq_kernel", "prefix_attention_dkdv_kernel",
            "tile_statistics_kernel")  # fmt: skip


def test_what_is_recorded_of_stacks_and_products():
    """No stack on sm_90; 16-bit products in tensor cores; NVIDIA's have no float32."""
    for family, target in itertools.product(FAMILIES, static.TARGETS):
        for label, records in recorded(family, target).items():
            for r in records:
                where = f"{target} {label} {r['kernel']}"
                assert target != "sm_90" or r["stack"] == 0, where
                if "float32" not in label or target != "gfx942":
                    expected = r["kernel"] in PRODUCTS and "float32" not in label
                    assert (r["tensor_core"] > 0) == expected, where


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
