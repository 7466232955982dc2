"""Rows longer than the block of 4,096 logits that the C++ passes work on: labels, maxima on both sides of borders."""

from __future__ import annotations

import pytest
import torch

from rlcore.algorithms.vocab_head_passes import TORCH, Coefficients, Scale
from rlcore.ops import backend
from rlcore.ops.vocab_head_native import NATIVE

V = 2 * 4096 + 5
LABELS = torch.tensor([4096, 0, 4095, 4097, 8191, 8192, V - 1, 5000])

pytestmark = pytest.mark.skipif(backend.native() is None, reason="rlcore._native was not built")


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("drop", [False, True])
def test_blocks_of_a_row_are_one_softmax(softcap, drop):
    g = torch.Generator().manual_seed(0)
    n = len(LABELS)
    logits = torch.randn(n, V, generator=g, dtype=torch.float64)
    logits[torch.arange(n), LABELS] = 9.0  # p near 1/2: an error there is seen
    logits[:, -2] = torch.arange(n) * 1.5  # the maximum of later rows lies in the last block
    d = Coefficients(torch.ones(n, dtype=torch.float64), torch.full((n,), 0.5, dtype=torch.float64))
    for x in d:
        x[3] = 0.0 if drop else 1.0

    def passes(which, dtype):
        cap = None if softcap is None else torch.tensor(softcap, dtype=dtype)
        scale = Scale(torch.tensor(0.8, dtype=dtype), cap, torch.tensor(1.1, dtype=dtype))
        z = logits.to(dtype)
        stats = which.statistics(z.clone(), LABELS, scale, True)
        own = Coefficients(*(x.to(dtype) for x in d))
        gradient, rows = which.gradient(z, LABELS, stats, own, scale, raw=True, drop=drop)
        assert isinstance(rows, slice) != drop
        return *stats, gradient

    for found, expected in zip(passes(NATIVE, torch.float32), passes(TORCH, torch.float64), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)
