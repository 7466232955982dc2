"""The Triton kernels of the segments family against the oracle, on a GPU or in the interpreter."""

import numpy as np
import pytest
import torch

import rlcore as rl
from accuracy import assert_accurate
from oracles import segments as oracle
from rlcore.ops.segments import segment_sum

pytest.importorskip("triton")

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

def make_case(lengths, dtype, layout):
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
    n = int(offsets[-1])
    x = torch.randn(n, 3, dtype=torch.float64).to(dtype)[:, 1] if layout == "strided" else torch.randn(n).to(dtype)
    if layout != "masked":
        return x, offsets, None
    mask = torch.rand(n) < 0.6
    return x.masked_fill(~mask, torch.nan), offsets, mask


@pytest.mark.parametrize(("name", "dtype", "layout"), CASES)
def test_sums_agree_with_the_oracle(device, name, dtype, layout):
    x, offsets, mask = make_case(LENGTHS[name], DTYPES[dtype], layout)
    size, ids = len(LENGTHS[name]), oracle.ids_of(offsets, len(x))
    there = [None if t is None else t.to(device) for t in (x, offsets, mask)]
    with rl.backend("triton"):
        sums, again = (segment_sum(there[0], offsets=there[1], mask=there[2]) for _ in range(2))
    assert sums.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(sums, again)
    clean = (x if mask is None else x.nan_to_num()).to(sums.dtype)
    plain = torch.zeros(size, dtype=sums.dtype).index_add(0, torch.from_numpy(ids), clean)
    assert_accurate(sums.cpu(), oracle.segment_reduce("sum", x, ids, size, mask), plain)


@pytest.mark.parametrize("name", LENGTHS)
def test_counts_agree_with_the_oracle(device, name):
    from rlcore.kernels.segments import segment_sum_count

    x, offsets, mask = make_case(LENGTHS[name], torch.float32, "masked")
    counts = segment_sum_count(x.to(device), offsets.to(device), mask.to(device))[1]
    expected = oracle.segment_reduce("count", x, oracle.ids_of(offsets, len(x)), len(LENGTHS[name]), mask)
    assert torch.equal(counts.cpu().double(), torch.from_numpy(expected))


def test_launch_sizes_follow_from_the_sizes():
    from rlcore.kernels.segments import share

    assert share(0, 1) == 1 and share(10**6, 5000) == 1
    assert share(10**6, 4) == 256 and share(2000, 1) == 2
