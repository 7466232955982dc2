"""The CUDA policy loss against the float64 oracle and the reference, on a GPU or emulated."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from policy_loss_cases import (
    CUBE,
    FIELDS,
    RATIOS,
    SURROGATES,
    agree,
    large,
    make_batch,
    make_case,
    make_objective,
    rich,
    run,
    same,
    widened,
)

import rlcore as rl
from accuracy import assert_accurate
from oracles import policy_loss as oracle
from rlcore.algorithms.policy_loss import chunk_loss, metric_names, prepare_chunks
from rlcore.ops import policy_loss_cuda as cuda
from rlcore.ops import policy_loss_raw as raw

AGGREGATES = ("token_mean", "seq_mean_token_mean")


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_the_cube(device, ratio, surrogate, aggregate):
    case = rich(ratio, surrogate, aggregate, seed=3)
    objective = make_objective(case)
    exact = make_batch(case)
    wide = run("reference", exact[0], exact[2], objective, exact[1])
    assert wide[0].item() == pytest.approx(oracle.loss(case), rel=1e-12)
    logp, entropy, batch = make_batch(case, torch.float32)
    got = run("cuda", logp, batch, objective, entropy, device)
    plain = run("reference", logp, batch, objective, entropy)
    assert got[0].dtype == torch.float32
    assert tuple(got[1]) == metric_names(batch, objective, True)
    agree(got, wide)
    largest = max(float(g.abs().max()) for g in wide[2])
    for g, exact_g, base in zip(got[2], wide[2], plain[2], strict=True):
        assert_accurate(g, exact_g, base, gradient=True, norm=largest)


@pytest.mark.parametrize(("ratio", "surrogate"), [*itertools.product(RATIOS, SURROGATES)])
def test_plain_objectives_without_options(device, ratio, surrogate):
    """No mask, no weight, no entropy, no old_logp for half of them: absent fields."""
    case = make_case((4, 1, 0, 6), 5, ratio=ratio, surrogate=surrogate, aggregate="seq_mean_token_sum")
    logp, _, batch = make_batch(case, torch.float32)
    for old in (batch.old_logp, None):
        bare = rl.TokenBatch(batch.target, batch.offsets, advantage=batch.advantage, old_logp=old,
                             segment=batch.segment)  # fmt: skip
        want = run("reference", logp.double(), widened(bare), make_objective(case), None)
        agree(run("cuda", logp, bare, make_objective(case), None, device), want)


@pytest.mark.parametrize("options", [*itertools.product((None, 1.5), (None, 1.2), (None, ("k1", 0.3)), (0.0, 0.05))])
def test_every_choice_of_metrics(device, options):
    """The kernel chooses by bits, in an order that is written down twice."""
    dual_clip, cap, kl, bonus = options
    case = rich("token", "ppo", "token_mean", dual_clip=dual_clip, cap=cap, kl=kl, entropy=bonus)
    logp, entropy, batch = make_batch(case, torch.float32)
    objective = make_objective(case)
    for left_out in ({}, {"ref_logp": None}, {"rollout_logp": None}):
        if ("ref_logp" in left_out and kl) or ("rollout_logp" in left_out and cap):
            continue
        rows, h = replace(batch, **left_out), entropy if bonus or left_out else None
        names = metric_names(rows, objective, h is not None)
        assert names == tuple(name for name in cuda.METRICS if name in names)
        want = run("reference", logp.double(), widened(rows), objective, None if h is None else h.double())
        agree(run("cuda", logp, rows, objective, h, device), want)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_many_rows_and_the_same_bits_again(device, ratio, aggregate):
    logp, entropy, batch, objective = large(ratio, aggregate)
    got = run("cuda", logp, batch, objective, entropy, device, d_loss=-3.0)
    agree(got, run("reference", logp.double(), widened(batch), objective, entropy.double(), d_loss=-3.0))
    same(got, run("cuda", logp, batch, objective, entropy, device, d_loss=-3.0))


def test_several_rows_of_a_thread(device):
    n = 256 * 512 + 300  # two each, but for the last blocks
    logp, mask = -torch.rand(n), torch.rand(n) < 0.8
    batch = rl.TokenBatch(torch.zeros(n, dtype=torch.int64), torch.tensor([0, n]), mask=mask,
                          advantage=torch.randn(n), old_logp=logp + 0.3 * torch.randn(n))  # fmt: skip
    objective = rl.Objective()
    agree(run("cuda", logp, batch, objective, None, device),
          run("reference", logp.double(), widened(batch), objective, None))  # fmt: skip


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize(("ratio", "surrogate"), [*itertools.product(("token", "none"), SURROGATES)])
def test_gradients_at_ties_and_bounds_are_those_of_autograd(device, ratio, surrogate, dual_clip):
    """Ratios on and beside the bounds, advantages of 0, log-ratios at and beyond +-20, dual clips met exactly."""
    log_ratios = torch.tensor([0.0, -0.0, 20.0, -20.0, 20.0001, -20.0001, 25.0, -25.0, 1e-8, 0.5, -0.5, 3.0])
    log_ratios = torch.cat([log_ratios, torch.tensor([0.5, 0.75, 1.25, 1.5, 2.0]).log()])
    grid = torch.cartesian_prod(log_ratios, torch.tensor([1.0, -1.0, 0.0, -0.0, 2.5, -2.5]))
    n = grid.shape[0]
    batch = rl.TokenBatch(
        torch.zeros(n, dtype=torch.int64), torch.tensor([0, n]), advantage=grid[:, 1].contiguous(),
        old_logp=torch.zeros(n), ref_logp=grid[:, 0].flip(0).contiguous(),
    )  # fmt: skip
    for estimator, clip in (("k1", (0.25, 0.25)), ("k2", (0.5, 0.5)), ("k3", (0.0, 0.0)), ("k3", (1.0, 1e9))):
        objective = rl.Objective(ratio, surrogate, clip, dual_clip, kl=rl.KL(estimator, 1e-7))
        (_, named, (want,)) = run("reference", grid[:, 0], batch, objective, None)
        (_, metrics, (got,)) = run("cuda", grid[:, 0], batch, objective, None, device)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-9)
        for key in named:
            # The differences to the reference add up to about 0 of numbers of size 20.
            torch.testing.assert_close(metrics[key], named[key], rtol=1e-5, atol=1e-6, msg=key)


def test_small_differences_keep_their_digits(device):
    for size in (1e-2, 1e-4, 1e-6):
        x = torch.linspace(0.5, 1.5, 37) * size
        exact = torch.special.expm1(-x.double()) + x.double()
        batch = rl.TokenBatch(torch.zeros(37, dtype=torch.int64), torch.tensor([0, 37]), advantage=torch.zeros(37),
                              old_logp=torch.zeros(37), ref_logp=torch.zeros(37))  # fmt: skip
        _, metrics, (grad,) = run("cuda", x, batch, rl.Objective(kl=rl.KL("k3", 1.0)), None, device)
        assert float(metrics["ref_kl_k3"]) == pytest.approx(float(exact.mean()), rel=1e-6)
        torch.testing.assert_close(grad.double(), -torch.special.expm1(-x.double()) / 37, rtol=1e-6, atol=0)


# ---- masks and NaN


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_values_change_nothing(device, ratio, aggregate):
    case = rich(ratio, "ppo", aggregate)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, torch.float32)
    clean = run("cuda", logp, batch, objective, entropy, device)
    hole = ~batch.mask
    for garbage in (torch.nan, torch.inf):
        names = [name for name in FIELDS if name not in ("logp", "entropy")]
        dirty = {name: torch.where(hole, garbage, getattr(batch, name)) for name in names}
        dirty_batch = replace(batch, target=torch.where(hole, -100, batch.target), **dirty)
        x, h = torch.where(hole, garbage, logp.detach()), torch.where(hole, garbage, entropy.detach())
        got = run("cuda", x, dirty_batch, objective, h, device)
        same(got, clean)
        assert not any(g[hole].any() for g in got[2])


@pytest.mark.parametrize("field", FIELDS)
def test_live_nan_reaches_the_loss(device, field):
    case = rich("token", "ppo", "token_mean", lengths=(40,))
    case.sequences[0][17]["mask"] = case.sequences[0][17]["kl_mask"] = True
    logp, entropy, batch = make_batch(case, torch.float32)
    values = {"logp": logp.detach().clone(), "entropy": entropy.detach().clone()}
    bad = values[field] if field in values else getattr(batch, field).clone()
    bad[17] = torch.nan
    if field not in values:
        batch = replace(batch, **{field: bad})
    loss, metrics, _ = run("cuda", values["logp"], batch, make_objective(case), values["entropy"], device)
    assert loss.isnan()
    _, named, _ = run("reference", values["logp"], batch, make_objective(case), values["entropy"])
    assert {k for k, v in metrics.items() if v.isnan()} == {k for k, v in named.items() if v.isnan()}


@pytest.mark.parametrize(("ratio", "aggregate"), [*itertools.product(RATIOS, AGGREGATES)])
def test_all_masked(device, ratio, aggregate):
    objective = rl.Objective(ratio, kl=rl.KL(), entropy=0.1, correction=rl.TIS(), aggregate=aggregate)
    logp, entropy, batch = make_batch(make_case(), torch.float32)
    masked = replace(batch, mask=torch.zeros_like(batch.mask), totals=None)
    loss, metrics, grads = run("cuda", logp, masked, objective, entropy, device)
    want, named, _ = run("reference", logp, masked, objective, entropy)
    assert loss.item() == 0 == want.item() and not any(g.any() for g in grads)
    assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in named.items()}


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_chunk_of_no_rows_is_for_the_reference(device, ratio):
    objective = rl.Objective(ratio, kl=rl.KL(), entropy=0.1, correction=rl.TIS())
    there = prepare_chunks(make_batch(make_case(), torch.float32)[2].to(device), objective)
    none = torch.empty(0, device=device)
    with rl.backend("cuda"):
        assert raw.evaluate_chunk(none, none, there, 3, 3, objective) is None


# ---- inputs, chunks, the op


def test_other_dtypes_and_strides(device):
    case = rich("sequence", "ppo", "seq_mean_token_mean")
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, torch.float32)
    plain = run("cuda", logp, batch, objective, entropy, device)
    spread = {k: torch.stack([getattr(batch, k)] * 2, 1)[:, 0] for k in FIELDS if getattr(batch, k, None) is not None}
    spread |= {k: torch.stack([getattr(batch, k)] * 2, 1)[:, 0] for k in ("mask", "kl_mask", "segment")}
    x, h = (torch.stack([t.detach()] * 3, 1)[:, 1] for t in (logp, entropy))
    same(run("cuda", x, replace(batch, **spread), objective, h, device), plain)
    same(run("cuda", logp, replace(batch, old_logp=batch.old_logp.double()), objective, entropy, device), plain)
    narrow = replace(batch, advantage=batch.advantage.bfloat16(), weight=batch.weight.half())
    rounded = replace(narrow, advantage=narrow.advantage.float(), weight=narrow.weight.float())
    results = [run("cuda", logp.bfloat16(), b, objective, entropy, device) for b in (narrow, rounded)]
    assert results[0][2][0].dtype == torch.bfloat16
    same(*results)


def test_padded_rows_are_the_same_batch(device):
    logp, mask = -torch.rand(3, 50), torch.rand(3, 50) < 0.7
    given = {"advantage": torch.randn(3, 50), "old_logp": logp + 0.2 * torch.randn(3, 50), "mask": mask}
    padded = rl.TokenBatch(torch.zeros(3, 50, dtype=torch.int64), **given)
    flat = rl.TokenBatch(torch.zeros(150, dtype=torch.int64), torch.tensor([0, 50, 100, 150]),
                         **{name: x.reshape(-1) for name, x in given.items()})  # fmt: skip
    for ratio in ("token", "sequence"):
        objective = rl.Objective(ratio, aggregate="seq_mean_token_mean")
        loss, metrics, (d,) = run("cuda", logp, padded, objective, None, device)
        other, named, (flat_d,) = run("cuda", logp.reshape(-1), flat, objective, None, device)
        same((loss, metrics, [d.reshape(-1)]), (other, named, [flat_d]))


@pytest.mark.parametrize("ratio", RATIOS)
def test_chunks_equal_chunk_loss(device, ratio):
    case = rich(ratio, "ppo", "seq_mean_token_mean")
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, torch.float32)
    prepared, there = prepare_chunks(batch, objective), prepare_chunks(batch.to(device), objective)
    cuts = prepared.borders(objective.scope) or [0, 3, 4, batch.N]
    for start, stop in itertools.pairwise(cuts):
        if start == stop:
            continue
        x, h = logp.detach()[start:stop].requires_grad_(), entropy.detach()[start:stop].requires_grad_()
        want, named = chunk_loss(x, h, prepared, start, stop, objective)
        expected = torch.autograd.grad(want, (x, h))
        with rl.backend("cuda"):
            on = x.detach().to(device), h.detach().to(device), there, start, stop, objective
            loss, metrics, *got = raw.evaluate_chunk(*on)
            only, _, *none = raw.evaluate_chunk(*on, gradients=False)
        torch.testing.assert_close(loss.cpu(), want.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(only, loss) and none == [None, None]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-7)
        for key in named:
            torch.testing.assert_close(metrics[key].cpu(), named[key], rtol=1e-5, atol=1e-6, msg=key)


def test_compiled(device):
    case = rich("sequence", "ppo", "seq_mean_token_mean")
    logp, entropy, batch = make_batch(case, torch.float32)
    objective, batch = make_objective(case), batch.to(device)
    logp, entropy = (x.detach().to(device).requires_grad_() for x in (logp, entropy))
    torch._dynamo.reset()
    with rl.backend("cuda"):
        loss, metrics = torch.compile(rl.policy_loss, fullgraph=True, backend="aot_eager")(
            logp, batch, objective, entropy
        )
        eager, named = rl.policy_loss(logp, batch, objective, entropy)
    assert metrics.keys() == named.keys() and torch.equal(loss, eager)
    expected = torch.autograd.grad(3 * eager, (logp, entropy))
    for got, want in zip(torch.autograd.grad(3 * loss, (logp, entropy)), expected, strict=True):
        assert torch.equal(got, want)


def test_only_where_it_is_asked_for(device):
    x = make_batch(make_case(), torch.float32)[0].detach().to(device)
    assert raw.implementation(x, None, rl.Objective()) is not cuda
    with rl.backend("cuda"):
        assert raw.implementation(x, None, rl.Objective()) is cuda
        assert raw.implementation(x.double(), None, rl.Objective()) is None


def test_the_folded_loss_differentiates_its_objective_there_too(device, monkeypatch):
    evaluated, evaluate = [], cuda.evaluate
    monkeypatch.setattr(cuda, "evaluate", lambda *given: evaluated.append(1) or evaluate(*given))
    hidden, weight = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(5, 8, device=device)
    batch = rl.TokenBatch(torch.arange(6, device=device) % 5, torch.tensor([0, 2, 6], device=device),
                          advantage=torch.randn(2, device=device))  # fmt: skip
    found = []
    for name in ("reference", "cuda"):
        with rl.backend(name):
            found += torch.autograd.grad(rl.linear_policy_loss(hidden, weight, batch, rl.Objective())[0], hidden)
    assert evaluated
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
