"""The segments ops: equal to the reference, differentiable, sound as custom ops, and compiled without recompiling."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import rlcore
from accuracy import assert_accurate
from oracles import segments as oracle
from rlcore.algorithms import segments as reference
from rlcore.ops import backend
from rlcore.ops import segments as ops

needs_native = pytest.mark.skipif(backend.native() is None, reason="rlcore._native is not built")


def offsets_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)


# ---- segment sums


@pytest.mark.parametrize("name", [None, "reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(3, 47, 31, 123), (0, 5, 0, 1), (0,), (70_000,)])
def test_segment_sum_and_mean_match_the_oracle(name, dtype, lengths):
    offsets = offsets_of(lengths)
    n = int(offsets[-1])
    x, mask = torch.randn(n, dtype=torch.float64).to(dtype), torch.rand(n) < 0.5
    ids = oracle.ids_of(offsets, n)
    with rlcore.backend(name) if name else contextlib.nullcontext():
        for m in (None, mask, mask.float()):
            for function in ("sum", "mean"):
                y = getattr(ops, f"segment_{function}")(x, offsets=offsets, mask=m)
                assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                baseline = None  # lower dtypes have one rounding; plain torch adds float64 one by one
                if dtype == torch.float64 and name == "reference":
                    kept = x if m is None else x * m.to(dtype)
                    baseline = torch.zeros(len(lengths), dtype=dtype).index_add(0, torch.from_numpy(ids), kept)
                    if function == "mean":
                        baseline /= reference.segment_count(x, offsets=offsets, mask=m).clamp(min=1)
                assert_accurate(y, oracle.segment_reduce(function, x, ids, len(lengths), m), baseline)


@needs_native
def test_native_sum_takes_strided_input_as_it_is():
    wide = torch.randn(40, 3)
    for x in (wide[:, 1], wide[:, 1].double(), wide.T[0], torch.randn(1).expand(40)):
        offsets = torch.tensor([0, 7, 7, 40])
        with rlcore.backend("native"):
            y = ops.segment_sum(x, offsets=offsets)
        assert_accurate(y, oracle.segment_reduce("sum", x, oracle.ids_of(offsets, 40), 3))
    strided = torch.tensor([0, -1, 7, -1, 40, -1])[::2]
    assert torch.equal(
        ops.segment_sum(wide[:, 0], offsets=strided), ops.segment_sum(wide[:, 0], offsets=strided.clone())
    )


def test_masked_nan_reaches_neither_sum_nor_gradient():
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    x = torch.tensor([1.0, torch.nan, 2, 3, torch.inf, 4], requires_grad=True)
    y = ops.segment_sum(x, offsets=offsets_of((3, 3)), mask=mask)
    y.backward(torch.tensor([2.0, 5.0]))
    assert y.tolist() == [3, 7]
    assert x.grad.tolist() == [2, 0, 2, 5, 0, 5]


def test_segment_sum_passes_gradcheck_twice():
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(9) < 0.7
    for m in (None, mask):
        assert torch.autograd.gradcheck(lambda x: ops.segment_sum(x, offsets=offsets_of((4, 0, 5)), mask=m), x)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: ops.segment_sum(x**2, offsets=offsets_of((4, 0, 5)), mask=m), x)  # noqa: B023


def test_ops_check_their_input_like_the_reference():
    x = torch.ones(3)
    for arguments, error in (
        ({"offsets": offsets_of((2,))}, ValueError),
        ({"offsets": torch.tensor([0, 9, 3])}, ValueError),
        ({"offsets": offsets_of((3,)), "ids": torch.zeros(3, dtype=torch.int64)}, ValueError),
        ({"offsets": offsets_of((3,)), "mask": torch.ones(2)}, ValueError),
        ({}, ValueError),
    ):
        for function in (ops.segment_sum, ops.segment_mean, reference.segment_sum):
            with pytest.raises(error, match=r"offsets|ids|mask"):
                function(x, **arguments)
    with pytest.raises(TypeError, match="x: expected a floating dtype"):
        ops.segment_sum(torch.ones(3, dtype=torch.int64), offsets=offsets_of((3,)))


# ---- scans


def scans(module, reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap):
    return (
        *module.gae(reward, value, offsets, gamma, lam, mask, bootstrap),
        *module.vtrace(reward, value, log_ratio, offsets, gamma, lam, 1.2, 1.1, mask, bootstrap),
        module.discounted_return(reward, offsets, gamma, mask, bootstrap),
        module.reverse_scan(reward, lam, offsets, mask, bootstrap),
    )


def arguments(lengths=(4, 0, 5, 1, 3), dtype=torch.float64):
    offsets = offsets_of(lengths)
    n = int(offsets[-1])
    floats = [torch.rand(n, dtype=dtype) for _ in range(5)]
    return [*floats[:3], offsets, *floats[3:], torch.rand(n) < 0.7, torch.randn(len(lengths), dtype=dtype)]


@pytest.mark.parametrize("lengths", [(4, 0, 5, 1, 3), (1,), (0,), (3, 47, 31, 123)])
def test_scans_equal_the_reference_with_gradients(lengths):
    given = arguments(lengths)
    leaves = [x.requires_grad_() for x in given if x.is_floating_point()]
    for y, expected in zip(scans(ops, *given), scans(reference, *given), strict=True):
        assert torch.equal(y, expected)
        weight = torch.randn_like(y)
        kept = [
            torch.autograd.grad((z * weight).sum(), leaves, allow_unused=True, retain_graph=True) for z in (y, expected)
        ]
        for g, h in zip(*kept, strict=True):
            zeros = torch.zeros_like(g if g is not None else h) if g is not None or h is not None else torch.zeros(0)
            a, b = (zeros if v is None else v for v in (g, h))  # None where the short scan never reads the input
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_scans_under_the_reference_backend():
    given = arguments()
    with rlcore.backend("reference"):
        for y, expected in zip(scans(ops, *given), scans(reference, *given), strict=True):
            assert torch.equal(y, expected)


def test_reverse_scan_passes_gradcheck_twice():
    delta, decay = torch.randn(2, 9, dtype=torch.float64)
    function = lambda delta, decay: ops.reverse_scan(delta, decay, offsets_of((4, 0, 5)))  # noqa: E731
    inputs = (delta.requires_grad_(), decay.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_only_the_gradients_asked_for_are_made():
    delta = torch.randn(9, requires_grad=True)
    ops.reverse_scan(delta, 0.5, offsets_of((4, 5))).sum().backward()
    ones = reference.reverse_scan(torch.ones(9).flip(0), 0.5, offsets_of((5, 4))).flip(0)
    torch.testing.assert_close(delta.grad, ones)


# ---- no host sync


def test_nothing_waits_for_the_gpu():
    """Meta tensors hold no numbers: reading one, as a host sync does, raises."""
    n, S = 30, 4
    offsets, ids = (torch.zeros(k, dtype=torch.int64, device="meta") for k in (S + 1, n))
    floats = [torch.zeros(n, device="meta") for _ in range(5)]
    masks = [None, torch.ones(n, dtype=torch.bool, device="meta"), torch.ones(n, device="meta")]
    bootstrap = torch.zeros(S, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        bool(floats[0].sum() > 0)
    for mask, module in itertools.product(masks, (ops, reference)):
        for y in scans(module, *floats[:3], offsets, *floats[3:], mask, bootstrap):
            assert y.shape == (n,) and y.device.type == "meta"
        for name in ("sum", "mean", "std", "min", "max", "count"):
            reduce = getattr(module, f"segment_{name}")
            assert reduce(floats[0], offsets=offsets, mask=mask).shape == (S,)
            assert reduce(floats[0], ids, num_segments=7, mask=mask).shape == (7,)
            assert reduce(floats[0].reshape(5, 6)).shape == (5,)
        module.segment_topk(floats[0], 3, offsets=offsets, mask=mask)
        module.segment_rank(floats[0], ids, num_segments=7, mask=mask)
        module.whiten(floats[0], mask)
        module.group_metrics(floats[0], ids, mask)
        for center, scale in itertools.product(reference.CENTERS, reference.SCALES):
            module.group_advantage(floats[0], ids, center, scale, weight=floats[1], mask=mask)
    with pytest.raises(ValueError, match="num_segments: needed"):
        ops.segment_sum(floats[0], ids)


# ---- custom ops and compilation


def test_opcheck():
    x, offsets, mask = torch.randn(9), offsets_of((4, 0, 5)), torch.rand(9) < 0.5
    for requested, m in itertools.product(("", "reference"), (None, mask)):
        torch.library.opcheck(torch.ops.rlcore.segment_sum.default, (x.bfloat16(), offsets, m, requested))
        torch.library.opcheck(torch.ops.rlcore.segment_sum.default, (x.double(), offsets, m, requested))
    for n in (9, 1, 0):
        last = torch.zeros(n, dtype=torch.bool)
        torch.library.opcheck(torch.ops.rlcore.reverse_scan.default, (torch.randn(n), torch.rand(n), last))


def recompilations(function, calls):
    """Graphs compiled after the second call: the second one is where sizes and floats become symbols."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for i, call in enumerate(calls):
        for y, expected in zip(as_tuple(compiled(*call)), as_tuple(function(*call)), strict=True):
            torch.testing.assert_close(y, expected)
        if i == 1:
            after_two = counter.frame_count
    return counter.frame_count - after_two


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("kind", ["float", "scalar tensor", "per row"])
def test_gae_compiles_once_for_all_lengths_and_discounts(kind):
    def call(i):
        reward, value, _, offsets, gamma, lam, mask, bootstrap = arguments((5 + i, 9, 4 + 2 * i), torch.float32)
        numbers = {
            "float": (0.9 + i / 1000, 0.8 + i / 100),
            "scalar tensor": (torch.tensor(0.9 + i / 1000), torch.tensor(0.8 + i / 100)),
            "per row": (gamma, lam),
        }[kind]
        return reward, value, offsets, *numbers, mask, bootstrap

    assert recompilations(ops.gae, [call(i) for i in range(22)]) == 0


def test_padded_gae_vtrace_and_returns_compile_once():
    def function(reward, value, log_ratio, gamma, mask):
        returns = ops.discounted_return(reward, None, gamma, mask)
        return (
            *ops.gae(reward, value, None, gamma, 0.9, mask),
            *ops.vtrace(reward, value, log_ratio, mask=mask),
            returns,
        )

    calls = []
    for i in range(21):
        shape = (3 + i % 5, 7 + i)
        calls.append((*torch.randn(3, *shape), 0.9 + i / 1000, torch.rand(shape) < 0.7))
    assert recompilations(function, calls) == 0


def test_group_advantage_and_whiten_compile_once():
    def function(reward, group, weight, mask):
        return tuple(
            ops.group_advantage(reward, group, center, scale, weight=weight, mask=mask)
            for center, scale in (("group", "group"), ("leave_one_out", "none"), ("batch", "batch"))
        ) + (ops.whiten(reward, mask),)

    calls = []
    for i in range(21):
        n = 8 + 3 * i
        calls.append((torch.randn(n), torch.randint(0, 4, (n,)), torch.rand(n), torch.rand(n) < 0.8))
    assert recompilations(function, calls) == 0


def test_reductions_compile_once():
    def function(x, offsets, ids, mask):
        every = [
            ops.segment_sum,
            ops.segment_mean,
            ops.segment_std,
            ops.segment_min,
            ops.segment_max,
            ops.segment_count,
        ]
        packed = [reduce(x, offsets=offsets, mask=mask) for reduce in every]
        return (
            *packed,
            *(reduce(x, ids, num_segments=7, mask=mask) for reduce in every),
            ops.segment_rank(x, offsets=offsets),
            *ops.segment_topk(x, 2, offsets=offsets),
        )

    calls = []
    for i in range(21):
        n = 20 + 3 * i
        calls.append((torch.randn(n), offsets_of((7, 0, n - 7)), torch.randint(0, 7, (n,)), torch.rand(n) < 0.8))
    assert recompilations(function, calls) == 0


def test_gradients_under_compile():
    given = arguments()
    function = torch.compile(
        lambda *a: sum(y.pow(2).sum() for y in scans(ops, *a)), fullgraph=True, backend="aot_eager"
    )
    leaves = [x.requires_grad_() for x in given if x.is_floating_point()]
    compiled = torch.autograd.grad(function(*given), leaves)
    expected = torch.autograd.grad(sum(y.pow(2).sum() for y in scans(reference, *given)), leaves)
    for g, h in zip(compiled, expected, strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.slow
def test_inductor_compiles_the_family():
    given = arguments((40, 0, 21), torch.float32)

    def function(reward, value, log_ratio, offsets, gamma, lam, mask, bootstrap):
        advantage = ops.gae(reward, value, offsets, gamma, lam, mask, bootstrap).advantage
        return ops.whiten(advantage, mask), ops.segment_sum(reward, offsets=offsets, mask=mask)

    for y, expected in zip(torch.compile(function, fullgraph=True)(*given), function(*given), strict=True):
        torch.testing.assert_close(y, expected)
