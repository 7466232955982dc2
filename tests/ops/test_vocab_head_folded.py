"""linear_policy_loss: folded against the reference for every objective, however a batch is cut."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_head_cases import DTYPES, SETTINGS, make, set_chunk
from vocab_head_folded_cases import OFFSETS, assert_same, batch_of, run

from accuracy import assert_accurate
from rlcore.algorithms import vocab_head as algorithm
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.objective import AGGREGATES, KL, RATIOS, SURROGATES, TIS, Objective
from rlcore.layout import TokenBatch
from rlcore.metrics import merge_metrics
from rlcore.ops import backend
from rlcore.ops.vocab_head import linear_policy_loss


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
