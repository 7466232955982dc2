"""The policy loss on a GPU against the float64 oracle and the reference: tests of each language that it is written in.

tests/kernels/test_policy_loss.py and tests/cuda/test_policy_loss.py run them. Their fixtures: `name` of the backend,
`device` of the tensors that it takes there, and `several_programs` for 2500 rows.
"""

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
from rlcore.algorithms.policy_loss import chunk_loss, prepare_chunks
from rlcore.algorithms.policy_loss_metrics import metric_names
from rlcore.layout_checks import PER_TOKEN, PER_TOKEN_OR_SEQUENCE
from rlcore.ops import policy_loss_raw as raw

AGGREGATES = ("token_mean", "seq_mean_token_mean")


def evaluator(name: str):
    return {"triton": raw.policy_loss_triton, "cuda": raw.policy_loss_cuda}[name]


@pytest.mark.parametrize("ratio", RATIOS)
def test_no_rows(name, device, ratio):
    """A micro-batch of empty responses alone: nothing to launch on."""
    case = rich(ratio, "ppo", "token_mean")
    logp, entropy, batch = make_batch(case, torch.float32)
    empty = batch.derived(offsets=torch.tensor([0, 0]), **{
        name: x[:0] for name in (*PER_TOKEN, *PER_TOKEN_OR_SEQUENCE) if (x := getattr(batch, name)) is not None
    })  # fmt: skip
    loss, metrics, gradients = run(name, logp[:0], empty, make_objective(case), entropy[:0], device)
    assert loss == 0 and metrics["tokens"] == 0 and all(g.shape == (0,) for g in gradients)


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_the_cube(name, device, ratio, surrogate, aggregate):
    case = rich(ratio, surrogate, aggregate, seed=3)
    objective = make_objective(case)
    exact = make_batch(case)
    wide = run("reference", exact[0], exact[2], objective, exact[1])
    assert wide[0].item() == pytest.approx(oracle.loss(case), rel=1e-12)
    logp, entropy, batch = make_batch(case, torch.float32)
    got = run(name, logp, batch, objective, entropy, device)
    plain = run("reference", logp, batch, objective, entropy)
    assert got[0].dtype == torch.float32
    assert tuple(got[1]) == metric_names(batch, objective, True)
    agree(got, wide)
    largest = max(float(g.abs().max()) for g in wide[2])
    for g, exact_g, base in zip(got[2], wide[2], plain[2], strict=True):
        assert_accurate(g, exact_g, base, gradient=True, norm=largest)


@pytest.mark.parametrize(("ratio", "surrogate"), [*itertools.product(RATIOS, SURROGATES)])
def test_plain_objectives_without_options(name, device, ratio, surrogate):
    """No mask, no weight, no entropy, no old_logp for half of them: absent fields."""
    case = make_case((4, 1, 0, 6), 5, ratio=ratio, surrogate=surrogate, aggregate="seq_mean_token_sum")
    logp, _, batch = make_batch(case, torch.float32)
    for old in (batch.old_logp, None):
        bare = rl.TokenBatch(batch.target, batch.offsets, advantage=batch.advantage, old_logp=old,
                             segment=batch.segment)  # fmt: skip
        want = run("reference", logp.double(), widened(bare), make_objective(case), None)
        agree(run(name, logp, bare, make_objective(case), None, device), want)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_many_rows_and_the_same_bits_again(name, device, several_programs, ratio, aggregate):
    logp, entropy, batch, objective = large(ratio, aggregate)
    got = run(name, logp, batch, objective, entropy, device, d_loss=-3.0)
    agree(got, run("reference", logp.double(), widened(batch), objective, entropy.double(), d_loss=-3.0))
    same(got, run(name, logp, batch, objective, entropy, device, d_loss=-3.0))


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize(("ratio", "surrogate"), [*itertools.product(("token", "none"), SURROGATES)])
def test_gradients_at_ties_and_bounds_are_those_of_autograd(name, device, ratio, surrogate, dual_clip):
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
        (_, metrics, (got,)) = run(name, grid[:, 0], batch, objective, None, device)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-9)
        for key in named:
            # Means of log-ratios up to 20, which cancel: the error rule allows 4 eps * 20, 1e-5.
            torch.testing.assert_close(metrics[key], named[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("ratio", ["segment", "sequence"])
def test_a_mean_log_ratio_beyond_the_bound_moves_nothing(name, device, ratio):
    logp = torch.zeros(6)
    batch = rl.TokenBatch(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 2, 4, 6]), advantage=-torch.ones(6),
                          old_logp=torch.tensor([-25.0, -16.0, 25.0, 16.0, -0.5, -0.25]),
                          segment=torch.zeros(6, dtype=torch.int64))  # fmt: skip
    objective = rl.Objective(ratio, "reinforce")
    got = run(name, logp, batch, objective, None, device)
    agree(got, run("reference", logp.double(), widened(batch), objective, None))
    assert not got[2][0][:4].any() and got[2][0][4:].all()


def test_small_differences_keep_their_digits(name, device):
    for size in (1e-2, 1e-4, 1e-6):
        x = torch.linspace(0.5, 1.5, 37) * size
        exact = torch.special.expm1(-x.double()) + x.double()
        batch = rl.TokenBatch(torch.zeros(37, dtype=torch.int64), torch.tensor([0, 37]), advantage=torch.zeros(37),
                              old_logp=torch.zeros(37), ref_logp=torch.zeros(37))  # fmt: skip
        _, metrics, (grad,) = run(name, x, batch, rl.Objective(kl=rl.KL("k3", 1.0)), None, device)
        assert float(metrics["ref_kl_k3"]) == pytest.approx(float(exact.mean()), rel=1e-6)
        torch.testing.assert_close(grad.double(), -torch.special.expm1(-x.double()) / 37, rtol=1e-6, atol=0)


# ---- masks and NaN


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_values_change_nothing(name, device, ratio, aggregate):
    case = rich(ratio, "ppo", aggregate)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, torch.float32)
    clean = run(name, logp, batch, objective, entropy, device)
    hole = ~batch.mask
    for garbage in (torch.nan, torch.inf):
        names = [name for name in FIELDS if name not in ("logp", "entropy")]
        dirty = {name: torch.where(hole, garbage, getattr(batch, name)) for name in names}
        dirty_batch = replace(batch, target=torch.where(hole, -100, batch.target), **dirty)
        x, h = torch.where(hole, garbage, logp.detach()), torch.where(hole, garbage, entropy.detach())
        got = run(name, x, dirty_batch, objective, h, device)
        same(got, clean)
        assert not any(g[hole].any() for g in got[2])


@pytest.mark.parametrize("field", FIELDS)
def test_live_nan_reaches_the_loss(name, device, field):
    case = rich("token", "ppo", "token_mean", lengths=(40,))
    case.sequences[0][17]["mask"] = case.sequences[0][17]["kl_mask"] = True
    logp, entropy, batch = make_batch(case, torch.float32)
    values = {"logp": logp.detach().clone(), "entropy": entropy.detach().clone()}
    bad = values[field] if field in values else getattr(batch, field).clone()
    bad[17] = torch.nan
    if field not in values:
        batch = replace(batch, **{field: bad})
    loss, metrics, _ = run(name, values["logp"], batch, make_objective(case), values["entropy"], device)
    assert loss.isnan()
    _, named, _ = run("reference", values["logp"], batch, make_objective(case), values["entropy"])
    assert {k for k, v in metrics.items() if v.isnan()} == {k for k, v in named.items() if v.isnan()}


@pytest.mark.parametrize(("ratio", "aggregate"), [*itertools.product(RATIOS, AGGREGATES)])
def test_all_masked(name, device, ratio, aggregate):
    objective = rl.Objective(ratio, kl=rl.KL(), entropy=0.1, correction=rl.TIS(), aggregate=aggregate)
    logp, entropy, batch = make_batch(make_case(), torch.float32)
    masked = replace(batch, mask=torch.zeros_like(batch.mask), totals=None)
    loss, metrics, grads = run(name, logp, masked, objective, entropy, device)
    want, named, _ = run("reference", logp, masked, objective, entropy)
    assert loss.item() == 0 == want.item() and not any(g.any() for g in grads)
    assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in named.items()}


# ---- inputs, chunks, the op


def test_other_dtypes_and_strides(name, device):
    case = rich("sequence", "ppo", "seq_mean_token_mean")
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, torch.float32)
    plain = run(name, logp, batch, objective, entropy, device)
    spread = {k: torch.stack([getattr(batch, k)] * 2, 1)[:, 0] for k in FIELDS if getattr(batch, k, None) is not None}
    spread |= {k: torch.stack([getattr(batch, k)] * 2, 1)[:, 0] for k in ("mask", "kl_mask", "segment")}
    x, h = (torch.stack([t.detach()] * 3, 1)[:, 1] for t in (logp, entropy))
    same(run(name, x, replace(batch, **spread), objective, h, device), plain)
    same(run(name, logp, replace(batch, old_logp=batch.old_logp.double()), objective, entropy, device), plain)
    narrow = replace(batch, advantage=batch.advantage.bfloat16(), weight=batch.weight.half())
    rounded = replace(narrow, advantage=narrow.advantage.float(), weight=narrow.weight.float())
    results = [run(name, logp.bfloat16(), b, objective, entropy, device) for b in (narrow, rounded)]
    assert results[0][2][0].dtype == torch.bfloat16
    same(*results)


def test_padded_rows_are_the_same_batch(name, device):
    logp, mask = -torch.rand(3, 50), torch.rand(3, 50) < 0.7
    given = {"advantage": torch.randn(3, 50), "old_logp": logp + 0.2 * torch.randn(3, 50), "mask": mask}
    padded = rl.TokenBatch(torch.zeros(3, 50, dtype=torch.int64), **given)
    flat = rl.TokenBatch(torch.zeros(150, dtype=torch.int64), torch.tensor([0, 50, 100, 150]),
                         **{name: x.reshape(-1) for name, x in given.items()})  # fmt: skip
    for ratio in ("token", "sequence"):
        objective = rl.Objective(ratio, aggregate="seq_mean_token_mean")
        loss, metrics, (d,) = run(name, logp, padded, objective, None, device)
        other, named, (flat_d,) = run(name, logp.reshape(-1), flat, objective, None, device)
        same((loss, metrics, [d.reshape(-1)]), (other, named, [flat_d]))


@pytest.mark.parametrize("ratio", RATIOS)
def test_chunks_equal_chunk_loss(name, device, ratio):
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
        with rl.backend(name):
            on = x.detach().to(device), h.detach().to(device), there, start, stop, objective
            loss, metrics, *got = raw.evaluate_chunk(*on)
            only, _, *none = raw.evaluate_chunk(*on, gradients=False)
        torch.testing.assert_close(loss.cpu(), want.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(only, loss) and none == [None, None]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-7)
        for key in named:
            torch.testing.assert_close(metrics[key].cpu(), named[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_chunk_of_no_rows_is_for_the_reference(name, device, ratio):
    objective = rl.Objective(ratio, kl=rl.KL(), entropy=0.1, correction=rl.TIS())
    there = prepare_chunks(make_batch(make_case(), torch.float32)[2].to(device), objective)
    none = torch.empty(0, device=device)
    with rl.backend(name):
        assert raw.evaluate_chunk(none, none, there, 3, 3, objective) is None


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_folded_head_takes_it_for_its_chunks(name, device, ratio, monkeypatch):
    batch = make_batch(rich(ratio, "ppo", "token_mean"), torch.float32)[2]
    batch = replace(batch, target=torch.arange(batch.N) % 11)
    objective = rl.Objective(ratio, kl=rl.KL("k3", 0.1), entropy=0.01)
    hidden, weight = torch.randn(batch.N, 8), torch.randn(11, 8)
    module, calls, results = evaluator(name), [], []
    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *a: calls.append(1) or evaluate(*a))
    for backend, place in (("reference", "cpu"), (name, device)):
        leaves = [x.to(place).requires_grad_() for x in (hidden, weight)]
        with rl.backend(backend):
            loss, metrics = rl.linear_policy_loss(*leaves, batch.to(place), objective)
        results.append((loss.detach().cpu(), metrics, [g.cpu() for g in torch.autograd.grad(loss, leaves)]))
    assert calls
    (want, named, expected), (loss, metrics, grads) = results
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == named.keys()
    for got, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)


def test_backward_runs_again_but_is_not_differentiable(name, device):
    logp, _, batch = make_batch(make_case(), torch.float32)
    logp = logp.detach().to(device).requires_grad_()
    with rl.backend(name):
        loss, metrics = rl.policy_loss(logp, batch.to(device), rl.Objective())
    assert not any(m.requires_grad for m in metrics.values())
    first = torch.autograd.grad(loss, logp, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(-2 * loss, logp, retain_graph=True)[0], -2 * first)
    with pytest.raises(RuntimeError, match=r'differentiated twice.*rl\.backend\("reference"\)'):
        torch.autograd.grad(loss, logp, create_graph=True)


def test_compiled(name, device):
    case = rich("sequence", "ppo", "seq_mean_token_mean")
    logp, entropy, batch = make_batch(case, torch.float32)
    objective, batch = make_objective(case), batch.to(device)
    logp, entropy = (x.detach().to(device).requires_grad_() for x in (logp, entropy))
    torch._dynamo.reset()
    with rl.backend(name):
        loss, metrics = torch.compile(rl.policy_loss, fullgraph=True, backend="aot_eager")(
            logp, batch, objective, entropy
        )
        eager, named = rl.policy_loss(logp, batch, objective, entropy)
    assert metrics.keys() == named.keys() and torch.equal(loss, eager)
    expected = torch.autograd.grad(3 * eager, (logp, entropy))
    for got, want in zip(torch.autograd.grad(3 * loss, (logp, entropy)), expected, strict=True):
        assert torch.equal(got, want)


# ---- on a GPU alone


@pytest.fixture
def gpu(device) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU")


def million():
    """(leaf, entropy, batch) on the GPU."""
    n = 1 << 20
    logp, entropy = (-torch.rand(n, device="cuda")).requires_grad_(), torch.rand(n, device="cuda").requires_grad_()
    batch = rl.TokenBatch(torch.zeros(n, dtype=torch.int64, device="cuda"), torch.tensor([0, n], device="cuda"),
                          advantage=torch.randn(n, device="cuda"), old_logp=logp.detach() + 0.1)  # fmt: skip
    return logp, entropy, batch


@pytest.mark.parametrize("ratio", RATIOS)
def test_nothing_waits_for_the_device(name, gpu, ratio):
    logp, entropy, batch, objective = large(ratio, "seq_mean_token_mean")
    batch, logp, entropy = batch.to("cuda"), logp.cuda().requires_grad_(), entropy.cuda().requires_grad_()
    with rl.backend(name):
        rl.policy_loss(logp, batch, objective, entropy)[0].backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            rl.policy_loss(logp, batch, objective, entropy)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_in_a_cuda_graph(name, gpu, ratio):
    """A captured launch has a counter of its own; those outside go on with theirs."""
    logp, entropy, batch, objective = large(ratio, "seq_mean_token_mean")
    batch, logp, entropy = batch.to("cuda"), logp.cuda(), entropy.cuda()
    evaluate = lambda: evaluator(name).evaluate(logp, entropy, batch, objective, (True, True))  # noqa: E731
    eager = evaluate()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate()
    for _ in range(3):
        for x in captured:
            x.zero_()
        graph.replay()
        again = evaluate()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(eager, captured, again, strict=True))


def test_launches_on_several_streams_at_once(name, gpu):
    logp, _, batch = million()
    evaluate = lambda: evaluator(name).evaluate(logp.detach(), None, batch, rl.Objective(), (True, False))  # noqa: E731
    first, found = evaluate(), []
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for i in range(64):
        with torch.cuda.stream(streams[i % 4]):
            found.append(evaluate())
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for out in found for x, y in zip(out, first, strict=True))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_million_tokens_take_two_launches_and_one_more_for_sequences(name, gpu, ratio):
    leaf, entropy, batch = million()
    objective, one = rl.Objective(ratio, entropy=0.01), torch.ones((), device="cuda")

    def step():
        rl.policy_loss(leaf, batch, objective, entropy)[0].backward(one)
        leaf.grad = entropy.grad = None
        torch.cuda.synchronize()

    with rl.backend(name):
        step()  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
    launches = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launches) <= 2 + (ratio == "sequence"), launches


def test_more_than_2_to_the_31_rows(name, gpu):
    n = 2**31 + 5
    logp, advantage = torch.zeros(n, device="cuda"), torch.ones(n, device="cuda")
    batch = rl.TokenBatch(torch.zeros(1, dtype=torch.int64, device="cuda").expand(n),
                          torch.tensor([0, n], device="cuda"), advantage=advantage)  # fmt: skip
    out = evaluator(name).evaluate(logp, None, batch, rl.Objective(), (True, False))
    assert out.loss.item() == pytest.approx(-1.0, rel=1e-5)
    assert (out.d_logp[[0, 2**31 - 1, 2**31, n - 1]].cpu() * n).tolist() == pytest.approx([-1.0] * 4, rel=1e-5)
