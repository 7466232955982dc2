"""The interpreter rounds and multiplies bfloat16 as a GPU does; run on one, these say the same of it."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def product_kernel(a_ptr, b_ptr, sums_ptr, rounded_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    sums = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(sums_ptr + at, sums)
    tl.store(rounded_ptr + at, sums.to(tl.bfloat16))


def test_bfloat16_products_and_rounding(device):
    a, b = (torch.randn(16, 16, device=device).bfloat16() for _ in range(2))
    a[0, 0], a[1, 1] = torch.nan, torch.inf
    sums = torch.empty(16, 16, device=device)
    rounded = torch.empty(16, 16, device=device, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, sums, rounded)
    torch.testing.assert_close(sums.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(rounded, sums.bfloat16(), rtol=0, atol=0, equal_nan=True)
