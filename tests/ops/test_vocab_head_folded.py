"""linear_policy_loss: folded against the reference for every objective, and what its backward pass promises."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from vocab_head_cases import DTYPES, SETTINGS, make, set_chunk

import rlcore as rl
from accuracy import assert_accurate, to_float64
from rlcore.algorithms import vocab_head as algorithm
from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_products as products
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.objective import AGGREGATES, KL, RATIOS, SURROGATES, TIS, Objective
from rlcore.layout import TokenBatch
from rlcore.metrics import merge_metrics
from rlcore.ops import backend
from rlcore.ops.vocab_head import linear_logprob, linear_policy_loss

OFFSETS = [0, 1, 13, 13, 30, 47]


def batch_of(case, seed=0, offsets=OFFSETS, **fields):
    """A batch with every field that an objective may read; old log-probs close to the policy's."""
    g = torch.Generator().manual_seed(seed)
    shape = case.target.shape
    randn = lambda: torch.randn(shape, generator=g)  # noqa: E731
    with torch.no_grad():
        exact = algorithm.linear_logprob(case.hidden, case.weight, case.target, **case.kwargs()).logp.float()
    group = torch.tensor([0, 0, 1, 1, 1]) if len(shape) == 1 else torch.arange(shape[0]) // 2
    fields = {
        "advantage": randn() * (torch.rand(shape, generator=g) < 0.8),
        "old_logp": exact + 0.2 * randn(), "ref_logp": exact + 0.3 * randn(), "rollout_logp": exact + 0.2 * randn(),
        "segment": torch.randint(3, shape, generator=g).cumsum(-1), "group": group, "mask": case.mask,
        "weight": torch.rand(shape, generator=g), **fields,
    }  # fmt: skip
    return TokenBatch(case.target, torch.tensor(offsets) if len(shape) == 1 else None, **fields)


def run(case, batch, objective, factor=1.0):
    """(loss, metrics, gradients of factor * loss)."""
    case = case.fresh()
    loss, metrics = linear_policy_loss(case.hidden, case.weight, batch, objective, case.bias, **case.numbers())
    return loss, metrics, torch.autograd.grad(loss * factor, case.leaves)


def assert_same(found, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    assert list(found[1]) == list(expected[1])
    for name, x in expected[1].items():
        torch.testing.assert_close(found[1][name].to(x.dtype), x, rtol=rtol, atol=atol, msg=f"metric {name} differs")
    for x, y in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), list(itertools.product(RATIOS, SURROGATES, AGGREGATES)))
def test_folded_equals_reference(ratio, surrogate, aggregate, monkeypatch):
    """Every surrogate x ratio x aggregation, with all the terms, in chunks shorter than some sequences."""
    set_chunk(monkeypatch, 123, 9, 4, itemsize=8)
    case = make("random", "rows", torch.float64, masked=0.3)
    batch = batch_of(case)
    objective = Objective(ratio, surrogate, (0.1, 0.15), 3.0, TIS(1.5), KL("k3", 0.1), 0.05, aggregate, length=16.0)
    with backend.backend("reference"):
        expected = run(case, batch, objective, 3.0)
    assert_same(run(case, batch, objective, 3.0), expected)


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(entropy=0.1), Objective(kl=KL("k2", 0.5)), Objective("none")]
)
@pytest.mark.parametrize("bare", [False, True])
def test_plain_objectives(objective, bare, monkeypatch):
    """Without optional terms and fields, on policy or not."""
    set_chunk(monkeypatch, 123, 9, 4, itemsize=8)
    case = make("random", "bias", torch.float64)
    batch = batch_of(case)
    if bare:
        kl = objective.kl is not None
        batch = TokenBatch(
            batch.target, batch.offsets, advantage=batch.advantage, ref_logp=batch.ref_logp if kl else None
        )
    with backend.backend("reference"):
        expected = run(case, batch, objective)
    assert_same(run(case, batch, objective), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("data", ["random", "peaked"])
def test_accuracy(data, setting, dtype, monkeypatch):
    """Loss and gradients against the float64 oracle, REINFORCE with an entropy bonus: both coefficients are known."""
    set_chunk(monkeypatch, 123, 9, 4)
    case = make(data, setting, dtype, masked=0.2)
    advantage = torch.randn(47)
    batch = TokenBatch(case.target, torch.tensor(OFFSETS), mask=case.mask, advantage=advantage)
    loss, _, gradients = run(case, batch, Objective("none", "reinforce", entropy=0.5))
    tokens = float(case.mask.sum())
    head = case.oracle()
    logp, entropy = head.forward()
    d_logp, d_entropy = -advantage.double().numpy() / tokens, torch.full((47,), -0.5 / tokens).double().numpy()

    again = case.fresh()
    base_logp, base_entropy = again.baseline()
    base = -(advantage * base_logp + 0.5 * base_entropy).masked_fill(~case.mask, 0).sum() / tokens
    base_gradients = torch.autograd.grad(base, again.leaves)
    sizes = abs(d_logp * logp).sum() + abs(d_entropy * entropy).sum()
    assert_accurate(loss, (d_logp * logp + d_entropy * entropy).sum(), base, norm=sizes, name="loss")
    expected = head.backward(d_logp, d_entropy)
    norm = max(abs(x).max() for x in expected)
    for name, x, y, z in zip(("hidden", "weight", "bias"), gradients, expected, base_gradients, strict=False):
        assert x.dtype == z.dtype == dtype
        assert_accurate(x, y, z, gradient=True, norm=norm, name=f"d_{name}")


@given(
    ratio=st.sampled_from(RATIOS), rows=st.integers(1, 60), block=st.integers(1, 9), seed=st.integers(0, 50),
    aggregate=st.sampled_from(AGGREGATES), masked=st.sampled_from([0.0, 0.4, 0.9]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_chunk_size_changes_nothing(ratio, rows, block, seed, aggregate, masked):
    case = make("random", "rows", torch.float64, masked=masked, seed=seed)
    batch = batch_of(case, seed)
    objective = Objective(ratio, entropy=0.1, kl=KL(), aggregate=aggregate, length=16.0)
    expected = run(case, batch, objective)
    with pytest.MonkeyPatch.context() as patch:
        set_chunk(patch, 123, rows, block, itemsize=8)
        assert_same(run(case, batch, objective), expected)


@given(
    ratio=st.sampled_from(RATIOS),
    size=st.integers(1, 50),
    seed=st.integers(0, 50),
    aggregate=st.sampled_from(AGGREGATES),
)
@settings(max_examples=20, deadline=None)
def test_splitting_changes_nothing(ratio, size, seed, aggregate):
    """Losses, metrics and gradients of micro-batches add up to the minibatch's."""
    case = make("random", "bias", torch.float64, masked=0.3, seed=seed)
    batch = batch_of(case, seed)
    objective = Objective(ratio, entropy=0.1, kl=KL(), correction=TIS(), aggregate=aggregate, length=16.0)
    expected = run(case, batch, objective)
    fresh = case.fresh()
    losses, metrics = [], []
    for part in batch.split(size):
        loss, found = linear_policy_loss(
            fresh.hidden[part.rows], fresh.weight, part, objective, fresh.bias, **fresh.numbers()
        )
        loss.backward()
        losses.append(loss.detach())
        metrics.append(found)
    assert_same((sum(losses), merge_metrics(metrics), [x.grad for x in fresh.leaves]), expected)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_micro_batch_without_rows_adds_nothing(ratio, aggregate):
    """Empty answers that a packing put together: loss and gradients are zero, metrics merge."""
    case = make("random", "bias", torch.float32).fresh()
    batch = batch_of(case)
    objective = Objective(ratio, entropy=0.1, kl=KL(), correction=TIS(), aggregate=aggregate, length=16.0)
    hidden = case.hidden[:0]
    loss, metrics = linear_policy_loss(
        hidden, case.weight, batch.take([2]), objective, case.bias, **case.numbers()
    )
    loss.backward()
    assert loss == 0 and all(x.grad is None or not x.grad.any() for x in case.leaves)
    _, expected = linear_policy_loss(case.hidden, case.weight, batch, objective, case.bias, **case.numbers())
    assert_same((loss, merge_metrics([expected, metrics]), ()), (loss, expected, ()))


@pytest.mark.parametrize("ratio", RATIOS)
def test_padded_equals_packed_and_masks_hide_everything(ratio, monkeypatch):
    """[B, T] whose mask covers NaN, inf and -100 equals the packed batch of what is left, in every sum."""
    set_chunk(monkeypatch, 123, 9, 4, itemsize=8)
    case = make("random", "rows", torch.float64, shape=(4, 13), masked=0.4)
    batch = batch_of(case)
    keep = case.mask
    kept = keep.reshape(-1)
    fields = ("advantage", "old_logp", "ref_logp", "rollout_logp", "weight", "segment")
    packed = TokenBatch(
        case.target[keep], torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)]), group=batch.group,
        **{name: getattr(batch, name)[keep] for name in fields},
    )  # fmt: skip
    dense = replace(
        case, hidden=case.hidden[keep], target=case.target[keep], temperature=case.temperature[keep], mask=None
    )
    poisoned = replace(case, hidden=case.hidden.masked_fill(~keep[..., None], torch.nan),
                       target=case.target.masked_fill(~keep, -100),
                       temperature=case.temperature.masked_fill(~keep, torch.nan))  # fmt: skip
    holes = TokenBatch(
        poisoned.target, mask=keep, group=batch.group, segment=batch.segment,
        **{name: getattr(batch, name).masked_fill(~keep, torch.inf) for name in fields[:-1]},
    )  # fmt: skip
    objective = Objective(ratio, entropy=0.1, kl=KL(), correction=TIS())
    loss, metrics, (d_hidden, *rest) = run(poisoned, holes, objective)
    assert not d_hidden[~keep].any()
    found = (loss, metrics, [d_hidden.reshape(-1, 31)[kept], *rest])
    expected = run(dense, packed, objective)
    assert_same(found, expected)
    monkeypatch.setattr(selection, "compacts", lambda device: False)  # as on a GPU
    loss, metrics, (d_hidden, *rest) = run(poisoned, holes, objective)
    assert_same((loss, metrics, [d_hidden.reshape(-1, 31)[kept], *rest]), expected)


def test_all_masked_is_zero():
    case = make("random", "bias")
    batch = TokenBatch(
        case.target, torch.tensor(OFFSETS), mask=torch.zeros(47, dtype=torch.bool), advantage=torch.ones(47)
    )
    loss, _, gradients = run(replace(case, hidden=case.hidden * torch.nan), batch, Objective(entropy=0.1))
    assert loss == 0 and not any(x.any() for x in gradients)


# ------------------------------------------------------------------------------------------------ scopes


def pairwise(logp, entropy, batch):
    """A loss of group scope: every token against the mean log-prob of its group."""
    group = batch.group[batch.sequence_id()] if batch.group is not None else torch.zeros_like(batch.target)
    member = (group[:, None] == group[None, :]).to(logp.dtype)
    if batch.mask is not None:
        member = member * batch.mask.to(logp.dtype)
    return (logp - member @ logp / member.sum(1).clamp(min=1)) ** 2, {"logp_seen": logp}


def test_group_scope(monkeypatch):
    case = make("random", "bias", torch.float64, masked=0.3)
    batch = batch_of(case)
    objective = Objective.custom(pairwise, scope="group")
    with backend.backend("reference"):
        expected = run(case, batch, objective)
    for rows in (60, 20, 5):
        set_chunk(monkeypatch, 123, rows, 4, itemsize=8)
        assert_same(run(case, batch, objective), expected)


def freeze(logp, entropy, batch):
    """Batch scope: keep the half of the tokens with the higher entropy, and centre the advantage on the whole batch."""
    keep = torch.ones_like(logp, dtype=torch.bool) if batch.mask is None else batch.mask
    middle = entropy[keep].median()
    centred = batch.advantage - batch.advantage[keep].mean()
    return replace(batch, weight=(entropy >= middle).to(logp.dtype), advantage=centred)


def weighted(logp, entropy, batch):
    return -batch.weight * batch.advantage * logp - 0.1 * entropy, {}


@pytest.mark.parametrize("padded", [False, True])
def test_batch_scope(padded, monkeypatch):
    set_chunk(monkeypatch, 123, 9, 4, itemsize=8)
    case = make("random", "bias", torch.float64, shape=(4, 13) if padded else (47,), masked=0.3)
    batch = batch_of(case)
    objective = Objective.custom(weighted, scope="batch", prepare=freeze, needs_entropy=True)
    with backend.backend("reference"):
        expected = run(case, batch, objective)
    assert_same(run(case, batch, objective), expected)
    direct = algorithm.folded(
        case.hidden.reshape(-1, 31), case.weight, batch, objective, case.bias, *case.numbers().values()
    )  # fmt: skip
    torch.testing.assert_close(direct.loss, expected[0])
    with pytest.raises(ValueError, match="prepare"):
        part = batch.split(20)[0]
        hidden = case.hidden[part.sequences] if padded else case.hidden[part.rows]
        linear_policy_loss(hidden, case.weight, part, objective, case.bias)


def test_custom_objective_whose_entropy_gradient_was_not_announced(monkeypatch):
    """It is differentiated all the same: an entropy gradient is never lost in silence."""
    set_chunk(monkeypatch, 123, 9, 4, itemsize=8)
    case = make("random", "bias", torch.float64)
    objective = Objective.custom(lambda logp, entropy, batch: (logp * batch.advantage + entropy, {"h": entropy}))
    with backend.backend("reference"):
        expected = run(case, batch_of(case), objective)
    assert_same(run(case, batch_of(case), objective), expected)


def test_debug_mode_finds_a_loss_that_depends_on_chunks():
    case = make()
    honest = Objective.custom(lambda logp, entropy, batch: (-logp * batch.advantage, {}), debug=True)
    run(case, batch_of(case), honest)
    with pytest.raises(ValueError, match="depends on where"):
        run(case, batch_of(case), Objective.custom(lambda logp, entropy, batch: (logp * logp.sum(), {}), debug=True))


# ------------------------------------------------------------------------------------------------ backward semantics


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
