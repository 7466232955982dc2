"""The Triton kernel of the segments family: right in the interpreter, and compiled for every target without a GPU."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from accuracy import assert_accurate
from oracles import segments as oracle

triton = pytest.importorskip("triton")

LENGTHS = {
    "ragged": (3, 47, 31, 123),
    "empty and one": (0, 5, 0, 0, 1, 0),
    "several blocks": (1023, 1, 1024, 1025, 0, 3000),
    "one long": (9001,),
    "nothing": (0, 0),
    "many": (1,) * 300,
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("contiguous", "strided", "masked")

CASES = [
    (name, dtype, layout)
    for name in LENGTHS
    for dtype in DTYPES
    for layout in LAYOUTS
    if dtype == "float32" or name in ("ragged", "several blocks")
]

# Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own.
IN_THE_INTERPRETER = """
import sys, torch
from rlcore.kernels.segments import segment_sum_count
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
cases = torch.load(sys.argv[1])
results = {k: [segment_sum_count(*case) for _ in range(2)] for k, case in cases.items()}
torch.save(results, sys.argv[2])
"""


def make_case(lengths, dtype, layout):
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
    n = int(offsets[-1])
    x = torch.randn(n, 3, dtype=torch.float64).to(dtype)[:, 1] if layout == "strided" else torch.randn(n).to(dtype)
    if layout != "masked":
        return x, offsets, None
    mask = torch.rand(n) < 0.6
    return x.masked_fill(~mask, torch.nan), offsets, mask


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    torch.manual_seed(0)
    cases = {case: make_case(LENGTHS[case[0]], DTYPES[case[1]], case[2]) for case in CASES}
    folder = tmp_path_factory.mktemp("interpreter")
    torch.save(cases, folder / "cases.pt")
    subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER, folder / "cases.pt", folder / "results.pt"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    return cases, torch.load(folder / "results.pt")


@pytest.mark.parametrize(("name", "dtype", "layout"), CASES)
def test_the_interpreter_agrees_with_the_oracle(interpreted, name, dtype, layout):
    cases, results = interpreted
    x, offsets, mask = cases[name, dtype, layout]
    (sums, counts), again = results[name, dtype, layout]
    size = len(LENGTHS[name])
    ids = oracle.ids_of(offsets, len(x))
    assert sums.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    plain = torch.zeros(size, dtype=sums.dtype).index_add(
        0, torch.from_numpy(ids), x.to(sums.dtype).nan_to_num() if mask is not None else x.to(sums.dtype)
    )
    assert_accurate(sums, oracle.segment_reduce("sum", x, ids, size, mask), plain)
    assert torch.equal(counts.double(), torch.from_numpy(oracle.segment_reduce("count", x, ids, size, mask)))
    assert torch.equal(sums, again[0])


TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@pytest.mark.parametrize(("x", "accumulator"), [("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")])
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_compiles_without_a_gpu(target, x, accumulator):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlcore.kernels import segments

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the compiler")
    constants = {
        "BLOCK": segments.BLOCK,
        "ACC": {"fp32": triton.language.float32, "fp64": triton.language.float64}[accumulator],
    }
    for has_mask in (False, True):
        source = ASTSource(
            fn=segments.segment_sum_kernel,
            signature={
                "x_ptr": f"*{x}",
                "mask_ptr": "*i1" if has_mask else "constexpr",
                "offsets_ptr": "*i64",
                "sums_ptr": f"*{accumulator}",
                "counts_ptr": "*i64",
                "x_stride": "i64",
                "parts": "i32",
                "BLOCK": "constexpr",
                "HAS_MASK": "constexpr",
                "ACC": "constexpr",
            },
            constexprs={**constants, "HAS_MASK": has_mask, **({} if has_mask else {"mask_ptr": None})},
        )
        binary = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": segments.NUM_WARPS})
        assembly = binary.asm["amdgcn" if target.startswith("gfx") else "ptx"]
        assert "atom" not in assembly.replace("atomic_ordering", ""), "the result would depend on the order of programs"
        assert "local_depot" not in assembly, "registers go to memory"
        if target.startswith("gfx"):
            assert ".vgpr_spill_count: 0" in assembly


def test_launch_sizes_follow_from_the_sizes():
    from rlcore.kernels.segments import share

    assert share(0, 1) == 1 and share(10**6, 5000) == 1
    assert share(10**6, 4) == 256 and share(2000, 1) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LENGTHS)
def test_on_the_gpu_through_the_dispatcher(name, dtype, layout):
    import rlcore
    from rlcore.ops import segments as ops

    x, offsets, mask = make_case(LENGTHS[name], DTYPES[dtype], layout)
    ids = oracle.ids_of(offsets, len(x))
    on_gpu = [None if t is None else t.cuda() for t in (x, offsets, mask)]
    with rlcore.backend("triton"):
        y = ops.segment_sum(on_gpu[0], offsets=on_gpu[1], mask=on_gpu[2])
        again = ops.segment_sum(on_gpu[0], offsets=on_gpu[1], mask=on_gpu[2])
    assert torch.equal(y, again)
    clean = x if mask is None else x.nan_to_num()
    plain = torch.zeros(len(LENGTHS[name]), dtype=y.dtype).index_add(0, torch.from_numpy(ids), clean.to(y.dtype))
    assert_accurate(y, oracle.segment_reduce("sum", x, ids, len(LENGTHS[name]), mask), plain)
