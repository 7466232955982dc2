"""The reverse scans in Triton against the float64 reference, on a GPU or in the interpreter."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rlcore as rl
from accuracy import assert_accurate
from interpreter import INTERPRETED
from rlcore.algorithms import segments_scan as reference

pytest.importorskip("triton")

LENGTHS = {
    "ragged": (3, 47, 31, 123),
    "empty and one": (0, 5, 0, 1, 0),
    "nothing": (0,),
    "one": (1,),
    "whole blocks": (16, 32, 8, 16),
    "short": (1,) * 9,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The interpreter scans row by row, so that blocks as shipped would take it minutes."""
    from rlcore.kernels import segments_scan as kernels

    if INTERPRETED:
        monkeypatch.setattr(kernels, "LONG", (16, 4))
        monkeypatch.setattr(kernels, "SHORT", (8, 1))
        monkeypatch.setattr(kernels, "FEW", 4)


def offsets_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)


def arguments(lengths, dtype):
    """reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap"""
    n = sum(lengths)
    floats = [torch.rand(n, dtype=torch.float64).to(dtype) for _ in range(5)]
    floats[2] = (torch.randn(n) / 2).to(dtype)
    return [*floats[:3], offsets_of(lengths), *floats[3:], torch.rand(n) < 0.7, torch.randn(len(lengths)).to(dtype)]


def scans(module, reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap, rho_bar=1.2, c_bar=1.1):
    return (
        *module.gae(reward, value, offsets, gamma, lam, mask, bootstrap),
        *module.vtrace(reward, value, log_ratio, offsets, gamma, lam, rho_bar, c_bar, mask, bootstrap),
        module.discounted_return(reward, offsets, gamma, mask, bootstrap),
        module.reverse_scan(reward, lam, offsets, mask, bootstrap),
    )


def to(device, given):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in given]


def wide(given):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]


@pytest.fixture
def no_reference(monkeypatch):
    """Nothing below may quietly run elsewhere."""
    for name in ("gae", "vtrace", "discounted_return", "reverse_scan"):
        monkeypatch.setattr(rl.ops.segments.reference, name, None)


def strided(x):
    return torch.stack([x, torch.full_like(x, 7)], 1)[:, 0]


CASES = [(name, dtype) for name in LENGTHS for dtype in DTYPES if dtype == "float32" or name == "ragged"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_scans_match_the_reference_in_float64(device, no_reference, name, dtype, masked):
    given = arguments(LENGTHS[name], DTYPES[dtype])
    for constant in (False, True):
        reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap = given
        if constant:
            gamma, lam, bootstrap = 0.97, torch.tensor(0.8, dtype=torch.float64), None
        mask = mask if masked else None
        expected = scans(reference, *wide([reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap]))
        if masked:
            reward, value, log_ratio = (x.masked_fill(~mask, torch.nan) for x in (reward, value, log_ratio))
        there = to(device, [strided(reward), value, strided(log_ratio), offsets, gamma, lam, mask, bootstrap])
        with rl.backend("triton"):
            got, again = scans(rl, *there), scans(rl, *there)
        for y, twice, want in zip(got, again, expected, strict=True):
            assert y.dtype == torch.float32 and torch.equal(y, twice)
            assert_accurate(y.cpu(), want)
            assert not masked or not y.cpu()[~mask].any()


@pytest.fixture
def in_parts(monkeypatch):
    """Every sequence is walked by several programs, however short."""
    from rlcore.kernels import segments_scan as kernels

    monkeypatch.setattr(kernels, "FEW", 0)
    monkeypatch.setattr(kernels, "LONG", (8, 4) if INTERPRETED else (128, 4))
    monkeypatch.setattr(kernels, "LEAST_BLOCKS", 1)
    monkeypatch.setattr(kernels, "MOST_PARTS", 8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1, pytest.param(50, marks=pytest.mark.skipif(INTERPRETED, reason="too slow"))])
def test_long_sequences_are_walked_in_parts(device, no_reference, in_parts, masked, scale):
    """Also where whole parts are masked, and where a sequence has fewer rows than parts."""
    from rlcore.kernels.segments_scan import parts_of

    lengths = [scale * n for n in (3, 90, 0, 1)]
    assert parts_of(sum(lengths), len(lengths)) == 8
    reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap = arguments(lengths, torch.float32)
    mask[scale * 20 : scale * 60] = False
    mask = mask if masked else None
    expected = scans(reference, *wide([reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap]))
    if masked:
        reward, value, log_ratio = (x.masked_fill(~mask, torch.nan) for x in (reward, value, log_ratio))
    there = to(device, [reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap])
    with rl.backend("triton"):
        got = scans(rl, *there)
        assert torch.equal(got[0], scans(rl, *there)[0])
    for y, want in zip(got, expected, strict=True):
        assert_accurate(y.cpu(), want)


def test_few_sequences_are_cut_into_parts_and_many_are_not(monkeypatch):
    from rlcore.kernels import segments_scan as kernels

    monkeypatch.setattr(kernels, "LONG", (1024, 4))
    sizes = (512 * 4096, 512), (64 * 4096, 64), (10**6, 1), (10**6, 100), (4096, 1), (0, 1)
    assert [kernels.parts_of(*size) for size in sizes] == [1, 8, 64, 5, 1, 1]


@pytest.fixture
def small_linear(monkeypatch):
    from rlcore.kernels import segments_linear as kernels

    if INTERPRETED:
        monkeypatch.setattr(kernels, "BLOCK", 8)
        monkeypatch.setattr(kernels, "FOLDED", 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [0, 1, 8, 61])
def test_the_bare_recurrence(device, small_linear, n, dtype):
    """In blocks with and without ends of sequences; what lies behind one does not matter, be it infinite."""
    from rlcore.kernels.segments_linear import linear_scan

    delta, decay = torch.randn(n, dtype=dtype), torch.rand(n, dtype=dtype)
    last = torch.zeros(n, dtype=torch.bool)
    last[[i for i in (3, 47, 48, 60) if i < n]] = True
    if n > 50:
        delta[48] = torch.inf
        decay[46] = 0.0
    got, again = (linear_scan(*to(device, (delta, decay, last))) for _ in range(2))
    assert got.dtype == dtype and torch.equal(got, again)
    assert_accurate(got.cpu(), reference.linear_scan(delta.double(), decay.double(), last))


def leaves_of(device):
    given = to(device, arguments((9, 0, 14, 1), torch.float32))
    for i in (0, 1, 2, 4, 7):
        given[i].requires_grad_()
    return given, [given[i] for i in (0, 1, 2, 4, 7)]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_through_the_bare_recurrence(device, small_linear, monkeypatch, compiled):
    given, leaves = leaves_of(device)
    with rl.backend("reference"):
        expected = scans(rl, *given)
        weights = [torch.randn_like(y) for y in expected]
        wanted = torch.autograd.grad(sum((y * w).sum() for y, w in zip(expected, weights)), leaves)
    monkeypatch.setattr(rl.ops.segments.reference, "linear_scan", None)
    function = torch.compile(scans, backend="aot_eager", fullgraph=True) if compiled else scans
    with rl.backend("triton"):
        got = function(rl, *given)
        grads = torch.autograd.grad(sum((y * w).sum() for y, w in zip(got, weights)), leaves)
    for x, want in zip((*got, *grads), (*expected, *wanted), strict=True):
        torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_padded_is_packed(device, no_reference, masked):
    B, T = 5, 21
    xs = torch.randn(3, B, T).to(device)
    mask = (torch.rand(B, T) < 0.8).to(device) if masked else None
    bootstrap = torch.randn(B).to(device)
    flat = None if mask is None else mask.reshape(-1)
    offsets = (torch.arange(B + 1) * T).to(device)
    with rl.backend("triton"):
        padded = scans(rl, *xs, None, 0.9, 0.8, mask, bootstrap, math.inf, math.inf)
        packed = scans(rl, *xs.reshape(3, -1), offsets, 0.9, 0.8, flat, bootstrap, math.inf, math.inf)
    for a, b in zip(padded, packed, strict=True):
        assert a.shape == (B, T) and torch.equal(a.reshape(-1), b)


@pytest.mark.parametrize("parts", [False, True])
def test_nan_and_infinity_stay_in_their_sequence(device, parts, request):
    """An infinite value is not met by a decay of 0 times it: the value before it alone sees it."""
    if parts:
        request.getfixturevalue("in_parts")
    reward, value = torch.zeros(12), torch.ones(12)
    reward[2], value[9] = torch.nan, torch.inf
    given = (reward, value, offsets_of((4, 4, 4)), 1.0, 0.0, torch.ones(12, dtype=torch.bool))
    with rl.backend("triton"):
        advantage = rl.gae(*to(device, given)).advantage.cpu()
    assert advantage.isnan().tolist() == [True] * 3 + [False] * 5 + reference.gae(*given).advantage[8:].isnan().tolist()


def test_gradients_and_float64_are_the_reference_s(device):
    reward, value, _, offsets, *_ = to(device, arguments((4, 3), torch.float32))
    with rl.backend("triton"):
        leaf = value.clone().requires_grad_()
        rl.gae(reward, leaf, offsets).advantage.sum().backward()
        assert leaf.grad.abs().sum() > 0
        assert rl.gae(reward.double(), value.double(), offsets).advantage.dtype == torch.float64


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
def test_no_number_length_or_place_compiles_again():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    from compile_kernels import compiling, variants

    from rlcore.kernels.segments_scan import reverse_scan, reverse_scan_kernel

    def call(lengths, start, gamma):
        n = sum(lengths)
        x = torch.rand(n + start)[start:]
        mask = torch.ones(n + start, dtype=torch.bool)[start:]
        reverse_scan("gae", (x, x), len(lengths), offsets_of(lengths), mask, None, gamma, gamma / 2)

    with compiling("sm_90"):
        counts = []
        for case in (((4096,), 0, 0.9), ((1000, 3000), 1, 1.0), ((777,), 3, 0.0), ((16,) * 5, 2, 1.0), ((1,), 0, 0.5)):
            call(*case)
            counts.append(variants(reverse_scan_kernel))
    assert counts == [1, 1, 1, 2, 2]  # one for long sequences, one for short ones


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_device():
    given = to("cuda", arguments((40, 3000, 0, 1), torch.float32))
    scans(rl, *given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        scans(rl, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_a_cuda_graph():
    given = to("cuda", arguments((40, 3000, 0, 1), torch.float32))
    eager = scans(rl, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scans(rl, *given)
    graph.replay()
    assert all(itertools.starmap(torch.equal, zip(captured, eager, strict=True)))
