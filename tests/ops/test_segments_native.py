"""The segments family in C++ against the float64 oracles: odd shapes, strides, dtypes, thread counts, masked NaN."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import rlcore as rl
from accuracy import assert_accurate
from oracles import segments as oracle
from rlcore.algorithms import segments as reference
from rlcore.ops import backend
from rlcore.ops import segments_native as native

pytestmark = pytest.mark.skipif(backend.native() is None, reason="rlcore._native is not built")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = ((3, 47, 31, 123), (0, 5, 0, 1, 0), (0,), (1,), (1, 1, 1, 1, 1, 1), (700, 3))


def offsets_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)


@pytest.fixture
def named():
    with rl.backend("native"):
        yield


@pytest.fixture
def no_reference(monkeypatch):
    """Nothing below may quietly run elsewhere."""
    for name in ("segment_sum", "segment_mean", "segment_std", "segment_min", "segment_max", "segment_count",
                 "segment_rank", "segment_topk", "group_advantage", "gae", "vtrace", "discounted_return",
                 "reverse_scan"):  # fmt: skip
        monkeypatch.setattr(rl.ops.segments.reference, name, None)


def strided(x):
    return torch.stack([x, torch.full_like(x, 7)], 1)[:, 0]


def dirty(x, mask):
    return x.masked_fill(~mask, torch.nan)


# ---- reductions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_reductions_match_the_oracle(named, no_reference, dtype, lengths):
    offsets = offsets_of(lengths)
    n, S = int(offsets[-1]), len(lengths)
    x, keep = torch.randn(n, dtype=torch.float64).to(dtype), torch.rand(n) < 0.6
    by_offsets = oracle.ids_of(offsets, n)
    mixed = torch.randint(0, S, (n,))
    kinds = ((by_offsets, {"offsets": offsets}), (mixed.numpy(), {"ids": mixed, "num_segments": S}))
    for mask, (ids, given) in itertools.product((None, keep, keep.int()), kinds):
        y = strided(x if mask is None else dirty(x, keep))
        for name in ("mean", "std", "min", "max", "count", *(["sum"] if "ids" in given else [])):
            got = getattr(rl, f"segment_{name}")(y, mask=mask, **given)
            expected = oracle.segment_reduce(name, x, ids, S, mask)
            assert got.dtype == (torch.int64 if name == "count" else reference.result_dtype(x))
            assert_accurate(got, expected, name=name)
        assert_accurate(rl.segment_std(y, mask=mask, ddof=0, **given), oracle.segment_reduce("std", x, ids, S, mask, 0))
        rank = rl.segment_rank(y, mask=mask, **given)
        assert rank.tolist() == oracle.segment_rank(x, ids, S, mask).tolist()
        for k in (1, 2, 9):
            top = rl.segment_topk(y, k, mask=mask, **given)
            for s, i in itertools.product(range(S), range(k)):
                row = [j for j in range(n) if ids[j] == s and rank[j] == i]
                assert top.rows[s, i] == (row[0] if row else -1)
                assert top.values[s, i] == (x[row[0]].to(top.values.dtype) if row else -torch.inf)


def test_padded_rows_are_segments(named, no_reference):
    x, mask = torch.randn(5, 7), torch.rand(5, 7) < 0.5
    offsets = torch.arange(6) * 7
    for name in ("sum", "mean", "std", "min", "max", "count", "rank"):
        function = getattr(rl, f"segment_{name}")
        flat = function(x.reshape(-1), offsets=offsets, mask=mask.reshape(-1))
        assert torch.equal(function(dirty(x, mask), mask=mask).reshape(-1), flat), name
        assert torch.equal(function(x.T.contiguous().T, mask=mask).reshape(-1), flat), name


def test_nan_and_infinity_are_torch_s(named):
    x = torch.tensor([1.0, torch.nan, 2.0, torch.inf, 1.0, -torch.inf, torch.inf, 0.0, -0.0])
    offsets = torch.tensor([0, 3, 5, 7, 9])
    for dtype, name in itertools.product((torch.float32, torch.float64), ("mean", "std", "min", "max")):
        function = f"segment_{name}"
        got = getattr(rl, function)(x.to(dtype), offsets=offsets)
        want = getattr(reference, function)(x.to(dtype), offsets=offsets)
        assert torch.equal(got.nan_to_num(nan=5e5), want.nan_to_num(nan=5e5)), (name, got, want)
    assert torch.equal(rl.segment_rank(x, offsets=offsets), reference.segment_rank(x, offsets=offsets))


def test_a_wrong_argument_raises_as_in_the_reference():
    x, ids = torch.ones(4), torch.tensor([0, 1, 2, 5])
    for name in ("sum", "mean", "std", "min", "max", "count", "rank"):
        function = getattr(rl, f"segment_{name}")
        for error, match, arguments in (
            (ValueError, "ids", {"ids": ids, "num_segments": 3}),
            (ValueError, "ids", {"ids": -ids}),
            (ValueError, "ids: expected ids or offsets", {"ids": ids, "offsets": offsets_of((4,))}),
            (ValueError, "offsets", {"offsets": offsets_of((3,))}),
            (ValueError, "num_segments", {"num_segments": 3, "offsets": offsets_of((4,))}),
            (ValueError, "mask", {"mask": torch.ones(3), "offsets": offsets_of((4,))}),
            (ValueError, "offsets: needed", {}),
        ):
            with pytest.raises(error, match=match):
                function(x, **arguments)
    with pytest.raises(ValueError, match="k: expected"):
        rl.segment_topk(x, 0, offsets=offsets_of((4,)))


# ---- advantages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(("center", "scale", "spread"),
                         [*itertools.product(reference.CENTERS, reference.SCALES, reference.SPREADS)])  # fmt: skip
def test_group_advantage_equals_the_reference(dtype, center, scale, spread):
    for n, low, high in ((1, 0, 1), (31, -3, 4), (40, -(2**62), 2**62)):
        group = torch.randint(low, high, (n,))
        if high > 4:
            group = group[torch.randint(0, 9, (n,))]
        reward = torch.randint(-5, 6, (n,)).to(dtype) if dtype == torch.int64 else torch.randn(n).to(dtype)
        weight, mask = torch.rand(n) + 0.1, torch.rand(n) < 0.7
        bad = reward if dtype == torch.int64 else dirty(reward, mask)
        for w, m, ddof in itertools.product((None, weight), (None, mask), (0, 1)):
            options = {"center": center, "scale": scale, "spread": spread, "ddof": ddof, "weight": w, "mask": m}
            got = rl.group_advantage(reward if m is None else bad, group, **options)
            want = reference.group_advantage(reward.double(), group, **options)
            assert got.dtype == reference.result_dtype(reward)
            tolerance = 1e-10 if dtype == torch.float64 else 3e-7
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_group_advantage_shapes_errors_and_gradients():
    reward, group = torch.randn(6, 8), torch.arange(6)[:, None].expand(6, 8)
    got = rl.group_advantage(reward.T, group.T)
    torch.testing.assert_close(got, reference.group_advantage(reward.T, group.T))
    for error, match, arguments in (
        (ValueError, "center", (reward, group, "nowhere")),
        (ValueError, "scale", (reward, group, "group", "wide")),
        (ValueError, "group: needed", (reward,)),
        (ValueError, "group", (reward, group[0])),
        (TypeError, "group", (reward, group.float())),
        (ValueError, "weight", (reward, group, "group", "group", 1, 1e-6, -torch.ones(6, 8))),
    ):
        with pytest.raises(error, match=match):
            rl.group_advantage(*arguments)
    leaf = reward.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: rl.group_advantage(r, group), leaf)
    empty = rl.group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0,)


# ---- scans


def arguments(lengths, dtype):
    offsets = offsets_of(lengths)
    n = int(offsets[-1])
    floats = [torch.rand(n, dtype=torch.float64).to(dtype) for _ in range(5)]
    return [*floats[:3], offsets, *floats[3:], torch.rand(n) < 0.7, torch.randn(len(lengths)).to(dtype)]


def scans(module, reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap, **more):
    return (
        *module.gae(reward, value, offsets, gamma, lam, mask, bootstrap, **more),
        *module.vtrace(reward, value, log_ratio, offsets, gamma, lam, 1.2, 1.1, mask, bootstrap, **more),
        module.discounted_return(reward, offsets, gamma, mask, bootstrap, **more),
        module.reverse_scan(reward, lam, offsets, mask, bootstrap, **more),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_scans_match_the_reference_in_float64(named, no_reference, dtype, lengths):
    given = arguments(lengths, dtype)
    for options in itertools.product((0, 1), (0, 1), (0, 1)):
        use_mask, use_bootstrap, constant = options
        reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap = given
        if constant:
            gamma, lam = 0.97, torch.tensor(0.8, dtype=torch.float64)
        mask, bootstrap = mask if use_mask else None, bootstrap if use_bootstrap else None
        wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for x in (reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap)]  # fmt: skip
        expected = scans(rl.algorithms.segments_scan, *wide)
        if use_mask:
            reward, value, log_ratio = (dirty(x, mask) for x in (reward, value, log_ratio))
        got = scans(rl, strided(reward), value, strided(log_ratio), offsets, gamma, lam, mask, bootstrap)
        for y, want in zip(got, expected, strict=True):
            assert y.dtype == reference.result_dtype(reward)
            assert_accurate(y, want)
            if use_mask:
                assert not y[~mask].any()


def test_gae_and_vtrace_match_the_oracle_padded(named, no_reference):
    B, T = 7, 13
    reward, value, log_ratio = torch.randn(3, B, T)
    mask, bootstrap = torch.rand(B, T) < 0.8, torch.randn(B)
    for m in (None, mask):
        packed = [x.reshape(-1) for x in (reward, value, log_ratio)]
        flat = None if m is None else m.reshape(-1)
        offsets = torch.arange(B + 1) * T
        got = rl.gae(reward, value, None, 0.9, 0.8, m, bootstrap)
        same = rl.gae(packed[0], packed[1], offsets, 0.9, 0.8, flat, bootstrap)
        assert got.advantage.shape == (B, T)
        assert all(torch.equal(a.reshape(-1), b) for a, b in zip(got, same, strict=True))
        want = rl.algorithms.segments_scan.gae(packed[0].double(), packed[1].double(), offsets, 0.9, 0.8, flat,
                                               bootstrap.double())  # fmt: skip
        for y, x in zip(same, want, strict=True):
            assert_accurate(y, x)
        assert all(
            torch.equal(a.reshape(-1), b)
            for a, b in zip(
                rl.vtrace(reward, value, log_ratio, mask=m, bootstrap=bootstrap),
                rl.vtrace(*packed, offsets, mask=flat, bootstrap=bootstrap),
                strict=True,
            )
        )


def test_the_default_backend_keeps_float64_to_the_last_bit():
    given = arguments((4, 0, 5, 30), torch.float64)
    for y, expected in zip(scans(rl, *given), scans(reference, *given), strict=True):
        assert torch.equal(y, expected)


@pytest.mark.parametrize("named_backend", [None, "native"])
def test_gradients_flow_through_the_native_scan(named_backend):
    given = arguments((4, 0, 5, 1, 3), torch.float64)
    leaves = [x.requires_grad_() for x in given if x.is_floating_point()]

    def function(*_):
        return scans(rl, *given)

    if named_backend is None:
        assert torch.autograd.gradcheck(function, leaves, atol=1e-4)
        return
    with rl.backend(named_backend):
        assert torch.autograd.gradcheck(function, leaves, atol=1e-4)
    single = [x.detach().float().requires_grad_() if x.is_floating_point() else x for x in given]
    got = torch.autograd.grad(sum(y.sum() for y in scans(rl, *single)), [x for x in single if x.is_floating_point()])
    want = torch.autograd.grad(sum(y.sum() for y in scans(reference, *given)), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_scans_raise_as_the_reference():
    x, offsets = torch.ones(4), offsets_of((4,))
    for error, match, call in (
        (ValueError, "value", lambda: rl.gae(x, x[:2], offsets)),
        (ValueError, "offsets", lambda: rl.gae(x, x)),
        (ValueError, "offsets", lambda: rl.gae(x, x, offsets_of((3,)))),
        (ValueError, "bootstrap", lambda: rl.gae(x, x, offsets, bootstrap=torch.ones(2))),
        (ValueError, "mask", lambda: rl.gae(x, x, offsets, mask=torch.ones(3))),
        (ValueError, "mask", lambda: rl.gae(x, x, offsets, mask=2 * x)),
        (ValueError, "gamma", lambda: rl.gae(x, x, offsets, gamma=torch.ones(3))),
        (TypeError, "lam", lambda: rl.gae(x, x, offsets, lam="0.9")),
        (TypeError, "lam", lambda: rl.gae(x, x, offsets, lam=True)),
        (ValueError, "rho_bar", lambda: rl.vtrace(x, x, x, offsets, rho_bar=0.0)),
        (TypeError, "reward", lambda: rl.gae([1.0], x, offsets)),
    ):
        with pytest.raises(error, match=match):
            call()


# ---- ids in rising order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorted_ids_give_the_bits_of_ids(dtype, monkeypatch):
    """Empty segments before, between and behind; the walk by ids is what both must equal."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.randint(2, 90, (70_000,), generator=generator) * 2).sort().values
    x = torch.randn(70_000, generator=generator, dtype=dtype)
    found = []
    for least in (1, 1 << 60):
        monkeypatch.setattr(native, "SORTED_FROM", least)
        rows = native.rows_of(x, ids, None, 200, None)
        assert (rows.ids is None) == (least == 1)
        found.append([getattr(rl, f"segment_{name}")(x, ids, num_segments=200)
                      for name in ("sum", "mean", "std", "min", "max", "count", "rank")])  # fmt: skip
    for by_offsets, by_ids in zip(*found, strict=True):
        assert torch.equal(by_offsets, by_ids)
    monkeypatch.setattr(native, "SORTED_FROM", 1)
    for first, last in ((ids[-1], ids[-1]), (ids[0], ids[0])):  # one id out of order, at either end
        swapped = torch.cat([first[None], ids[1:-1], last[None]])
        assert native.rows_of(x, swapped, None, 200, None).ids is not None


# ---- threads and instruction sets


def everything(n=120_000):
    generator = torch.Generator().manual_seed(3)
    cuts = torch.randint(0, n + 1, (400,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([n])])
    x, value, log_ratio = torch.randn(3, n, generator=generator)
    mask = torch.rand(n, generator=generator) < 0.9
    ids = torch.randint(0, 50, (n,), generator=generator)
    for m in (None, mask):
        yield from scans(rl, x, value, log_ratio, offsets, 0.99, 0.95, m, None)
        for name in ("sum", "mean", "std", "min", "max", "count", "rank"):
            yield getattr(rl, f"segment_{name}")(x, offsets=offsets, mask=m)
            yield getattr(rl, f"segment_{name}")(x, ids, mask=m)
        yield from rl.segment_topk(x, 3, offsets=offsets, mask=m)
        yield rl.group_advantage(x, ids, mask=m)


def test_any_number_of_threads_gives_the_same_bits():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(list(everything()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    if os.environ.get("RLCORE_ISA") is not None:
        pytest.skip("runs inside such a run")
    chosen = "oracle or group_advantage_equals or scans_match or threads"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-k", chosen, "-p", "no:cacheprovider"],
        env={**os.environ, "RLCORE_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_native_functions_refuse_bad_addresses():
    module = backend.native()
    x, offsets, out = torch.ones(4), offsets_of((4,)), torch.zeros(4)
    good = (offsets.data_ptr(), 1, 4, 0, 0, out.data_ptr(), "float32", 1)
    module.reverse_scan(x.data_ptr(), 0, 0.5, *good)
    assert out.tolist() == [1.875, 1.75, 1.5, 1.0]
    for place, value, match in ((0, 0, "offsets: null"), (2, 5, "offsets"), (6, "int8", "dtype"), (7, 0, "threads"),
                                (5, 0, "out: null"), (5, out.data_ptr() + 1, "out: address")):  # fmt: skip
        changed = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(ValueError, match=match):
            module.reverse_scan(x.data_ptr(), 0, 0.5, *changed)
    assert native.runs(x) and not native.runs(x.requires_grad_())
