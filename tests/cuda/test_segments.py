"""The CUDA scans and advantages against the oracle, on a GPU or emulated."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import rlcore as rl
from accuracy import assert_accurate
from oracles import segments as oracle
from rlcore.ops import segments_cuda as cuda

# Tiles have 1,024 rows, threads four of them, warps 128.
LENGTHS = {
    "ragged": (3, 47, 31, 123),
    "empty and one": (0, 5, 0, 0, 1, 0),
    "tiles": (1023, 1024, 1025, 130),
    "one long": (2500,),
    "nothing": (0, 0),
}
DTYPES = (torch.float32, torch.float64)


def case(lengths, dtype, masked, seed=0):
    """(columns of the oracle's numbers, offsets, mask, bootstrap) with NaN where masked."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *np.cumsum(lengths, dtype=np.int64)], dtype=torch.int64)
    n = int(offsets[-1])
    xs = [torch.randn(n, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]
    decays = [torch.rand(n, generator=g, dtype=torch.float64).to(dtype) * 0.2 + 0.85 for _ in range(2)]
    mask = torch.rand(n, generator=g) < 0.7 if masked else None
    if mask is not None:
        xs = [x.masked_fill(~mask, torch.nan) for x in xs]
        decays = [x.masked_fill(~mask, torch.nan) for x in decays]
    return xs, decays, offsets, mask, torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype)


def launched(kind, xs, coefficients, offsets, mask, bootstrap, device, bounds=()):
    there = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    with rl.backend("cuda"):
        ready = cuda.time_of(tuple(map(there, xs)), there(offsets), there(mask), there(bootstrap),
                             tuple(map(there, coefficients)))  # fmt: skip
        assert ready is not None
        out = getattr(ready[0], kind)(*bounds, *ready[1])
    return [x.cpu() for x in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_scans(name, dtype, masked, device):
    xs, decays, offsets, mask, end = case(LENGTHS[name], dtype, masked)
    for bootstrap, (gamma, lam) in ((None, (1.0, 0.95)), (end, decays), (end, (torch.tensor(0.9), decays[1]))):
        at = (offsets, mask, bootstrap)
        (y,) = launched("scan", xs[:1], (gamma,), *at, device)
        assert_accurate(y, oracle.reverse_scan(xs[0], gamma, *at), name="scan")
        found = launched("gae", xs[:2], (gamma, lam), *at, device)
        for got, want in zip(found, oracle.gae(*xs[:2], offsets, gamma, lam, mask, bootstrap), strict=True):
            assert_accurate(got, want, name="gae")
        if name in ("ragged", "empty and one"):  # the oracle's sum is over all pairs of rows
            found = launched("vtrace", xs, (gamma, lam), *at, device, (0.9, 1.1))
            want = oracle.vtrace(*xs, offsets, gamma, lam, 0.9, 1.1, mask, bootstrap)
            for got, exact in zip(found, want, strict=True):
                assert_accurate(got, exact, name="vtrace")


def test_padded_rows_are_the_same_sequences(device):
    x = torch.randn(3, 50)
    (flat,) = launched("scan", [x.reshape(-1)], (0.9,), torch.tensor([0, 50, 100, 150]), None, None, device)
    (padded,) = launched("scan", [x], (0.9,), None, None, None, device)
    assert torch.equal(flat.reshape(3, 50), padded)


def test_a_nan_stays_in_its_sequence_and_bits_do_not_depend_on_neighbours(device):
    xs, _, offsets, _, _ = case((40, 1500, 30), torch.float32, False)
    xs[0][60] = torch.nan
    advantage, _ = launched("gae", xs[:2], (1.0, 0.95), offsets, None, None, device)
    assert advantage[:40].isfinite().all() and advantage[1540:].isfinite().all() and advantage[40:61].isnan().all()
    alone, _ = launched("gae", [x[1540:] for x in xs[:2]], (1.0, 0.95), torch.tensor([0, 30]), None, None, device)
    assert torch.equal(alone, advantage[1540:])


COMBINATIONS = [
    *itertools.product(("none", "group", "leave_one_out", "batch"), ("none", "group", "batch"), ("reward", "residual"))
]


@pytest.mark.parametrize(("center", "scale", "spread"), COMBINATIONS)
def test_group_advantage(center, scale, spread, device):
    g = torch.Generator().manual_seed(3)
    for n, groups in ((1, 1), (23, 5), (300, 7)):
        reward = torch.randn(n, generator=g) + 100
        group = torch.randint(groups, (n,), generator=g) * 10**12 - 5
        weight = torch.rand(n, generator=g) + 0.5
        mask = torch.rand(n, generator=g) < 0.8
        for w, keep in ((None, None), (weight, mask)):
            x = reward if keep is None else reward.masked_fill(~keep, torch.nan)
            there = [None if y is None else y.to(device) for y in (x, group, w, keep)]
            with rl.backend("cuda"):
                found = cuda.group_advantage(there[0], there[1], center, scale, 1, 1e-6, there[2], there[3], spread)
            want = oracle.group_advantage(reward, group, center, scale, 1, 1e-6, w, keep, spread)
            assert found is not None
            # Deviations of 0 are 0 up to the rounding of the mean, and are divided by eps.
            torch.testing.assert_close(found.cpu().double(), torch.from_numpy(want), rtol=1e-5, atol=1e-5)


def test_the_public_functions(device):
    xs, _, offsets, mask, end = case((40, 0, 300), torch.float32, True)
    x, v, rho, at, keep, after = (y.to(device) for y in (*xs, offsets, mask, end))
    group = (torch.arange(x.shape[0]) // 9).to(device)
    reward = x.nan_to_num()
    found = []
    for name in ("reference", "cuda"):
        with rl.backend(name):
            found.append([
                *rl.gae(x, v, at, 0.99, 0.9, keep, after), rl.discounted_return(x, at, 0.9, keep, after),
                *rl.vtrace(x, v, rho, at, 0.99, 0.9, 1.0, 1.0, keep), rl.group_advantage(reward, group),
            ])  # fmt: skip
    for plain, kernel in zip(*found):
        torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-5)


def test_more_rewards_than_every_one_with_every_one(device):
    with rl.backend("cuda"):
        assert cuda.group_advantage(torch.zeros(2**14 + 1, device=device), None, "batch", "none", 1, 1e-6, None, None,
                                    "reward") is None  # fmt: skip


def test_none_where_a_gradient_is_asked_for(device):
    x = torch.zeros(3, device=device, requires_grad=True)
    with rl.backend("cuda"):
        assert cuda.time_of((x,), torch.tensor([0, 3], device=device), None, None, (0.9,)) is None
