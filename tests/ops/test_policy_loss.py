"""The policy loss in C++ against the float64 oracle and the reference: values, gradients, conventions, invariances."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from policy_loss_cases import (
    CUBE,
    FIELDS,
    RATIOS,
    SURROGATES,
    make_batch,
    make_case,
    make_objective,
    padded,
    rich,
)

import rlcore as rl
from accuracy import assert_accurate
from oracles import policy_loss as oracle
from rlcore.algorithms.policy_loss import chunk_loss, prepare_chunks
from rlcore.algorithms.policy_loss_metrics import metric_names
from rlcore.layout import Totals
from rlcore.ops import backend
from rlcore.ops import policy_loss_native as native
from rlcore.ops import policy_loss_raw as raw

needs_native = pytest.mark.skipif(backend.native() is None, reason="rlcore._native is not built")
pytestmark = needs_native
BACKENDS = ("reference", "native")
STEPS = (4, 1, 0, 7, 3, 2, 47, 31)  # rows: 95, no multiple of any vector


def run(name, logp, batch, objective, entropy):
    """Loss, metrics and gradients on one backend."""
    logp = logp.detach().requires_grad_()
    entropy = None if entropy is None else entropy.detach().requires_grad_()
    with rl.backend(name):
        loss, metrics = rl.policy_loss(logp, batch, objective, entropy=entropy)
    leaves = [logp] + [entropy] * (entropy is not None)
    return loss.detach(), metrics, torch.autograd.grad(loss, leaves, allow_unused=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
@pytest.mark.parametrize("bounds", [True, False])
def test_the_cube_in_float32(name, ratio, surrogate, aggregate, bounds):
    case = rich(ratio, surrogate, aggregate, lengths=STEPS, seed=3)
    objective = make_objective(case)
    exact = make_batch(case, per_token_bounds=bounds)
    wide_loss, wide_metrics, wide = run("reference", exact[0], exact[2], objective, exact[1])
    if bounds:
        assert wide_loss.item() == pytest.approx(oracle.loss(case), rel=1e-12)
    logp, entropy, batch = make_batch(case, torch.float32, per_token_bounds=bounds)
    loss, metrics, grads = run(name, logp, batch, objective, entropy)
    plain_loss, plain_metrics, plain = run("reference", logp, batch, objective, entropy)
    assert loss.dtype == torch.float32
    assert tuple(metrics) == metric_names(batch, objective, True) == tuple(plain_metrics)
    torch.testing.assert_close(loss.double(), wide_loss, rtol=2e-6, atol=2e-6)  # the inputs are rounded too
    for got, want, ref in zip(grads, wide, plain, strict=True):
        torch.testing.assert_close(got.double(), want, atol=3e-6 * float(want.abs().max()), rtol=2e-5)
        torch.testing.assert_close(got, ref, atol=1e-6 * float(want.abs().max()), rtol=1e-5)
    for key, value in metrics.items():
        torch.testing.assert_close(value.double(), wide_metrics[key], rtol=1e-5, atol=1e-6, msg=key)
    assert plain_loss.dtype == torch.float32


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("ratio", "surrogate"), [*itertools.product(RATIOS, SURROGATES)])
def test_plain_objectives_without_options(name, ratio, surrogate):
    """No mask, no weight, no entropy, no old_logp for half of them: absent fields."""
    case = make_case(STEPS, 5, ratio=ratio, surrogate=surrogate, aggregate="seq_mean_token_sum")
    logp, _, batch = make_batch(case, torch.float32)
    objective = make_objective(case)
    for old in (batch.old_logp, None):
        ids = {"offsets": batch.offsets, "segment": batch.segment}
        bare = rl.TokenBatch(batch.target, advantage=batch.advantage, old_logp=old, **ids)
        loss, metrics, (grad,) = run(name, logp, bare, objective, None)
        wide_old = None if old is None else old.double()
        wide = rl.TokenBatch(batch.target, advantage=batch.advantage.double(), old_logp=wide_old, **ids)
        want, named, (d,) = run("reference", logp.double(), wide, objective, None)
        assert_accurate(loss, want, norm=float((batch.advantage * logp.detach()).abs().max()), name="loss")
        torch.testing.assert_close(grad.double(), d, rtol=1e-5, atol=1e-6 * float(d.abs().max()))
        assert metrics.keys() == named.keys()
        for key in named:
            torch.testing.assert_close(metrics[key].double(), named[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("dual_clip", [None, 1.5, 2.0])
@pytest.mark.parametrize(("ratio", "surrogate"), [*itertools.product(("token", "none"), SURROGATES)])
def test_gradients_at_ties_and_bounds_are_those_of_autograd(ratio, surrogate, dual_clip):
    """Ratios on and beside the bounds, advantages of 0, log-ratios at and beyond +-20, dual clips met exactly."""
    log_ratios = torch.tensor([0.0, -0.0, 20.0, -20.0, 20.0001, -20.0001, 25.0, -25.0, 1e-8, 0.5, -0.5, 3.0])
    log_ratios = torch.cat([log_ratios, torch.tensor([0.5, 0.75, 1.25, 1.5, 2.0]).log()])
    advantages = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.5, -2.5])
    grid = torch.cartesian_prod(log_ratios, advantages)
    n = grid.shape[0]
    batch = rl.TokenBatch(
        torch.zeros(n, dtype=torch.int64), torch.tensor([0, n]), advantage=grid[:, 1].contiguous(),
        old_logp=torch.zeros(n), ref_logp=grid[:, 0].flip(0).contiguous(),
    )  # fmt: skip
    for estimator, clip in itertools.product(("k1", "k2", "k3"), ((0.25, 0.25), (0.5, 0.5), (0.0, 0.0), (1.0, 1e9))):
        objective = rl.Objective(ratio, surrogate, clip, dual_clip, kl=rl.KL(estimator, 1e-7))
        results = [run(name, grid[:, 0], batch, objective, None) for name in BACKENDS]
        (_, named, (want,)), (_, metrics, (got,)) = results
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-9)
        for key in named:
            torch.testing.assert_close(metrics[key], named[key], rtol=1e-5, atol=1e-7, msg=key)


def test_small_differences_keep_their_digits():
    for size in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        x = torch.linspace(0.5, 1.5, 37) * size
        exact = torch.special.expm1(-x.double()) + x.double()
        batch = rl.TokenBatch(torch.zeros(37, dtype=torch.int64), torch.tensor([0, 37]), advantage=torch.zeros(37),
                              old_logp=torch.zeros(37), ref_logp=torch.zeros(37))  # fmt: skip
        _, metrics, (grad,) = run("native", x, batch, rl.Objective(kl=rl.KL("k3", 1.0)), None)
        assert float(metrics["ref_kl_k3"]) == pytest.approx(float(exact.mean()), rel=1e-6)
        forward = torch.special.expm1(x.double()) - x.double()
        assert float(metrics["old_kl_k3"]) == pytest.approx(float(forward.mean()), rel=1e-6)
        torch.testing.assert_close(grad.double(), -torch.special.expm1(-x.double()) / 37, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_masked_values_change_nothing(ratio, surrogate, aggregate):
    case = rich(ratio, surrogate, aggregate, lengths=STEPS)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, torch.float32)
    loss, metrics, grads = run("native", logp, batch, objective, entropy)
    hole = ~batch.mask
    for garbage in (torch.nan, torch.inf, -torch.inf):
        names = [name for name in FIELDS if name not in ("logp", "entropy")]
        dirty = {name: torch.where(hole, garbage, getattr(batch, name)) for name in names}
        dirty_batch = replace(batch, target=torch.where(hole, -100, batch.target), **dirty)
        x, h = torch.where(hole, garbage, logp.detach()), torch.where(hole, garbage, entropy.detach())
        other, named, gradients = run("native", x, dirty_batch, objective, h)
        assert torch.equal(other, loss)
        assert all(torch.equal(named[key], metrics[key]) for key in metrics)
        assert all(torch.equal(a, b) for a, b in zip(gradients, grads, strict=True))
        assert not any(g[hole].any() for g in gradients)


@pytest.mark.parametrize("field", ["logp", "old_logp", "advantage", "weight", "ref_logp", "rollout_logp", "clip_low",
                                   "clip_high", "entropy"])  # fmt: skip
def test_live_nan_reaches_the_loss(field):
    case = rich("token", "ppo", "token_mean", lengths=(40,))
    case.sequences[0][17]["mask"] = True
    logp, entropy, batch = make_batch(case, torch.float32)
    values = {"logp": logp.detach().clone(), "entropy": entropy.detach().clone()}
    bad = values[field] if field in values else getattr(batch, field).clone()
    bad[17] = torch.nan
    values[field] = bad
    if field not in ("logp", "entropy"):
        batch = replace(batch, **{field: bad})
    loss, metrics, _ = run("native", values["logp"], batch, make_objective(case), values["entropy"])
    assert loss.isnan()
    _, named, _ = run("reference", values["logp"], batch, make_objective(case), values["entropy"])
    assert {k for k, v in metrics.items() if v.isnan()} == {k for k, v in named.items() if v.isnan()}


def large(ratio, aggregate, n=40_003):
    objective = rl.Objective(ratio, dual_clip=3.0, kl=rl.KL("k3", 0.1), entropy=0.01, correction=rl.TIS(1.1),
                             aggregate=aggregate, length=9.0)  # fmt: skip
    cuts = torch.randint(0, n + 1, (60,)).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([n])])
    logp = -torch.rand(n)
    near = lambda: logp + 0.3 * torch.randn(n)  # noqa: E731
    batch = rl.TokenBatch(
        torch.zeros(n, dtype=torch.int64), offsets, mask=torch.rand(n) < 0.9, advantage=torch.randn(n), old_logp=near(),
        ref_logp=near(), rollout_logp=near(), weight=torch.rand(n), segment=torch.arange(n) // 7 % 5,
    )  # fmt: skip
    return logp, torch.rand(n), batch, objective


@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_any_number_of_threads_gives_the_same_bits(ratio, aggregate):
    logp, entropy, batch, objective = large(ratio, aggregate)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run("native", logp, batch, objective, entropy))
    finally:
        torch.set_num_threads(before)
    loss, metrics, grads = results[0]
    for other, named, gradients in results[1:]:
        assert torch.equal(other, loss)
        assert all(torch.equal(named[key], metrics[key]) for key in metrics)
        assert all(torch.equal(a, b) for a, b in zip(gradients, grads, strict=True))
    wide = replace(batch, **{k: getattr(batch, k).double() for k in FIELDS if getattr(batch, k, None) is not None})
    want, _, wide_grads = run("reference", logp.double(), wide, objective, entropy.double())
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-7)
    for got, exact in zip(grads, wide_grads, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_micro_batches_and_padding(ratio, surrogate, aggregate):
    case = rich(ratio, surrogate, aggregate)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, torch.float32)
    loss, metrics, grads = run("native", logp, batch, objective, entropy)
    for size in (1, 5, 8):
        parts = batch.split(size)
        results = [run("native", logp[p.rows], p, objective, entropy[p.rows]) for p in parts]
        torch.testing.assert_close(torch.stack([r[0] for r in results]).sum(), loss, rtol=1e-5, atol=1e-6)
        merged = rl.merge_metrics([r[1] for r in results])
        for key in metrics:
            torch.testing.assert_close(merged[key], metrics[key], rtol=1e-5, atol=1e-6, msg=key)
        torch.testing.assert_close(torch.cat([r[2][0] for r in results]), grads[0], rtol=1e-5, atol=1e-7)
    padded_logp, padded_entropy, rectangle, place = padded(logp, entropy, batch)
    padded_loss, named, (d_logp, _) = run("native", padded_logp, rectangle, objective, padded_entropy)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_logp.reshape(-1)[place], grads[0], rtol=1e-5, atol=1e-7)
    assert torch.count_nonzero(d_logp) == torch.count_nonzero(grads[0])
    for key in metrics:
        torch.testing.assert_close(named[key], metrics[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("ratio", RATIOS)
def test_chunks_equal_chunk_loss(ratio):
    case = rich(ratio, "ppo", "seq_mean_token_mean", lengths=STEPS)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, torch.float32)
    prepared = prepare_chunks(batch, objective)
    cuts = prepared.borders(objective.scope) or [0, 3, 20, 21, batch.N]
    for start, stop in itertools.pairwise(cuts):
        if start == stop:
            continue
        x, h = logp.detach()[start:stop].requires_grad_(), entropy.detach()[start:stop].requires_grad_()
        want, named = chunk_loss(x, h, prepared, start, stop, objective)
        expected = torch.autograd.grad(want, (x, h))
        loss, metrics, *got = raw.evaluate_chunk(x.detach(), h.detach(), prepared, start, stop, objective)
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert metrics.keys() == named.keys()
        for key in named:
            torch.testing.assert_close(metrics[key], named[key], rtol=1e-5, atol=1e-6, msg=key)
        only, _, d_logp, d_entropy = raw.evaluate_chunk(x, h, prepared, start, stop, objective, gradients=False)
        assert torch.equal(only, loss) and d_logp is None and d_entropy is None


# ---- inputs


def test_other_dtypes_strides_and_totals():
    case = rich("sequence", "ppo", "seq_mean_token_mean", lengths=STEPS)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, torch.float32)
    loss, _, grads = run("native", logp, batch, objective, entropy)
    spread = {k: torch.stack([getattr(batch, k)] * 2, 1)[:, 0] for k in FIELDS if getattr(batch, k, None) is not None}
    spread |= {k: torch.stack([getattr(batch, k)] * 2, 1)[:, 0] for k in ("mask", "kl_mask", "segment")}
    assert not spread["mask"].is_contiguous()
    strided = replace(batch, **spread)
    x, h = (torch.stack([t.detach()] * 3, 1)[:, 1] for t in (logp, entropy))
    other, _, gradients = run("native", x, strided, objective, h)
    assert torch.equal(other, loss) and all(torch.equal(a, b) for a, b in zip(gradients, grads, strict=True))
    wide = replace(batch, old_logp=batch.old_logp.double(), advantage=batch.advantage.double().requires_grad_())
    assert torch.equal(run("native", logp, wide, objective, entropy)[0], loss)
    totals = Totals(*(x.double() for x in batch.totals))
    assert torch.equal(run("native", logp, replace(batch, totals=totals), objective, entropy)[0], loss)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = logp.detach().to(dtype)
        half, _, (d, _) = run("native", narrow, batch, objective, entropy)
        assert d.dtype == dtype and half.dtype == torch.float32
        assert torch.equal(half, run("native", narrow.float(), batch, objective, entropy)[0])


def test_what_stays_with_the_reference(monkeypatch):
    monkeypatch.setattr(native, "evaluate", None)
    case = make_case()
    for dtype in (torch.float64, torch.float32):
        logp, entropy, batch = make_batch(case, dtype)
        with rl.backend("reference"):
            rl.policy_loss(logp, batch, make_objective(case), entropy=entropy)
    custom = rl.Objective.custom(lambda logp, entropy, batch: (-logp * batch.advantage, {}))
    rl.policy_loss(logp, batch, custom)
    logp, entropy, batch = make_batch(case, torch.float64)
    rl.policy_loss(logp, batch, make_objective(case), entropy=entropy)


def test_errors_are_those_of_the_reference():
    logp, _, batch = make_batch(make_case(), torch.float32)
    for arguments, error, text in (
        ((logp[:-1], batch, rl.Objective()), ValueError, "logp: expected shape"),
        ((logp.long(), batch, rl.Objective()), TypeError, "logp: expected a floating"),
        ((logp, batch, rl.Objective(entropy=0.1)), ValueError, "entropy: the objective"),
        ((logp, replace(batch, ref_logp=None), rl.Objective(kl=rl.KL())), ValueError, "batch.ref_logp"),
        ((logp, replace(batch, segment=None), rl.Objective("segment")), ValueError, "batch.segment"),
    ):
        with pytest.raises(error, match=text):
            rl.policy_loss(*arguments)


def test_all_masked_and_far_off_policy():
    logp, entropy, batch = make_batch(make_case(), torch.float32)
    nothing = replace(batch, mask=torch.zeros_like(batch.mask), totals=None)
    for ratio, aggregate in itertools.product(RATIOS, ("token_mean", "seq_mean_token_mean")):
        objective = rl.Objective(ratio, kl=rl.KL(), entropy=0.1, correction=rl.TIS(), aggregate=aggregate)
        results = [run(name, logp, nothing, objective, entropy) for name in BACKENDS]
        (want, named, _), (loss, metrics, grads) = results
        assert loss.item() == 0 == want.item() and not any(g.any() for g in grads)
        assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in named.items()}


# ---- backward semantics and the op


def test_backward_runs_again_but_is_not_differentiable():
    logp, _, batch = make_batch(make_case(), torch.float32)
    loss, metrics = rl.policy_loss(logp, batch, rl.Objective())
    assert not any(m.requires_grad for m in metrics.values())
    first = torch.autograd.grad(loss, logp, torch.tensor(1.0), retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, logp, torch.tensor(-3.0), retain_graph=True)[0], -3 * first)
    assert torch.equal(torch.autograd.grad(2 * loss, logp, retain_graph=True)[0], 2 * first)
    with pytest.raises(RuntimeError, match=r'differentiated twice.*rl\.backend\("reference"\)'):
        torch.autograd.grad(loss, logp, create_graph=True)


def test_gradients_are_made_where_they_are_asked_for():
    logp, entropy, batch = make_batch(make_case(), torch.float32)
    with torch.no_grad():
        assert not rl.policy_loss(logp, batch, rl.Objective(), entropy)[0].requires_grad
    frozen = logp.detach()
    assert not rl.policy_loss(frozen, batch, rl.Objective(), entropy)[0].requires_grad
    loss, _ = rl.policy_loss(frozen, batch, rl.Objective(entropy=0.1), entropy)
    torch.testing.assert_close(torch.autograd.grad(loss, entropy)[0], -0.1 * batch.mask / batch.totals.tokens)


def test_opcheck():
    for ratio, options in (("token", {}), ("sequence", {"kl": rl.KL(), "entropy": 0.1, "correction": rl.TIS()})):
        logp, entropy, batch = make_batch(make_case(), torch.float32)
        objective = rl.Objective(ratio, aggregate="seq_mean_token_mean", **options)
        for needs in ([True, True], [True, False], [False, False]):
            arguments = (logp.detach(), entropy.detach(), objective.key, list(objective.numbers), batch.tensors())
            torch.library.opcheck(torch.ops.rlcore.policy_loss.default, (*arguments, needs))


def test_the_op_does_without_the_extension(monkeypatch):
    logp, entropy, batch = make_batch(rich("segment", "ppo", "token_mean"), torch.float32)
    objective = make_objective(rich("segment", "ppo", "token_mean"))
    arguments = (logp.detach(), entropy.detach(), objective.key, list(objective.numbers), batch.tensors())
    for needs in ([True, True], [True, False], [False, False]):
        with_it = torch.ops.rlcore.policy_loss(*arguments, needs)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "native", lambda: None)
            without = torch.ops.rlcore.policy_loss(*arguments, needs)
        torch.testing.assert_close(with_it, without)


def test_compiled_gradients_in_float32():
    case = rich("sequence", "ppo", "seq_mean_token_mean")
    logp, entropy, batch = make_batch(case, torch.float32)
    objective = make_objective(case)
    torch._dynamo.reset()
    compiled = torch.compile(rl.policy_loss, fullgraph=True, backend="aot_eager")
    loss, metrics = compiled(logp, batch, objective, entropy)
    eager, named = rl.policy_loss(logp, batch, objective, entropy)
    assert metrics.keys() == named.keys()
    expected = torch.autograd.grad(3 * eager, (logp, entropy))
    for got, want in zip(torch.autograd.grad(3 * loss, (logp, entropy)), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_inductor():
    case = rich("token", "ppo", "token_mean")
    logp, entropy, batch = make_batch(case, torch.float32)
    loss, _ = torch.compile(rl.policy_loss, fullgraph=True)(logp, batch, make_objective(case), entropy)
    eager, _ = rl.policy_loss(logp, batch, make_objective(case), entropy)
    torch.testing.assert_close(loss, eager)
    got, want = (torch.autograd.grad(x, (logp, entropy)) for x in (loss, eager))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    """This file's tests of values and conventions once more, on code for lesser processors."""
    if os.environ.get("RLCORE_ISA") is not None:
        pytest.skip("runs inside such a run")
    chosen = "cube or plain_objectives or ties or digits or live_nan or threads or chunks"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-k", chosen, "-p", "no:cacheprovider"],
        env={**os.environ, "RLCORE_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
