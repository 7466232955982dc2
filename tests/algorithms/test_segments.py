"""Segment reductions and scoped normalization against plain loops in float64, and the properties both must have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_accurate
from oracles import segments as oracle
from rlcore.algorithms import segments as sg

LENGTHS = [(3, 47, 31, 123), (1,), (0, 5, 0, 0, 1, 2, 0), (1, 1, 1), (0,)]
REDUCTIONS = ["sum", "mean", "std", "min", "max", "count"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def offsets_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)


def reduction(name):
    return getattr(sg, f"segment_{name}")


def assert_exact_dtype(y, x):
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert y.dtype in (expected, torch.int64)


# ---- reductions


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_match_the_oracle(name, lengths, dtype, masked):
    offsets = offsets_of(lengths)
    n = int(offsets[-1])
    x = (torch.randn(n, dtype=torch.float64) * 3 + 5).to(dtype)
    mask = torch.rand(n) < 0.6 if masked else None
    ids = oracle.ids_of(offsets, n)
    expected = oracle.segment_reduce(name, x, ids, len(lengths), mask)
    y = reduction(name)(x, offsets=offsets, mask=mask)
    assert y.shape == (len(lengths),)
    assert_exact_dtype(y, x)
    assert_accurate(y, expected)
    order = torch.randperm(n)
    by_id = reduction(name)(
        x[order],
        torch.from_numpy(ids)[order],
        num_segments=len(lengths),
        mask=None if mask is None else mask[order],
    )
    assert_accurate(by_id, expected)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_padded_rows_equal_packed_rows(name):
    x, mask = torch.randn(4, 7), torch.rand(4, 7) < 0.5
    mask[2] = False
    padded = reduction(name)(x, mask=mask)
    packed = reduction(name)(x[mask], offsets=offsets_of(mask.sum(1).tolist()))
    assert torch.equal(padded, packed)
    assert torch.equal(padded, reduction(name)(x, mask=mask.to(torch.int32)))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_what_a_masked_row_holds_never_matters(name, garbage):
    x, mask, ids = torch.randn(40), torch.rand(40) < 0.5, torch.randint(0, 5, (40,))
    clean, dirty = x.clone().requires_grad_(), x.masked_fill(~mask, garbage).requires_grad_()
    a = reduction(name)(clean, ids, num_segments=5, mask=mask)
    b = reduction(name)(dirty, ids.masked_fill(~mask, -7), num_segments=5, mask=mask)
    assert torch.equal(a, b)
    if name != "count":
        a.sum().backward()
        b.sum().backward()
        assert torch.equal(clean.grad, dirty.grad)
        assert torch.equal(dirty.grad[~mask], torch.zeros(int((~mask).sum())))


@pytest.mark.parametrize("name", ["sum", "mean", "std", "min", "max"])
def test_reductions_pass_gradcheck(name):
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    offsets, mask = offsets_of((0, 5, 1, 6)), torch.rand(12) < 0.8
    mask[5] = True  # an empty segment has minimum inf, which has no finite differences
    offsets = offsets if name not in ("min", "max") else offsets[1:]
    assert torch.autograd.gradcheck(lambda x: reduction(name)(x, offsets=offsets, mask=mask), x)


def test_std_of_equal_values_has_value_and_gradient_zero():
    x = torch.full((6,), 0.1, requires_grad=True)
    y = sg.segment_std(x, offsets=offsets_of((5, 1)))
    y.sum().backward()
    assert torch.equal(y.detach(), torch.zeros(2))
    assert torch.equal(x.grad, torch.zeros(6))


def test_std_keeps_its_digits_far_from_zero():
    x = torch.tensor([4096.0, 4096.5, 4097.0, 4096.0], dtype=torch.float32)
    assert_accurate(sg.segment_std(x, offsets=offsets_of((4,))), np.std(x.double().numpy(), ddof=1, keepdims=True))


def test_number_of_segments_may_be_left_out_on_cpu():
    ids = torch.tensor([2, 0, 2, 5])
    assert torch.equal(sg.segment_sum(torch.ones(4), ids), torch.tensor([1.0, 0, 2, 0, 0, 1]))
    assert sg.segment_sum(torch.ones(4), ids, mask=torch.zeros(4)).shape == (0,)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_rank_and_topk_match_the_oracle(lengths, masked):
    offsets = offsets_of(lengths)
    n = int(offsets[-1])
    x = torch.randint(-3, 4, (n,)).float()  # with many equal values
    mask = torch.rand(n) < 0.6 if masked else None
    ids = oracle.ids_of(offsets, n)
    rank = sg.segment_rank(x, offsets=offsets, mask=mask)
    assert np.array_equal(rank.numpy(), oracle.segment_rank(x, ids, len(lengths), mask))
    for k in (1, 4):
        values, rows = sg.segment_topk(x, k, offsets=offsets, mask=mask)
        expected_values, expected_rows = oracle.segment_topk(x, k, ids, len(lengths), mask)
        assert np.array_equal(values.numpy(), expected_values)
        assert np.array_equal(rows.numpy(), expected_rows)


def test_topk_is_differentiable_and_ignores_nan_under_the_mask():
    x = torch.tensor([1.0, math.nan, 3.0, 2.0], requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    top = sg.segment_topk(x, 2, offsets=offsets_of((4,)), mask=mask)
    top.values.sum().backward()
    assert top.rows.tolist() == [[2, 3]]
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0]


# ---- group_advantage

SCOPES = [(c, s) for c in ("none", "group", "leave_one_out", "batch") for s in ("none", "group", "batch")]


@pytest.mark.parametrize("extra", ["plain", "weight", "mask", "weight+mask+residual"])
@pytest.mark.parametrize(("center", "scale"), SCOPES)
def test_group_advantage_matches_the_oracle(center, scale, extra):
    group = torch.tensor([7, 7, -3, 7, 100, -3, 7, 2**40, -3, 5, 5])  # ragged, two groups of one, any ids, any order
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        reward = torch.randn(11, dtype=torch.float64).to(dtype)
        options = {}
        if "weight" in extra:
            options["weight"] = torch.randint(1, 9, (11,))
        if "mask" in extra:
            options["mask"] = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0])
        if "residual" in extra:
            options["spread"] = "residual"
        for ddof in (0, 1):
            y = sg.group_advantage(reward, group, center, scale, ddof=ddof, **options)
            assert y.shape == reward.shape
            assert_exact_dtype(y, reward)
            assert_accurate(y, oracle.group_advantage(reward, group, center, scale, ddof, **options))


def test_rewards_that_are_alike_give_small_advantages():
    """A mean of squares minus a squared mean gave -2075 for such rewards."""
    reward = torch.tensor([0.0] + [0.95] * 7 + [0.95] * 8)
    group = torch.arange(16) // 8
    y = sg.group_advantage(reward, group)
    assert torch.equal(y[8:], torch.zeros(8))
    assert float(y.abs().max()) < 2.5
    for dtype in (torch.float32, torch.float64):
        third = torch.full((7,), 1 / 3, dtype=dtype)
        assert float(sg.group_advantage(third, torch.zeros(7, dtype=torch.int64)).abs().max()) < 1e-9


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("center", ["group", "leave_one_out"])
def test_a_group_of_one_has_advantage_zero(center, scale):
    reward = torch.tensor([3.0, 1.0, 2.0])
    y = sg.group_advantage(reward, torch.tensor([0, 1, 1]), center, scale)
    assert y[0] == 0 and y[1] == -y[2] != 0


def test_named_estimators():
    reward, group = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0, 9])
    grpo = sg.group_advantage(reward, group)
    assert torch.allclose(grpo[:4], (reward[:4] - 0.5) / (reward[:4].std() + 1e-6)) and grpo[4] == 0
    rloo = sg.group_advantage(reward, group, "leave_one_out", "none")
    assert torch.allclose(rloo, torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3, 0.0]))
    lengths = torch.tensor([10, 20, 30, 40, 5])
    opo = sg.group_advantage(reward, group, "group", "none", weight=lengths)
    assert torch.allclose(opo, reward - torch.tensor([0.5] * 4 + [1.0]))
    lite = sg.group_advantage(reward, group, "group", "batch")
    assert torch.allclose(lite[:4], (reward[:4] - 0.5) / (reward.std() + 1e-6))


def test_integer_rewards_and_grids_of_groups():
    reward, group = torch.tensor([[1, 0, 1], [0, 0, 1]]), torch.tensor([[0, 0, 0], [1, 1, 1]])
    y = sg.group_advantage(reward, group)
    assert y.shape == (2, 3) and y.dtype == torch.float32
    assert torch.equal(y.flatten(), sg.group_advantage(reward.flatten().float(), group.flatten()))


def test_batch_scopes_need_no_group():
    reward = torch.randn(9)
    assert_accurate(
        sg.group_advantage(reward, None, "batch", "batch"), oracle.group_advantage(reward, None, "batch", "batch")
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_group_advantage_invariances(data):
    n = data.draw(st.integers(1, 12))
    reward = torch.tensor(data.draw(st.lists(st.integers(-8, 8), min_size=n, max_size=n)), dtype=torch.float64)
    group = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    center = data.draw(st.sampled_from(["group", "leave_one_out", "batch"]))
    scale = data.draw(st.sampled_from(["none", "group", "batch"]))
    y = sg.group_advantage(reward, group, center, scale, eps=0.0 if scale == "none" else 1e-6)
    shift = 1000.0 * group if center != "batch" and scale != "batch" else 1000.0
    assert torch.allclose(sg.group_advantage(reward + shift, group, center, scale), y, atol=1e-9, rtol=1e-9)
    order = torch.randperm(n)
    assert torch.allclose(sg.group_advantage(reward[order], group[order], center, scale), y[order], atol=1e-12)
    renamed = torch.tensor([40, -7, 2**50, 3])[group]
    assert torch.allclose(sg.group_advantage(reward, renamed, center, scale), y, atol=1e-12)
    if scale == "none":
        assert torch.allclose(sg.group_advantage(reward * 4, group, center, scale), y * 4, atol=1e-12)
    more = torch.cat((reward, torch.tensor([math.nan], dtype=torch.float64)))
    mask = torch.arange(n + 1) < n
    padded = sg.group_advantage(more, torch.cat((group, group[:1])), center, scale, mask=mask)
    assert torch.allclose(padded[:n], y, atol=1e-12) and padded[n] == 0
    if center == "group" and scale == "none":
        for g in group.unique():
            assert abs(float(y[group == g].sum())) < 1e-9


def test_weights_count_repetitions():
    reward, group = torch.randn(6, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1])
    weight = torch.tensor([1, 3, 2, 4, 1, 1])
    row = torch.repeat_interleave(torch.arange(6), weight)
    for center, scale in (("group", "group"), ("batch", "batch"), ("none", "batch"), ("group", "none")):
        y = sg.group_advantage(reward, group, center, scale, weight=weight)
        assert torch.allclose(y[row], sg.group_advantage(reward[row], group[row], center, scale), atol=1e-12)


def test_group_advantage_passes_gradcheck():
    reward = torch.randn(6, dtype=torch.float64, requires_grad=True)
    group, mask = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([1, 1, 1, 0, 1, 1])
    for center, scale in SCOPES:
        if (center, scale) != ("none", "group"):  # there 1 / eps makes finite differences meaningless
            assert torch.autograd.gradcheck(lambda r: sg.group_advantage(r, group, center, scale, mask=mask), reward)  # noqa: B023


def test_group_metrics():
    reward = torch.tensor([1.0, 1.0, 0.0, 1.0, 5.0, math.nan, 2.0])
    group = torch.tensor([3, 3, 4, 4, 9, 9, 11])
    metrics = sg.group_metrics(reward, group, mask=~reward.isnan())
    assert {k: float(v) for k, v in metrics.items()} == {"groups": 4.0, "groups_of_one": 2.0, "groups_constant": 1.0}
    assert all(v.dim() == 0 and v.dtype == torch.float32 for v in metrics.values())


# ---- whiten


@pytest.mark.parametrize("shape", [(123,), (4, 31), (1,), (0,), (2,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whiten_matches_the_oracle(shape, dtype):
    x = (torch.randn(shape, dtype=torch.float64) + 100).to(dtype)
    mask = torch.rand(shape) < 0.7
    for m in (None, mask, torch.zeros(shape)):
        for ddof in (0, 1):
            y = sg.whiten(x, m, ddof=ddof)
            rows = x.to(y.dtype) if m is None else x[m != 0].to(y.dtype)
            plain = (rows - rows.mean()) * (rows.var(correction=ddof) + 1e-8).rsqrt() if rows.numel() > 1 else 0 * rows
            baseline = plain if m is None else torch.zeros_like(y).masked_scatter(m != 0, plain)
            assert_accurate(y, oracle.whiten(x, m, ddof=ddof), baseline)


def test_whiten_properties():
    x, mask = torch.randn(5, 9, dtype=torch.float64, requires_grad=True), torch.rand(5, 9) < 0.6
    y = sg.whiten(x, mask).detach()
    assert abs(float(y.sum())) < 1e-9 and abs(float(y[mask].std()) - 1) < 1e-6
    assert torch.allclose(sg.whiten(3 * x.detach() + 1000, mask), y, atol=1e-7)
    assert torch.equal(sg.whiten(x.masked_fill(~mask, math.nan), mask), y)
    assert torch.allclose(sg.whiten(x[mask]).detach(), y[mask], atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: sg.whiten(x, mask), x)
    assert torch.equal(sg.whiten(torch.full((4,), 0.3)), torch.zeros(4))


# ---- bad input


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sg.segment_sum([1.0], offsets=offsets_of((1,))), TypeError, "x: expected a torch.Tensor"),
        (
            lambda: sg.segment_sum(torch.ones(3, dtype=torch.int64), offsets=offsets_of((3,))),
            TypeError,
            "x: expected a",
        ),
        (lambda: sg.segment_sum(torch.ones(3)), ValueError, "offsets: needed"),
        (lambda: sg.segment_sum(torch.ones(3), offsets=offsets_of((2,))), ValueError, "offsets: expected"),
        (lambda: sg.segment_sum(torch.ones(3), offsets=torch.tensor([0, 2, 1, 3])), ValueError, "offsets: expected"),
        (
            lambda: sg.segment_sum(torch.ones(3), offsets=torch.tensor([0.0, 3.0])),
            ValueError,
            "offsets: expected int64",
        ),
        (lambda: sg.segment_sum(torch.ones(2, 3), offsets=offsets_of((3,))), ValueError, "offsets: expected with x"),
        (lambda: sg.segment_sum(torch.ones(3), torch.tensor([0, 3])), ValueError, "ids: expected shape"),
        (lambda: sg.segment_sum(torch.ones(3), torch.ones(3)), TypeError, "ids: expected integer"),
        (lambda: sg.segment_sum(torch.ones(2), torch.tensor([0, 2]), num_segments=2), ValueError, "ids: expected ids"),
        (lambda: sg.segment_sum(torch.ones(2), torch.tensor([-1, 1])), ValueError, "ids: expected ids"),
        (lambda: sg.segment_sum(torch.ones(2, 2), num_segments=2), ValueError, "num_segments: expected only"),
        (lambda: sg.segment_sum(torch.ones(3), mask=torch.ones(2)), ValueError, "mask: expected shape"),
        (lambda: sg.segment_sum(torch.ones(2, 2), mask=torch.full((2, 2), 0.5)), ValueError, "mask: expected bool"),
        (lambda: sg.segment_topk(torch.ones(2, 2), 0), ValueError, "k: expected"),
        (lambda: sg.group_advantage(torch.ones(3)), ValueError, "group: needed"),
        (lambda: sg.group_advantage(torch.ones(3), torch.ones(2, dtype=torch.int64)), ValueError, "group: expected"),
        (lambda: sg.group_advantage(torch.ones(3), torch.ones(3)), TypeError, "group: expected integer"),
        (lambda: sg.group_advantage(torch.ones(3), None, "sequence"), ValueError, "center: expected one of none"),
        (lambda: sg.group_advantage(torch.ones(3), None, "batch", "std"), ValueError, "scale: expected one of"),
        (
            lambda: sg.group_advantage(torch.ones(2), None, "batch", "batch", weight=torch.tensor([1.0, -1.0])),
            ValueError,
            "weight: expected finite",
        ),
        (lambda: sg.whiten(torch.ones(2), torch.ones(3)), ValueError, "mask: expected shape"),
        (lambda: sg.whiten(torch.ones(2, dtype=torch.complex64)), TypeError, "x: expected real"),
    ],
)
def test_bad_input_raises_and_says_what(call, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()
