"""Every surrogate x ratio x aggregation against the oracle; what masked rows, constants and extremes do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from policy_loss_cases import (
    AGGREGATES,
    CUBE,
    FIELDS,
    LENGTHS,
    RATIOS,
    SURROGATES,
    make_batch,
    make_case,
    make_objective,
    rich,
)

import rlcore as rl
from accuracy import assert_accurate
from oracles import policy_loss as oracle
from rlcore.algorithms.policy_loss_metrics import metric_names


@pytest.mark.parametrize("per_token_bounds", [True, False])
@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_loss_and_gradients_match_the_oracle(ratio, surrogate, aggregate, per_token_bounds):
    case = rich(ratio, surrogate, aggregate, clip=(0.1, 0.35), per_token_bounds=per_token_bounds)
    logp, entropy, batch = make_batch(case)
    loss, _ = rl.policy_loss(logp, batch, make_objective(case), entropy=entropy)
    assert loss.item() == pytest.approx(oracle.loss(case), rel=1e-12)
    loss.backward()
    assert entropy.grad is not None
    expected = torch.tensor(oracle.gradient(case, "entropy"), dtype=torch.float64)
    torch.testing.assert_close(entropy.grad, expected, atol=1e-8, rtol=1e-6)
    if surrogate != "cispo" and not (ratio == "none" and surrogate == "ppo"):  # no stop-gradient in the formula
        expected = torch.tensor(oracle.gradient(case, "logp"), dtype=torch.float64)
        torch.testing.assert_close(logp.grad, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("surrogate", ["cispo", "ppo"])
def test_gradients_through_stop_gradients(surrogate):
    """CISPO: -sg(clip(r)) A grad log pi; PPO without a ratio: -A grad log pi, each over the token count."""
    case = make_case(ratio="token" if surrogate == "cispo" else "none", surrogate=surrogate)
    logp, _, batch = make_batch(case, per_token_bounds=False)
    batch = replace(batch, weight=None)
    rl.policy_loss(logp, batch, make_objective(case))[0].backward()
    tokens = [t for s in case.sequences for t in s]
    live = sum(t["mask"] for t in tokens)
    for got, t in zip(logp.grad.tolist(), tokens, strict=True):
        ratio = oracle.token_ratio(case, t, [t])
        factor = min(max(ratio, 0.8), 1.2) if surrogate == "cispo" else 1.0
        assert got == pytest.approx(-factor * t["advantage"] / live if t["mask"] else 0.0, abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator):
    case = make_case(kl=(estimator, 0.7))
    logp, _, batch = make_batch(case)
    loss, metrics = rl.policy_loss(logp, batch, make_objective(case))
    assert loss.item() == pytest.approx(oracle.loss(case), rel=1e-12)
    loss.backward()
    expected = torch.tensor(oracle.gradient(case, "logp"), dtype=torch.float64)
    torch.testing.assert_close(logp.grad, expected, atol=1e-8, rtol=1e-6)
    assert float(metrics["loss"]) == float(metrics["policy_loss"] + metrics["kl_loss"])


def test_k3_of_close_policies_keeps_its_digits():
    """exp(-x) - 1 + x at x = 1e-4 in float32 is 5e-9; computed without expm1 it is 0 or 1.2e-7."""
    x = torch.full((8,), 1e-4, dtype=torch.float64)
    batch = rl.TokenBatch(torch.zeros(8, dtype=torch.int64), torch.tensor([0, 8]), advantage=torch.zeros(8),
                          ref_logp=torch.zeros(8))  # fmt: skip
    _, metrics = rl.policy_loss(x.float(), batch, rl.Objective(kl=rl.KL("k3", 1.0)))
    assert float(metrics["ref_kl_k3"]) == pytest.approx(5e-9, rel=0.02)


@pytest.mark.parametrize(("ratio", "surrogate"), list(itertools.product(RATIOS, SURROGATES)))
def test_metrics_match_the_oracle(ratio, surrogate):
    """Every metric but the parts of the loss, which other tests hold."""
    case = rich(ratio, surrogate, "token_mean")
    logp, entropy, batch = make_batch(case)
    _, metrics = rl.policy_loss(logp, batch, make_objective(case), entropy=entropy)
    expected = oracle.expected_metrics(case)
    assert expected.keys() >= metrics.keys() - {"policy_loss", "kl_loss", "entropy_loss"}
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-9)
    parts = float(metrics["policy_loss"] + metrics["kl_loss"] + metrics["entropy_loss"])
    assert parts == pytest.approx(expected["loss"], rel=1e-12)


def test_totals_that_are_given_are_the_denominators():
    """Two ranks whose gradients are averaged: each passes the counts of both, divided by two."""
    case = make_case(aggregate="token_mean")
    logp, _, batch = make_batch(case)
    loss, _ = rl.policy_loss(logp, batch, make_objective(case))
    given = rl.Totals(*(x * 2.5 for x in batch.totals))
    for aggregate in AGGREGATES:
        case.aggregate = aggregate
        loss, metrics = rl.policy_loss(logp, batch, make_objective(case))
        other, scaled = rl.policy_loss(logp, replace(batch, totals=given), make_objective(case))
        torch.testing.assert_close(other * 2.5, loss)
        torch.testing.assert_close(scaled["ratio_mean"] * 2.5, metrics["ratio_mean"])


def test_constants_get_no_gradient():
    case = rich("token", "ppo", "token_mean")
    logp, entropy, batch = make_batch(case)
    names = ("advantage", "old_logp", "ref_logp", "rollout_logp", "weight", "clip_low", "clip_high")
    wanting = replace(batch, **{name: getattr(batch, name).clone().requires_grad_() for name in names})
    for old_logp in (wanting.old_logp, None):
        loss, _ = rl.policy_loss(logp, replace(wanting, old_logp=old_logp), make_objective(case), entropy=entropy)
        constants = [getattr(wanting, name) for name in names]
        found = torch.autograd.grad(loss, constants, allow_unused=True, retain_graph=True)
        assert all(x is None for x in found)
    # Without old_logp the correction is exp(sg(logp) - rollout_logp): the ratio's gradient alone remains.
    plain = rl.Objective(correction=rl.TIS(100.0))
    on_policy = replace(batch, old_logp=None, weight=None)
    grad = torch.autograd.grad(rl.policy_loss(logp, on_policy, plain)[0], logp)[0]
    weight = (logp - batch.rollout_logp).exp().clamp(max=100).detach()
    expected = -batch.advantage * weight * batch.mask / batch.mask.sum()
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_rows_outside_the_kl_mask_may_hold_anything(garbage):
    case = make_case(kl=("k3", 0.5))
    logp, _, batch = make_batch(case)
    loss, metrics = rl.policy_loss(logp, batch, make_objective(case))
    dirty = replace(batch, ref_logp=torch.where(batch.kl_mask, batch.ref_logp, garbage))
    other, dirty_metrics = rl.policy_loss(logp, dirty, make_objective(case))
    assert torch.equal(loss, other) and torch.equal(metrics["ref_kl_k3"], dirty_metrics["ref_kl_k3"])
    assert torch.equal(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(other, logp)[0])


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_float32_error_rule(ratio, surrogate, aggregate):
    case = rich(ratio, surrogate, aggregate, lengths=(31, 5, 47, 1), seed=1)
    exact, exact_entropy, batch64 = make_batch(case)
    loss64, _ = rl.policy_loss(exact, batch64, make_objective(case), entropy=exact_entropy)
    loss64.backward()
    logp, entropy, batch = make_batch(case, torch.float32)
    loss, _ = rl.policy_loss(logp, batch, make_objective(case), entropy=entropy)
    loss.backward()
    assert loss.dtype == torch.float32
    scale = float(exact.detach().abs().max())  # the inputs are rounded too: the error rule's floor at their size
    assert loss.item() == pytest.approx(loss64.item(), abs=1e-6 * scale)
    assert_accurate(entropy.grad, exact_entropy.grad, gradient=True, name="d entropy")
    torch.testing.assert_close(logp.grad.double(), exact.grad, atol=3e-6 * float(exact.grad.abs().max()), rtol=2e-5)


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_masked_values_change_nothing(ratio, surrogate, aggregate):
    case = rich(ratio, surrogate, aggregate)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case)
    loss, metrics = rl.policy_loss(logp, batch, objective, entropy=entropy)
    grads = torch.autograd.grad(loss, (logp, entropy))
    for garbage in (torch.nan, torch.inf, -torch.inf):
        hole = ~batch.mask
        names = [name for name in FIELDS if name not in ("logp", "entropy")]
        dirty = {name: torch.where(hole, garbage, getattr(batch, name)) for name in names}
        dirty_batch = replace(batch, target=torch.where(hole, -100, batch.target), **dirty)
        x = torch.where(hole, garbage, logp.detach()).requires_grad_()
        h = torch.where(hole, garbage, entropy.detach()).requires_grad_()
        dirty_loss, dirty_metrics = rl.policy_loss(x, dirty_batch, objective, entropy=h)
        assert torch.equal(dirty_loss, loss)
        assert dirty_metrics.keys() == metrics.keys()
        assert all(torch.equal(dirty_metrics[name], metrics[name]) for name in metrics)
        for a, b in zip(torch.autograd.grad(dirty_loss, (x, h)), grads, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_gradcheck_and_metric_names(ratio, surrogate, aggregate):
    case = rich(ratio, surrogate, aggregate, lengths=(3, 2))
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case)
    _, metrics = rl.policy_loss(logp, batch, objective, entropy=entropy)
    assert metric_names(batch, objective, True) == tuple(metrics)
    if surrogate == "cispo" or ratio == "none":
        return  # their value and their gradient differ by design
    assert torch.autograd.gradcheck(lambda x, h: rl.policy_loss(x, batch, objective, entropy=h)[0], (logp, entropy))


def test_all_masked_batch_is_zero():
    case = make_case(kl=("k3", 0.1), entropy=0.1)
    logp, entropy, batch = make_batch(case)
    batch = replace(batch, mask=torch.zeros_like(batch.mask), totals=None)
    for aggregate in AGGREGATES:
        case.aggregate = aggregate
        loss, metrics = rl.policy_loss(logp, batch, make_objective(case), entropy=entropy)
        grad = torch.autograd.grad(loss, logp)[0]
        assert loss.item() == 0 and not grad.any()
        assert metrics["tokens"] == 0


def test_empty_sequences_count_unless_told_otherwise():
    case = make_case(aggregate="seq_mean_token_sum")
    logp, _, batch = make_batch(case)
    loss, _ = rl.policy_loss(logp, batch, make_objective(case))
    verl_rule = replace(batch, totals=None, count_empty=False)
    filled = sum(any(t["mask"] for t in s) for s in case.sequences)
    assert filled < len(LENGTHS)
    other, _ = rl.policy_loss(logp, verl_rule, make_objective(case))
    torch.testing.assert_close(other * filled, loss * len(LENGTHS))


def test_zero_weight_changes_no_denominator():
    case = make_case()
    logp, _, batch = make_batch(case)
    doubled = replace(batch, weight=torch.zeros_like(batch.weight))
    assert torch.equal(doubled.totals.tokens, batch.totals.tokens)
    loss, _ = rl.policy_loss(logp, doubled, make_objective(case))
    assert loss.item() == 0


def test_far_off_policy_tokens_give_finite_gradients():
    """exp overflows float32 at 89: without a bound on the log-ratio the clipped branch has gradient 0 * inf = NaN."""
    logp = torch.tensor([-1.0, -300.0, -0.5], requires_grad=True)
    batch = rl.TokenBatch(
        torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), advantage=torch.tensor([1.0, 1.0, -1.0]),
        old_logp=torch.tensor([-200.0, -1.0, -150.0]), ref_logp=torch.tensor([-200.0, -1.0, -1.0]),
        rollout_logp=torch.tensor([-1.0, -200.0, -1.0]),
    )  # fmt: skip
    loss, metrics = rl.policy_loss(logp, batch, rl.Objective(kl=rl.KL("k3", 0.1), correction=rl.TIS(2.0)))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()
    assert all(torch.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_float32_or_better(dtype):
    case = make_case()
    logp, _, batch = make_batch(case)
    x = logp.detach().to(dtype).requires_grad_()
    loss, metrics = rl.policy_loss(x, batch, make_objective(case))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == expected and {m.dtype for m in metrics.values()} == {expected}
    loss.backward()
    assert x.grad.dtype == dtype


def test_compiles_whole_and_never_again():
    """Twenty changes of length, clip bounds and coefficients: one graph for the first, dynamic sizes from the start."""
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(rl.policy_loss, fullgraph=True, backend=count, dynamic=True)
    torch._dynamo.reset()
    for i in range(20):
        case = make_case((5 + i, 3, 2 + i), seed=i, ratio="sequence", kl=("k3", 0.1 + i), clip=(0.1 + i / 100, 0.3),
                         dual_clip=2.0 + i)  # fmt: skip
        logp, _, batch = make_batch(case, torch.float32)
        loss, metrics = compiled(logp, batch, make_objective(case))
        eager, eager_metrics = rl.policy_loss(logp, batch, make_objective(case))
        torch.testing.assert_close(loss, eager)
        assert metrics.keys() == eager_metrics.keys()
    assert graphs == 1


def test_aot_eager_gradients():
    case = rich("sequence", "ppo", "seq_mean_token_mean")
    logp, entropy, batch = make_batch(case)
    objective = make_objective(case)
    torch._dynamo.reset()
    compiled = torch.compile(rl.policy_loss, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(logp, batch, objective, entropy)
    eager, _ = rl.policy_loss(logp, batch, objective, entropy)
    torch.testing.assert_close(loss, eager)
    expected = torch.autograd.grad(eager, (logp, entropy))
    for got, want in zip(torch.autograd.grad(loss, (logp, entropy)), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("x", [-12.0, -7.0, 7.0, 12.0, 19.0])
def test_kl_far_from_the_reference(x):
    """The bound on log-ratios is 20: nothing nearer is cut."""
    batch = rl.TokenBatch(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]), advantage=torch.zeros(1).double(),
                          ref_logp=torch.zeros(1).double())  # fmt: skip
    for estimator in ("k1", "k2", "k3"):
        logp = torch.full((1,), x, dtype=torch.float64, requires_grad=True)
        loss, _ = rl.policy_loss(logp, batch, rl.Objective(ratio="none", kl=rl.KL(estimator, 1.0)))
        assert loss.item() == pytest.approx(oracle.kl(estimator, x), rel=1e-12)
