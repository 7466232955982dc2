"""linear_policy_loss: what its backward pass promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from vocab_head_cases import make
from vocab_head_folded_cases import OFFSETS, assert_same, batch_of, run

import rlcore as rl
from accuracy import to_float64
from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_products as products
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.objective import KL, TIS, Objective
from rlcore.layout import TokenBatch
from rlcore.ops import backend
from rlcore.ops.vocab_head import linear_logprob, linear_policy_loss


def test_runs_backward_once():
    case = make().fresh()
    loss, _ = linear_policy_loss(case.hidden, case.weight, batch_of(case), Objective())
    torch.autograd.grad(loss, case.leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match=r'backward once.*rl\.backend\("reference"\)'):
        torch.autograd.grad(loss, case.leaves, retain_graph=True)


def test_double_backward_raises_and_the_reference_has_it():
    case = make(dtype=torch.float64).fresh()
    loss, _ = linear_policy_loss(case.hidden, case.weight, batch_of(case), Objective())
    with pytest.raises(RuntimeError, match=r'rl\.backend\("reference"\)'):
        torch.autograd.grad(loss, case.leaves, create_graph=True)
    with rl.backend("reference"):
        loss, _ = linear_policy_loss(case.hidden, case.weight, batch_of(case), Objective(entropy=0.1))
        (first,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), case.weight)[0].abs().max() > 0


def test_incoming_gradient_is_a_factor_not_a_constant():
    case = make("random", "bias")
    batch = batch_of(case)
    _, _, once = run(case, batch, Objective())
    for factor in (-3.0, 0.0, 65536.0):
        _, _, scaled = run(case, batch, Objective(), factor)
        for x, y in zip(scaled, once, strict=True):
            torch.testing.assert_close(x, factor * y)


def test_loss_scaling_meets_the_gradient_before_it_is_rounded_to_fp16():
    """Gradients far below the smallest fp16 number survive a loss scale."""
    case = make("random", "plain", torch.float16)
    advantage = torch.randn(47) * 1e-6
    batch = TokenBatch(case.target, torch.tensor(OFFSETS), advantage=advantage)
    _, _, gradients = run(case, batch, Objective("none", "reinforce"), 65536.0)
    d = -advantage.double().numpy() / 47 * 65536
    expected = case.oracle().backward(d, 0 * d)
    for x, y in zip(gradients, expected, strict=False):
        assert x.dtype == torch.float16
        assert abs(to_float64(x) - y).max() < 2e-3 * abs(y).max()


def test_no_grad_runs_the_forward_alone(monkeypatch):
    case = make("random", "bias").fresh()
    batch = batch_of(case)
    expected, *_ = run(case, batch, Objective())
    calls = []
    original = reference.gradient_
    monkeypatch.setattr(reference, "gradient_", lambda *a, **k: (calls.append(a), original(*a, **k))[1])
    with torch.no_grad():
        loss, metrics = linear_policy_loss(case.hidden, case.weight, batch, Objective(), case.bias, **case.numbers())
    assert torch.equal(loss, expected) and not loss.requires_grad and not calls
    loss, _ = linear_policy_loss(case.hidden.detach(), case.weight.detach(), batch, Objective())
    assert not loss.requires_grad and not calls
    assert not any(x.requires_grad for x in metrics.values())


def test_inference_mode():
    case = make("random", "bias").fresh()
    batch = batch_of(case)
    expected, *_ = run(case, batch, Objective())
    with torch.inference_mode():
        loss, _ = linear_policy_loss(case.hidden, case.weight, batch, Objective(), case.bias, **case.numbers())
        out = linear_logprob(case.hidden, case.weight, case.target, entropy=True, **case.kwargs())
    assert torch.equal(loss, expected) and out.entropy.isfinite().all()


def test_inside_activation_checkpointing():
    case = make("random", "bias")
    batch = batch_of(case)
    expected = run(case, batch, Objective())[2]
    case = case.fresh()

    def block(hidden):
        return linear_policy_loss(hidden, case.weight, batch, Objective(), case.bias, **case.numbers())[0]

    checkpoint(block, case.hidden, use_reentrant=False).backward()
    for x, y in zip(case.leaves, expected, strict=True):
        assert torch.equal(x.grad, y)


def test_metrics_take_no_gradient_and_the_loss_is_differentiable_in_a_larger_graph():
    case = make().fresh()
    loss, metrics = linear_policy_loss(case.hidden * 2, case.weight.clone(), batch_of(case), Objective())
    assert not any(x.requires_grad for x in metrics.values()) and "entropy" in metrics
    (loss + 3 * case.hidden.sum()).backward()
    assert case.hidden.grad.isfinite().all() and case.weight.grad.isfinite().all()


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_partial_gradients(needs):
    case = make("random", "bias", torch.float64)
    batch, objective = batch_of(case), Objective(entropy=0.1)
    _, _, everything = run(case, batch, objective)
    for x, need in zip(case.leaves, needs, strict=True):
        x.requires_grad_(bool(need))
    loss, _ = linear_policy_loss(case.hidden, case.weight, batch, objective, case.bias, **case.numbers())
    found = torch.autograd.grad(loss, [x for x in case.leaves if x.requires_grad])
    expected = [x for x, need in zip(everything, needs, strict=True) if need]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


def test_autocast():
    case = make("random", "bias")
    batch = batch_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, gradients = run(case, batch, Objective(entropy=0.1))
        with backend.backend("reference"):
            reference, _, expected = run(case, batch, Objective(entropy=0.1))
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    for x, y in zip(gradients, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0.02, atol=1e-3)


def test_same_tensor_in_two_fields():
    case = make(dtype=torch.float64)
    batch = batch_of(case)
    shared = replace(batch, rollout_logp=batch.old_logp, ref_logp=batch.old_logp)
    copied = replace(batch, rollout_logp=batch.old_logp.clone(), ref_logp=batch.old_logp.clone())
    objective = Objective(correction=TIS(), kl=KL())
    assert_same(run(case, shared, objective), run(case, copied, objective))


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_that_come_in_on_masked_rows_are_not_read(frozen):
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=not frozen)
    mask = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    logp = rl.linear_logprob(hidden, weight, torch.arange(6), mask=mask).logp
    clean = torch.autograd.grad(logp, hidden, mask.float(), retain_graph=True)[0]
    dirty = torch.autograd.grad(logp, hidden, torch.where(mask, 1.0, torch.nan))[0]
    assert torch.equal(clean, dirty) and not dirty[~mask].any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weight_gradients_are_put_together_from_slices(monkeypatch, dtype, compiled):
    """The sums over all chunks are those of one whole: in fp32 until the incoming gradient is applied, rounded once."""
    case = make("random", "bias", dtype)
    batch = batch_of(case)
    monkeypatch.setitem(selection.CHUNK_BYTES, "cpu", 13 * case.weight.shape[0] * 4)

    def loss(hidden, weight, bias):
        return linear_policy_loss(hidden, weight, batch, Objective(), bias, **case.numbers())[0]

    def gradients(rows):
        monkeypatch.setattr(products, "GRADIENT_SLICE_BYTES", rows * case.hidden.shape[-1] * 4)
        torch._dynamo.reset()
        function = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        leaves = case.fresh().leaves
        return torch.autograd.grad(1024.0 * function(*leaves), leaves)

    for x, y in zip(gradients(rows=50), gradients(rows=10**6), strict=True):
        assert x.dtype == dtype
        assert torch.equal(x, y)
