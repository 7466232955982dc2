"""rlcore._native over raw memory: against math.fsum, and what it does with bad arguments."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from rlcore.ops import backend

native = backend.native()
if native is None and os.environ.get("RLCORE_NATIVE") != "1":
    pytest.skip("rlcore._native was not built", allow_module_level=True)

NAMES = {torch.float32: "float32", torch.float64: "float64"}


def segment_sum(values: torch.Tensor, offsets: Sequence[int] | torch.Tensor) -> torch.Tensor:
    offsets = torch.as_tensor(offsets, dtype=torch.int64)
    out = torch.empty(len(offsets) - 1, dtype=values.dtype)
    stride = values.stride(0)
    native.segment_sum(
        values.data_ptr(), stride, offsets.data_ptr(), len(offsets) - 1, out.data_ptr(), NAMES[values.dtype]
    )
    return out


def oracle(values: torch.Tensor, offsets: Sequence[int]) -> torch.Tensor:
    """Correctly rounded sums."""
    rows = values.double().tolist()
    sums = [math.fsum(rows[a:b]) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return torch.tensor(sums, dtype=torch.float64).to(values.dtype)


def test_features() -> None:
    features = native.features()
    assert features["cxx_standard"] >= 17
    assert isinstance(features["openmp"], bool)
    assert features["build_type"] and features["compiler"] != "unknown"


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("stride", [1, 2, 7])
@pytest.mark.parametrize(
    "offsets",
    [[0, 123], [0, 0], [0, 0, 1, 1, 48, 48, 79, 123, 123], [5, 8, 120], [0, 1, 2, 3], list(range(124))],
    ids=["one", "only empty", "ragged", "inner rows", "ones", "all ones"],
)
def test_segment_sum_equals_the_correctly_rounded_sum(dtype: torch.dtype, stride: int, offsets: list[int]) -> None:
    values = (torch.randn(123, dtype=torch.float64) * torch.logspace(-6, 6, 123, dtype=torch.float64)).to(dtype)
    store = torch.full((123, stride), torch.nan, dtype=dtype)
    store[:, 0] = values
    actual, expected = segment_sum(store[:, 0], offsets), oracle(values, offsets)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=eps, atol=0.0)


@pytest.mark.parametrize("dtype", NAMES)
def test_segment_sum_survives_cancellation(dtype: torch.dtype) -> None:
    big = 1e8 if dtype is torch.float32 else 1e16
    values = torch.tensor([1.0, big, 1.0, -big] * 100, dtype=dtype)
    assert segment_sum(values, [0, 400]).item() == 200.0


@pytest.mark.parametrize("dtype", NAMES)
def test_segment_sum_of_infinities_and_nan_is_that_of_torch(dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    values = torch.tensor([1.0, inf, 2.0, -inf, 3.0, inf, -inf, nan, 1.0], dtype=dtype)
    actual = segment_sum(values, [0, 3, 5, 7, 9])
    assert actual.tolist()[:2] == [inf, -inf]
    assert actual.isnan().tolist() == [False, False, True, True]


def test_segment_sum_does_not_depend_on_threads() -> None:
    values = torch.randn(400_000)
    offsets = torch.cat([torch.tensor([0]), torch.randint(0, 400_001, (500,)).sort().values, torch.tensor([400_000])])
    serial = torch.cat([segment_sum(values, offsets[s : s + 2]) for s in range(len(offsets) - 1)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(segment_sum(values, offsets), serial)
    finally:
        torch.set_num_threads(before)


def test_expanded_values_have_stride_zero() -> None:
    assert segment_sum(torch.tensor([0.5]).expand(7), [0, 3, 3, 7]).tolist() == [1.5, 0.0, 2.0]


def test_segment_sum_releases_the_gil() -> None:
    values = torch.tensor([1.0]).expand(1)
    offsets = torch.tensor([0, 200_000_000])
    out = torch.empty(1)
    arguments = (values.data_ptr(), 0, offsets.data_ptr(), 1, out.data_ptr(), "float32")
    worker = threading.Thread(target=native.segment_sum, args=arguments)
    worker.start()
    turns = 0
    while worker.is_alive():
        time.sleep(1e-3)
        turns += 1
    worker.join()
    assert out.item() == 200_000_000.0
    assert turns >= 5


def test_bad_arguments_raise() -> None:
    values, out = torch.ones(4), torch.zeros(2)
    offsets, falling, negative = torch.tensor([0, 2, 4]), torch.tensor([0, 3, 2]), torch.tensor([-1, 2, 4])
    good = {
        "values_ptr": values.data_ptr(),
        "stride": 1,
        "offsets_ptr": offsets.data_ptr(),
        "n_segments": 2,
        "out_ptr": out.data_ptr(),
        "dtype": "float32",
    }
    native.segment_sum(**good)
    assert out.tolist() == [2.0, 2.0]
    out.zero_()
    for change, message in [
        ({"dtype": "float16"}, "dtype: expected 'float32' or 'float64', got 'float16'"),
        ({"values_ptr": 0}, "values_ptr: null"),
        ({"offsets_ptr": 0}, "offsets_ptr: null"),
        ({"out_ptr": 0}, "out_ptr: null"),
        ({"values_ptr": values.data_ptr() + 1}, "values_ptr: address"),
        ({"n_segments": -1}, "n_segments: expected a number >= 0, got -1"),
        ({"stride": -1}, "stride: expected a number >= 0, got -1"),
        ({"offsets_ptr": falling.data_ptr()}, "offsets: must not decrease, got 3 and then 2"),
        ({"offsets_ptr": negative.data_ptr()}, "offsets: expected a first value >= 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.segment_sum(**{**good, **change})
    with pytest.raises(TypeError):
        native.segment_sum(**{**good, "stride": 1.5})
    assert out.tolist() == [0.0, 0.0]


def test_no_segments_need_no_memory() -> None:
    offsets = torch.tensor([0])
    native.segment_sum(0, 1, offsets.data_ptr(), 0, 0, "float64")
