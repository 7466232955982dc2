"""linear_logprob and logprob against the float64 oracle, over data, settings, dtypes, shapes, strides and chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from vocab_head_cases import (
    DATA,
    DTYPES,
    SETTINGS,
    check_forward,
    check_gradients,
    coefficients,
    gradients_of,
    make,
    set_chunk,
)

from accuracy import to_float64
from rlcore.algorithms import vocab_head_products as products
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.ops import backend
from rlcore.ops.vocab_head import linear_logprob, logprob


def run(case, entropy=True):
    """(logp, entropy, gradients) for the case's coefficients."""
    case = case.fresh()
    out = linear_logprob(case.hidden, case.weight, case.target, entropy=entropy, **case.kwargs())
    return (*out[:2], gradients_of(*out[:2], case.leaves, *coefficients(case)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("data", DATA)
def test_accuracy(data, setting, dtype, monkeypatch):
    set_chunk(monkeypatch, 123, 10, 4)
    case = make(data, setting, dtype, masked=0.2)
    logp, entropy, gradients = run(case)
    assert logp.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_forward(case, logp, entropy)
    check_gradients(case, gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("data", DATA)
def test_reference_accuracy(data, dtype):
    for setting in SETTINGS:
        case = make(data, setting, dtype, masked=0.2)
        with backend.backend("reference"):
            logp, entropy, gradients = run(case)
        check_forward(case, logp, entropy)
        check_gradients(case, gradients)


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 47), (1, 1), (5, 1)])
@pytest.mark.parametrize(("H", "V"), [(31, 123), (1, 1), (8, 2), (64, 257)])
def test_odd_shapes(shape, H, V, monkeypatch):
    set_chunk(monkeypatch, V, 7, 3)
    case = make("random", "rows", shape=shape, H=H, V=V)
    logp, entropy, gradients = run(case)
    assert logp.shape == entropy.shape == shape
    check_forward(case, logp, entropy)
    check_gradients(case, gradients)


def test_strided_inputs_and_gradients():
    """Slices of larger tensors, a transposed weight, incoming gradients with strides: no layout is assumed."""
    plain = make("random", "rows", shape=(3, 47))
    wide = torch.full((3, 49, 2 * 31), torch.nan)
    wide[:, 1:-1, ::2] = plain.hidden
    strided = replace(plain, hidden=wide[:, 1:-1, ::2], weight=plain.weight.t().contiguous().t())
    logp, entropy, gradients = run(strided)
    check_forward(plain, logp, entropy)
    check_gradients(plain, gradients)
    expanded = plain.fresh()
    out = linear_logprob(expanded.hidden, expanded.weight, expanded.target, **expanded.kwargs())
    (from_sum,) = torch.autograd.grad(out.logp.sum(), expanded.hidden)  # the gradient of a sum has stride 0
    again = plain.fresh()
    out = linear_logprob(again.hidden, again.weight, again.target, **again.kwargs())
    (from_ones,) = torch.autograd.grad(out.logp, again.hidden, torch.ones(3, 47))
    assert torch.equal(from_sum, from_ones)


def test_logp_alone_entropy_alone_and_neither(monkeypatch):
    set_chunk(monkeypatch, 123, 10)
    case = make("random", "rows", torch.float64)
    _, _, gradients = run(case, entropy=False)
    check_gradients(case, gradients, with_entropy=False)
    _, d_entropy = coefficients(case)
    case = case.fresh()
    out = linear_logprob(case.hidden, case.weight, case.target, entropy=True, **case.kwargs())
    check_gradients(case, torch.autograd.grad(out.entropy, case.leaves, d_entropy), with_logp=False)
    assert linear_logprob(case.hidden, case.weight, case.target).entropy is None


def test_entropy_gradient_is_never_dropped():
    """A loss on the entropy alone moves every input."""
    case = make().fresh()
    out = linear_logprob(case.hidden, case.weight, case.target, entropy=True)
    for x in torch.autograd.grad(out.entropy.sum(), case.leaves):
        assert x.abs().max() > 1e-3


def test_entropy_that_was_not_asked_for_takes_no_gradient():
    case = make().fresh()
    assert linear_logprob(case.hidden, case.weight, case.target).logp.requires_grad
    with torch.no_grad():
        assert not linear_logprob(case.hidden, case.weight, case.target, entropy=True).entropy.requires_grad


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
def test_partial_gradients(needs):
    """Each subset of inputs gets the same gradient as all of them together."""
    case = make("random", "bias")
    _, _, everything = run(case)
    for x, need in zip(case.leaves, needs, strict=True):
        x.requires_grad_(bool(need))
    out = linear_logprob(case.hidden, case.weight, case.target, entropy=True, **case.kwargs())
    wanted = [x for x in case.leaves if x.requires_grad]
    found = gradients_of(*out[:2], wanted, *coefficients(case))
    expected = [x for x, need in zip(everything, needs, strict=True) if need]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_head(setting, dtype, monkeypatch):
    """No gradient for weight and bias: d logp / d hidden comes from the forward pass."""
    set_chunk(monkeypatch, 123, 10, 4)
    case = make("peaked", setting, dtype, masked=0.2)
    case.hidden.requires_grad_()
    out = linear_logprob(case.hidden, case.weight, case.target, **case.kwargs())
    d_logp, _ = coefficients(case)
    calls = count_calls(monkeypatch, "project")
    first = torch.autograd.grad(out.logp, case.hidden, d_logp, retain_graph=True)[0]
    second = torch.autograd.grad(out.logp, case.hidden, d_logp)[0]
    assert calls == [] and torch.equal(first, second)  # nothing is recomputed, and it may run again
    check_forward(case, out.logp, None)
    check_gradients(replace(case, hidden=case.hidden.detach()), [first], with_entropy=False)


def count_calls(monkeypatch, name):
    calls, original = [], getattr(products, name)
    monkeypatch.setattr(products, name, lambda *a: (calls.append(a), original(*a))[1])
    return calls


@given(
    rows=st.integers(1, 60), block=st.integers(1, 9), masked=st.sampled_from([0.0, 0.5, 0.95]), seed=st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_chunk_size_changes_nothing(rows, block, masked, seed):
    case = make("random", "rows", torch.float64, masked=masked, seed=seed)
    expected = run(case)
    with pytest.MonkeyPatch.context() as patch:
        set_chunk(patch, 123, rows, block, itemsize=8)
        found = run(case)
    for x, y in zip(flatten(found), flatten(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def flatten(result):
    return [*result[:2], *result[2]]


@given(seed=st.integers(0, 99), masked=st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=20, deadline=None)
def test_packed_equals_padded_and_masks_hide_everything(seed, masked):
    """[B, T] with a mask full of NaN, inf and -100 equals the kept rows by themselves, to the last bit or nearly."""
    case = make("random", "rows", torch.float64, shape=(3, 17), masked=masked, seed=seed)
    keep = case.mask
    packed = replace(
        case, hidden=case.hidden[keep], target=case.target[keep], temperature=case.temperature[keep], mask=None
    )
    poisoned = replace(
        case, hidden=case.hidden.clone(), target=case.target.clone(), temperature=case.temperature.clone()
    )
    poisoned.hidden[~keep] = torch.nan
    poisoned.hidden[0, :][~keep[0]] = torch.inf
    poisoned.target[~keep] = -100
    poisoned.temperature[~keep] = torch.nan
    d_logp, d_entropy = coefficients(case)
    results = []
    for x, d in ((packed, (d_logp[keep], d_entropy[keep])), (poisoned, (d_logp, d_entropy))):
        x = x.fresh()
        d = [y.masked_fill(~keep, torch.nan) if y.shape == keep.shape else y for y in d]
        out = linear_logprob(x.hidden, x.weight, x.target, entropy=True, **x.kwargs())
        d_hidden, *rest = gradients_of(*out[:2], x.leaves, *d)
        if x.mask is not None:
            assert not out.logp[~keep].any() and not out.entropy[~keep].any() and not d_hidden[~keep].any()
            out, d_hidden = (out.logp[keep], out.entropy[keep]), d_hidden[keep]
        results.append([*out[:2], d_hidden, *rest])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero_one", [torch.bool, torch.int64, torch.float32])
def test_mask_dtypes_and_all_masked(zero_one):
    case = make("random", "bias", masked=0.3)
    expected = run(case)
    found = run(replace(case, mask=case.mask.to(zero_one)))
    assert all(torch.equal(x, y) for x, y in zip(flatten(found), flatten(expected), strict=True))
    nothing = run(replace(case, mask=torch.zeros_like(case.mask, dtype=zero_one), hidden=case.hidden * torch.nan))
    assert not any(x.any() for x in flatten(nothing))


def test_no_rows():
    """N = 0: empty outputs, zero gradients."""
    for mode in ("recompute", "frozen", "reference"):
        hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=mode != "frozen")
        target = torch.zeros(0, dtype=torch.int64)
        if mode == "reference":
            with backend.backend("reference"):
                out = linear_logprob(hidden, weight, target, entropy=True)
        else:
            out = linear_logprob(hidden, weight, target, entropy=mode == "recompute")
        assert out.logp.shape == (0,)
        out.logp.sum().backward()
        assert hidden.grad.shape == (0, 8)
        assert weight.grad is None or not weight.grad.any()


def test_rows_that_never_reach_a_gemm(monkeypatch):
    """Masked rows are left out of the forward product, rows without a gradient out of the backward ones."""
    case = make(masked=0.5).fresh()
    kept = int(case.mask.sum())
    calls = count_calls(monkeypatch, "project")
    out = linear_logprob(case.hidden, case.weight, case.target, entropy=True, mask=case.mask)
    assert sum(a[0].shape[0] for a in calls) == kept
    calls.clear()
    back = count_calls(monkeypatch, "project_back")
    d_logp, d_entropy = coefficients(case)
    zero = torch.rand(47) < 0.5
    torch.autograd.grad(
        (out.logp, out.entropy), case.leaves, (d_logp.masked_fill(zero, 0), d_entropy.masked_fill(zero, 0))
    )
    moving = int((case.mask & ~zero).sum())
    assert sum(a[0].shape[0] for a in calls) == sum(a[0].shape[0] for a in back) == moving < kept


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("setting", ["plain", "rows", "softcap"])
def test_gradcheck(setting, entropy, monkeypatch):
    set_chunk(monkeypatch, 7, 2, 1, itemsize=8)
    case = make("random", setting, torch.float64, shape=(5,), H=3, V=7, masked=0.2).fresh()

    def f(*leaves):
        bias = leaves[2] if len(leaves) == 3 else None
        kwargs = case.numbers()
        out = linear_logprob(leaves[0], leaves[1], case.target, bias, entropy=entropy, mask=case.mask, **kwargs)
        return (out.logp, out.entropy) if entropy else out.logp

    assert torch.autograd.gradcheck(f, case.leaves)
    with backend.backend("reference"):
        assert torch.autograd.gradcheck(f, case.leaves)
        assert torch.autograd.gradgradcheck(f, case.leaves)


def test_frozen_gradcheck():
    case = make("random", "softcap", torch.float64, shape=(5,), H=3, V=7)
    f = lambda h: linear_logprob(h, case.weight, case.target, softcap=5.0).logp  # noqa: E731
    assert torch.autograd.gradcheck(f, case.hidden.requires_grad_())


def test_double_backward_points_to_the_reference():
    case = make().fresh()
    for out in (
        linear_logprob(case.hidden, case.weight, case.target),
        linear_logprob(case.hidden, case.weight.detach(), case.target),
        logprob(case.hidden @ case.weight.t(), case.target),
    ):
        with pytest.raises(RuntimeError, match=r'rl\.backend\("reference"\)'):
            torch.autograd.grad(out.logp.sum(), case.hidden, create_graph=True)


def test_recompute_may_run_backward_again():
    case = make().fresh()
    out = linear_logprob(case.hidden, case.weight, case.target)
    first = torch.autograd.grad(out.logp.sum(), case.leaves, retain_graph=True)
    second = torch.autograd.grad(out.logp.sum(), case.leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_linear(dtype):
    """Inside a region float32 inputs count as their rounded copies; mixed dtypes are fine; gradients keep theirs."""
    case = make("random", "bias")
    rounded = replace(case, hidden=case.hidden.to(dtype), weight=case.weight.to(dtype), bias=case.bias.to(dtype))
    mixed = replace(case, hidden=rounded.hidden).fresh()
    outside = rounded.fresh()
    expected = linear_logprob(outside.hidden, outside.weight, outside.target, entropy=True, **outside.kwargs())
    for reference in (False, True):
        with torch.autocast("cpu", dtype=dtype):
            linear = F.linear(mixed.hidden, mixed.weight, mixed.bias)
            assert linear.dtype == dtype
            if reference:
                with backend.backend("reference"):
                    out = linear_logprob(mixed.hidden, mixed.weight, mixed.target, entropy=True, **mixed.kwargs())
            else:
                out = linear_logprob(mixed.hidden, mixed.weight, mixed.target, entropy=True, **mixed.kwargs())
        assert out.logp.dtype == torch.float32
        torch.testing.assert_close(out.logp, expected.logp, rtol=1e-5, atol=1e-5)
        found = gradients_of(*out[:2], mixed.leaves, *coefficients(case))
        wanted = gradients_of(*expected[:2], outside.leaves, *coefficients(case))
        for x, y, leaf in zip(found, wanted, mixed.leaves, strict=True):
            assert x.dtype == leaf.dtype
            torch.testing.assert_close(x.double(), y.double(), rtol=0.02, atol=0.02)
        wanted = None
        expected = linear_logprob(outside.hidden, outside.weight, outside.target, entropy=True, **outside.kwargs())
    inside = make(dtype=torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert linear_logprob(inside.hidden, inside.weight, inside.target).logp.dtype == torch.float64


def test_d_weight_is_not_rounded_between_chunks(monkeypatch):
    """Many chunks, low precision: the error of d weight does not grow with their number."""
    case = make("random", "plain", torch.bfloat16, shape=(400,), H=8, V=16)
    errors = []
    for rows in (400, 4):
        set_chunk(monkeypatch, 16, rows)
        _, _, (_, d_weight) = run(case)
        d = coefficients(case)
        expected = case.oracle().backward(*(to_float64(x) for x in d))[1]
        errors.append(abs(to_float64(d_weight) - expected).max())
    assert errors[1] <= 1.01 * errors[0]


@pytest.mark.parametrize("bound", ["WEIGHT_TILE_BYTES", "GRADIENT_SLICE_BYTES"])
def test_low_precision_weights_are_upcast_and_summed_by_slices(monkeypatch, bound):
    case = make("random", "bias", torch.bfloat16)
    expected = run(case)
    monkeypatch.setattr(products, bound, 31 * 4 * 10)
    found = run(case)
    for x, y in zip(flatten(found), flatten(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_rows_that_stay_on_a_gpu_are_neutral(monkeypatch):
    """Where dropping rows would need a sync they stay in the product as zeros: the same numbers."""
    case = make("random", "rows", torch.float64, masked=0.5)
    case.hidden[~case.mask], case.target[~case.mask], case.temperature[~case.mask] = torch.nan, -100, torch.nan
    expected = run(case)
    frozen = linear_logprob(case.hidden.requires_grad_(), case.weight, case.target, **case.kwargs()).logp
    slope = torch.autograd.grad(frozen.sum(), case.hidden)[0]
    monkeypatch.setattr(selection, "compacts", lambda device: False)
    for x, y in zip(flatten(run(case)), flatten(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
    frozen = linear_logprob(case.hidden, case.weight, case.target, **case.kwargs()).logp
    torch.testing.assert_close(torch.autograd.grad(frozen.sum(), case.hidden)[0], slope, rtol=1e-11, atol=1e-12)
