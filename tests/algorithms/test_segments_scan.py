"""GAE, returns, V-trace and the reverse scan against plain loops, and the properties they must have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_accurate
from oracles import segments as oracle
from rlcore.algorithms import segments as sg
from rlcore.layout import per_token

LENGTHS = [(3, 47, 31, 123), (1,), (0, 5, 0, 0, 1, 2, 0), (1, 1, 1), (64,), (0,), (2, 1, 4, 7, 8, 9)]


def offsets_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)


def coefficients(kind, n):
    """(gamma, lam) as floats, 0-d tensors, or one number per row."""
    return {
        "one": (1.0, 1.0),
        "float": (0.99, 0.95),
        "zero": (0.9, 0.0),
        "scalar tensor": (torch.tensor(0.97), torch.tensor(0.9, dtype=torch.float64)),
        "per row": (torch.rand(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)),
    }[kind]


def problem(lengths, masked, bootstrapped, dtype=torch.float64):
    offsets = offsets_of(lengths)
    n = int(offsets[-1])
    reward, value, log_ratio = (torch.randn(n, dtype=torch.float64).to(dtype) for _ in range(3))
    mask = torch.rand(n) < 0.6 if masked else None
    bootstrap = torch.randn(len(lengths), dtype=torch.float64).to(dtype) if bootstrapped else None
    return offsets, reward, value, log_ratio, mask, bootstrap


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["one", "float", "zero", "scalar tensor", "per row"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_scans_match_the_oracles(lengths, kind, masked, bootstrapped, dtype):
    offsets, reward, value, log_ratio, mask, bootstrap = problem(lengths, masked, bootstrapped, dtype)
    gamma, lam = coefficients(kind, len(reward))
    options = {"mask": mask, "bootstrap": bootstrap}
    pairs = [
        (
            sg.gae(reward, value, offsets, gamma, lam, **options),
            oracle.gae(reward, value, offsets, gamma, lam, **options),
        ),
        (
            sg.vtrace(reward, value, log_ratio, offsets, gamma, lam, 1.5, 0.8, **options),
            oracle.vtrace(reward, value, log_ratio, offsets, gamma, lam, 1.5, 0.8, **options),
        ),
        (
            [sg.discounted_return(reward, offsets, gamma, **options)],
            [oracle.discounted_return(reward, offsets, gamma, **options)],
        ),
        ([sg.reverse_scan(reward, lam, offsets, **options)], [oracle.reverse_scan(reward, lam, offsets, **options)]),
    ]
    for results, expected in pairs:
        for y, reference in zip(results, expected, strict=True):
            assert y.shape == reward.shape
            assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_accurate(y, reference)
            if mask is not None:
                assert torch.equal(y[~mask], torch.zeros(int((~mask).sum()), dtype=y.dtype))


def every_scan(reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap):
    return [
        *sg.gae(reward, value, offsets, gamma, lam, mask, bootstrap),
        *sg.vtrace(reward, value, log_ratio, offsets, gamma, lam, 1.2, 1.1, mask, bootstrap),
        sg.discounted_return(reward, offsets, gamma, mask, bootstrap),
        sg.reverse_scan(reward, lam, offsets, mask, bootstrap),
    ]


def test_packed_equals_padded():
    B, T = 5, 9
    reward, value, log_ratio, gamma, lam = (torch.rand(B, T) for _ in range(5))
    mask = torch.rand(B, T) < 0.7
    mask[3], mask[:, 6:] = False, False
    bootstrap = torch.randn(B)
    padded = every_scan(reward, value, log_ratio, None, gamma, lam, mask, bootstrap)
    flat = every_scan(
        *(x.flatten() for x in (reward, value, log_ratio)),
        offsets_of([T] * B),
        gamma.flatten(),
        lam.flatten(),
        mask.flatten(),
        bootstrap,
    )
    # Removing masked rows altogether is the same as masking them.
    packed = every_scan(
        *(x[mask] for x in (reward, value, log_ratio)),
        offsets_of(mask.sum(1).tolist()),
        gamma[mask],
        lam[mask],
        None,
        bootstrap,
    )
    for a, b, c in zip(padded, flat, packed, strict=True):
        assert a.shape == (B, T)
        assert torch.equal(a.flatten(), b)
        assert_accurate(a[mask], c.double())


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_what_a_masked_row_holds_never_matters(garbage):
    offsets, reward, value, log_ratio, mask, bootstrap = problem((4, 9, 1, 6), True, True)
    mask[4:13] = False  # a wholly masked sequence: its bootstrap is not read either
    gamma, lam = torch.rand(20, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    clean = [x.clone().requires_grad_() for x in (reward, value, log_ratio, gamma, lam)]
    dirty = [x.masked_fill(~mask, garbage).requires_grad_() for x in (reward, value, log_ratio, gamma, lam)]
    bad_bootstrap = bootstrap.clone()
    bad_bootstrap[1] = garbage
    for x, y in zip(
        every_scan(*clean[:3], offsets, *clean[3:], mask, bootstrap),
        every_scan(*dirty[:3], offsets, *dirty[3:], mask.int(), bad_bootstrap),
        strict=True,
    ):
        assert torch.equal(x, y)
        grads = [
            torch.autograd.grad(z.sum(), i, allow_unused=True, retain_graph=True) for z, i in ((x, clean), (y, dirty))
        ]
        for g, h in zip(*grads, strict=True):
            assert (g is None and h is None) or torch.equal(g, h)
            assert h is None or torch.equal(h[~mask], torch.zeros(int((~mask).sum()), dtype=h.dtype))


def test_nan_stays_in_its_sequence():
    offsets, reward, value, log_ratio, _, bootstrap = problem((4, 9, 3, 6), False, True)
    expected = every_scan(reward, value, log_ratio, offsets, 0.9, 0.8, None, bootstrap)
    reward[8] = value[10] = log_ratio[9] = math.nan
    others = torch.ones(22, dtype=torch.bool)
    others[4:13] = False
    for x, y in zip(every_scan(reward, value, log_ratio, offsets, 0.9, 0.8, None, bootstrap), expected, strict=True):
        assert x[4:9].isnan().any()
        assert torch.equal(x[others], y[others])


def test_scans_pass_gradcheck():
    offsets, reward, value, log_ratio, mask, bootstrap = problem((4, 0, 5, 1, 3), True, True)
    gamma, lam = torch.rand(13, dtype=torch.float64), torch.rand(13, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (reward, value, log_ratio, gamma, lam, bootstrap)]

    def scans(reward, value, log_ratio, gamma, lam, bootstrap):
        return tuple(every_scan(reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap))

    assert torch.autograd.gradcheck(scans, inputs)
    # A decay of exactly 0 still has a gradient: dy[i] / d decay[i] = y[i+1].
    decay = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    delta = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    sg.reverse_scan(delta, decay, offsets_of((4,))).sum().backward()
    assert decay.grad.tolist() == [2.0, 3.0, 4.0, 0.0]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_properties(data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    n, S = sum(lengths), len(lengths)
    numbers = st.integers(-20, 20)
    draw = lambda size: torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size))).double()  # noqa: E731
    reward, value, bootstrap, offsets = draw(n), draw(n), draw(S), offsets_of(lengths)
    gamma, lam = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    base = sg.gae(reward, value, offsets, gamma, lam, mask, bootstrap)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)  # noqa: E731

    # Linear in rewards, values and bootstrap together.
    scaled = sg.gae(-3 * reward, -3 * value, offsets, gamma, lam, mask, -3 * bootstrap)
    close(scaled.advantage, -3 * base.advantage)
    # Shaping by a potential: adding c to every value, and c (1 - gamma) to every reward, changes no advantage.
    shifted = sg.gae(reward + 7 * (1 - gamma), value + 7, offsets, gamma, lam, mask, bootstrap + 7)
    close(shifted.advantage, base.advantage)
    # The order of sequences.
    order = data.draw(st.permutations(range(S)))
    rows = torch.cat([torch.arange(int(offsets[s]), int(offsets[s + 1])) for s in order])
    moved = sg.gae(
        reward[rows],
        value[rows],
        offsets_of([lengths[s] for s in order]),
        gamma,
        lam,
        mask[rows],
        bootstrap[list(order)],
    )
    close(moved.advantage, base.advantage[rows])
    # One sequence at a time.
    parts = [
        sg.gae(reward[a:b], value[a:b], torch.tensor([0, b - a]), gamma, lam, mask[a:b], bootstrap[s : s + 1]).returns
        for s, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    ]
    close(torch.cat(parts), base.returns)
    # Padding further.
    T = max(lengths) + 3
    padded_mask = torch.zeros(S, T, dtype=torch.bool)
    padded_reward, padded_value = torch.full((2, S, T), math.nan, dtype=torch.float64)
    for s, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        padded_mask[s, : b - a], padded_reward[s, : b - a], padded_value[s, : b - a] = (
            mask[a:b],
            reward[a:b],
            value[a:b],
        )
    padded = sg.gae(padded_reward, padded_value, None, gamma, lam, padded_mask, bootstrap)
    close(padded.advantage[padded_mask], base.advantage[mask])


@settings(deadline=None, max_examples=40)
@given(length=st.integers(2, 40), data=st.data())
def test_a_sequence_cut_in_two_is_bootstrapped_at_the_cut(length, data):
    cut = data.draw(st.integers(1, length - 1))
    whole, pieces = offsets_of((length,)), offsets_of((cut, length - cut))
    reward, value = torch.randn(2, length, dtype=torch.float64)
    end = torch.randn(1, dtype=torch.float64)
    gamma, lam = torch.rand(2, length, dtype=torch.float64)
    # Returns: the return behind the cut is the bootstrap.
    expected = sg.discounted_return(reward, whole, gamma, bootstrap=end)
    y = sg.discounted_return(reward, pieces, gamma, bootstrap=torch.cat((expected[cut : cut + 1], end)))
    torch.testing.assert_close(y, expected)
    # GAE: the value behind the cut is, where lambda is 0 across it.
    lam[cut - 1] = 0
    expected = sg.gae(reward, value, whole, gamma, lam, bootstrap=end)
    y = sg.gae(reward, value, pieces, gamma, lam, bootstrap=torch.cat((value[cut : cut + 1], end)))
    torch.testing.assert_close(y.advantage, expected.advantage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_and_lambda_one_are_exact(dtype):
    """The sum telescopes to the rewards still to come minus the value: no rounding where all are multiples of 1/8."""
    offsets = offsets_of((300, 1, 0, 4099))
    reward, value = torch.randint(-16, 17, (2, 4400)).to(dtype) / 8
    y = sg.gae(reward, value, offsets, 1.0, 1.0)
    to_go = torch.cat([reward[a:b].flip(0).cumsum(0).flip(0) for a, b in ((0, 300), (300, 301), (301, 4400))])
    assert torch.equal(y.returns, to_go)
    assert torch.equal(y.advantage, to_go - value)
    assert torch.equal(sg.discounted_return(reward, offsets), to_go)


def test_vtrace_on_policy_is_gae():
    offsets, reward, value, _, mask, bootstrap = problem((5, 30, 1, 17), True, True)
    on_policy = torch.zeros(53)
    v = sg.vtrace(reward, value, on_policy, offsets, 0.9, 1.0, mask=mask, bootstrap=bootstrap)
    g = sg.gae(reward, value, offsets, 0.9, 1.0, mask=mask, bootstrap=bootstrap)
    torch.testing.assert_close(v.advantage, g.advantage)
    torch.testing.assert_close(v.returns, g.returns)
    v = sg.vtrace(reward, value, on_policy, offsets, 0.9, 0.7, mask=mask, bootstrap=bootstrap)
    torch.testing.assert_close(v.returns, sg.gae(reward, value, offsets, 0.9, 0.7, mask, bootstrap).returns)


def test_vtrace_bounds():
    offsets, reward, value, _, _, _ = problem((6, 5), False, False)
    huge = torch.full((11,), 800.0, dtype=torch.float64, requires_grad=True)  # exp overflows
    y = sg.vtrace(reward, value, huge, offsets, 0.9)
    torch.testing.assert_close(y.returns, sg.gae(reward, value, offsets, 0.9, 1.0).returns)
    y.returns.sum().backward()
    assert torch.equal(huge.grad, torch.zeros(11, dtype=torch.float64))
    never = torch.full((11,), -math.inf, dtype=torch.float64)
    assert torch.equal(sg.vtrace(reward, value, never, offsets, 0.9).returns, value)
    log_ratio = torch.randn(11, dtype=torch.float64)
    y = sg.vtrace(reward, value, log_ratio, offsets, 0.9, 1.0, math.inf, math.inf)
    expected = oracle.vtrace(reward, value, log_ratio, offsets, 0.9, 1.0, math.inf, math.inf)
    assert_accurate(y.returns, expected[1])


def test_observations_between_turns_take_no_time():
    """Two turns of an agent with a tool's answer between them: the answer neither discounts nor decays."""
    mask = torch.tensor([1, 1, 0, 0, 0, 1])
    reward = torch.tensor([0.0, 0.0, 9.0, 9.0, 9.0, 1.0])
    value = torch.tensor([0.5, 0.25, 7.0, 7.0, 7.0, 0.75])
    y = sg.gae(reward, value, offsets_of((6,)), 0.5, 0.5, mask)
    last = 1 - 0.75
    middle = 0.5 * 0.75 - 0.25 + 0.25 * last
    first = 0.5 * 0.25 - 0.5 + 0.25 * middle
    assert y.advantage.tolist() == [first, middle, 0, 0, 0, last]
    assert y.returns.tolist() == [first + 0.5, middle + 0.25, 0, 0, 0, 1.0]


@pytest.mark.parametrize("decay", [0.9405, 1.0])
def test_very_long_sequences(decay):
    offsets = offsets_of((100_000, 3, 31_069))
    n = int(offsets[-1])
    reward, value = torch.randn(2, n)
    expected = oracle.gae(reward, value, offsets, 1.0, decay)
    y = sg.gae(reward, value, offsets, 1.0, decay)
    assert_accurate(y.advantage, expected[0])
    assert_accurate(y.returns, expected[1])
    mask = torch.rand(n) < 0.9
    assert_accurate(
        sg.gae(reward, value, offsets, 1.0, decay, mask)[0], oracle.gae(reward, value, offsets, 1.0, decay, mask)[0]
    )


def test_decay_far_below_one_does_not_underflow_into_nan():
    n = 5000
    y = sg.reverse_scan(torch.ones(n), 1e-30, offsets_of((n,)))
    assert torch.equal(y, torch.ones(n))
    growing = sg.reverse_scan(torch.ones(600, dtype=torch.float64), 2.0, offsets_of((600,)))
    assert_accurate(growing, oracle.reverse_scan(torch.ones(600), 2.0, [0, 600]))


def test_length_adaptive_lambda_is_one_number_per_row():
    """lambda = 1 - 1 / (alpha * length) for each sequence, as in VAPO."""
    lengths = (3, 9, 40)
    offsets, reward, value, *_ = problem(lengths, False, False)
    per_sequence = (1 - 1 / (0.5 * torch.tensor(lengths, dtype=torch.float64))).clamp(0, 1)
    y = sg.gae(reward, value, offsets, 1.0, per_token(per_sequence, offsets))
    for s, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        alone = sg.gae(reward[a:b], value[a:b], torch.tensor([0, b - a]), 1.0, float(per_sequence[s]))
        torch.testing.assert_close(y.advantage[a:b], alone.advantage)


def test_mixed_dtypes_and_integer_rewards():
    offsets = offsets_of((2, 2))
    y = sg.gae(torch.tensor([0, 1, 0, 1]), torch.rand(4), offsets)
    assert y.advantage.dtype == torch.float32
    assert sg.gae(torch.tensor([0, 1, 0, 1]), torch.rand(4).double(), offsets).returns.dtype == torch.float64


R = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sg.gae(R, R), ValueError, "offsets: needed with reward"),
        (lambda: sg.gae([1.0], R, offsets_of((3,))), TypeError, "reward: expected a torch.Tensor"),
        (lambda: sg.gae(R, torch.ones(4), offsets_of((3,))), ValueError, "value: expected shape"),
        (lambda: sg.gae(R, R, offsets_of((2,))), ValueError, "offsets: expected to rise"),
        (lambda: sg.gae(R, R, [0, 3]), TypeError, "offsets: expected a torch.Tensor"),
        (lambda: sg.gae(R[None], R[None], offsets_of((3,))), ValueError, "offsets: expected with reward of shape"),
        (lambda: sg.gae(R, R, offsets_of((3,)), "1"), TypeError, "gamma: expected a float or a tensor; got str"),
        (lambda: sg.gae(R, R, offsets_of((3,)), True), TypeError, "gamma: expected a float"),
        (lambda: sg.gae(R, R, offsets_of((3,)), lam=torch.ones(1)), ValueError, "lam: expected shape"),
        (lambda: sg.gae(R, R, offsets_of((3,)), mask=torch.ones(4)), ValueError, "mask: expected shape"),
        (lambda: sg.gae(R, R, offsets_of((3,)), mask=R / 2), ValueError, "mask: expected bool or 0/1"),
        (lambda: sg.gae(R, R, offsets_of((3,)), bootstrap=R), ValueError, "bootstrap: expected shape"),
        (lambda: sg.gae(R, R, offsets_of((3,)), bootstrap=0.0), TypeError, "bootstrap: expected a torch.Tensor"),
        (lambda: sg.vtrace(R, R, R[:2], offsets_of((3,))), ValueError, "log_ratio: expected shape"),
        (lambda: sg.vtrace(R, R, R, offsets_of((3,)), rho_bar=0.0), ValueError, "rho_bar: expected a positive"),
        (lambda: sg.discounted_return(R + 1j, offsets_of((3,))), TypeError, "reward: expected real"),
        (lambda: sg.reverse_scan(R, None, offsets_of((3,))), TypeError, "decay: expected a float"),
    ],
)
def test_bad_input_raises_and_says_what(call, error, words):
    with pytest.raises(error, match=words):
        call()
