"""How a minibatch is cut, ordered, padded or packed changes neither its loss nor its gradient: every objective."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_cases import CUBE, make_batch, make_case, make_objective, padded, rich

import rlcore as rl
from oracles import policy_loss as oracle
from rlcore.algorithms.policy_loss import chunk_loss, prepare_chunks
from rlcore.layout import rows_of


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_micro_batches_sum_to_the_minibatch(ratio, surrogate, aggregate):
    case = rich(ratio, surrogate, aggregate)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case)
    loss, metrics = rl.policy_loss(logp, batch, objective, entropy=entropy)
    grad = torch.autograd.grad(loss, logp)[0]
    for size in (1, 5, 8, 100):
        parts = batch.split(size)
        assert sum(p.N for p in parts) == batch.N
        results = [rl.policy_loss(logp[p.rows], p, objective, entropy=entropy[p.rows]) for p in parts]
        total = torch.stack([r[0] for r in results]).sum()
        torch.testing.assert_close(total, loss, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(torch.autograd.grad(total, logp)[0], grad, rtol=1e-12, atol=1e-14)
        merged = rl.merge_metrics([r[1] for r in results])
        assert merged.keys() == metrics.keys()
        for name in metrics:
            torch.testing.assert_close(merged[name], metrics[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(("ratio", "surrogate", "aggregate"), CUBE)
def test_packed_equals_padded(ratio, surrogate, aggregate):
    """The same sequences in a padded rectangle, garbage in the padding: same loss, metrics and gradients."""
    case = rich(ratio, surrogate, aggregate)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case)
    loss, metrics = rl.policy_loss(logp, batch, objective, entropy=entropy)
    grad = torch.autograd.grad(loss, logp)[0]
    x, scores, rectangle, place = padded(logp, entropy, batch)
    x.requires_grad_()
    padded_loss, padded_metrics = rl.policy_loss(x, rectangle, objective, entropy=scores)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=1e-13)
    padded_grad = torch.autograd.grad(padded_loss, x)[0]
    assert padded_grad.shape == x.shape
    torch.testing.assert_close(padded_grad.reshape(-1)[place], grad, rtol=1e-12, atol=1e-14)
    assert torch.count_nonzero(padded_grad) == torch.count_nonzero(grad)
    for name in metrics:
        torch.testing.assert_close(padded_metrics[name], metrics[name], rtol=1e-10, atol=1e-12, msg=name)


@settings(max_examples=40, deadline=None)
@given(
    cell=st.sampled_from(CUBE),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(lambda x: sum(x) not in (0, len(x))),
    seed=st.integers(0, 2**16),
    size=st.integers(1, 12),
    data=st.data(),
)
def test_order_and_split_do_not_matter(cell, lengths, seed, size, data):
    ratio, surrogate, aggregate = cell
    options = {"dual_clip": 2.0, "cap": 1.5, "kl": ("k2", 0.1), "entropy": 0.01, "length": 5.0}
    case = make_case(lengths, seed, ratio=ratio, surrogate=surrogate, aggregate=aggregate, **options)
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case)
    loss, _ = rl.policy_loss(logp, batch, objective, entropy=entropy)
    assert loss.item() == pytest.approx(oracle.loss(case), rel=1e-9, abs=1e-12)
    shuffled = replace(case, sequences=data.draw(st.permutations(case.sequences)))
    logp, entropy, batch = make_batch(shuffled)
    parts = [rl.policy_loss(logp[p.rows], p, objective, entropy=entropy[p.rows])[0] for p in batch.split(size)]
    assert torch.stack(parts).sum().item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)


@given(
    cell=st.sampled_from(CUBE), most=st.integers(1, 30), whole=st.booleans(), seed=st.integers(0, 999),
    groups=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=5).filter(
        lambda groups: sum(map(sum, groups)) > sum(map(len, groups))  # more tokens than responses
    ),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_packing_groups_changes_nothing(cell, most, whole, seed, groups):
    """Loss, metrics and gradients of packed micro-batches sum to those of the minibatch, whatever lies together.

    Some responses are empty, and some micro-batches hold no others.
    """
    ratio, surrogate, aggregate = cell
    options = {"dual_clip": 2.0, "cap": 1.5, "kl": ("k2", 0.1), "entropy": 0.01, "length": 5.0}
    case = make_case([length for lengths in groups for length in lengths], seed, ratio=ratio, surrogate=surrogate,
                     aggregate=aggregate, **options)  # fmt: skip
    group = torch.tensor([g for g, lengths in enumerate(groups) for _ in lengths])
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case, group=group)
    loss, metrics = rl.policy_loss(logp, batch, objective, entropy=entropy)
    expected = torch.autograd.grad(loss, (logp, entropy))
    assert loss.item() == pytest.approx(oracle.loss(case), rel=1e-9, abs=1e-12)
    parts = []
    for sequences in rl.pack_groups([2] * len(groups), groups, most, whole):
        rows = rows_of(batch.offsets, torch.tensor(sequences))[0]
        parts.append(rl.policy_loss(logp[rows], batch.take(sequences), objective, entropy=entropy[rows]))
    total = torch.stack([part for part, _ in parts]).sum()
    torch.testing.assert_close(total, loss)
    for x, y in zip(torch.autograd.grad(total, (logp, entropy)), expected, strict=True):
        torch.testing.assert_close(x, y)
    merged = rl.merge_metrics([found for _, found in parts])
    for name, x in metrics.items():
        torch.testing.assert_close(merged[name], x, msg=name)


def test_chunks_anywhere_for_token_scope():
    case = rich("token", "ppo", "seq_mean_token_mean")
    objective = make_objective(case)
    logp, entropy, batch = make_batch(case)
    loss, metrics = rl.policy_loss(logp, batch, objective, entropy=entropy)
    prepared = prepare_chunks(batch, objective, torch.float64)
    assert prepared.borders("token") is None
    for size in (1, 3, 16):
        cuts = [*range(0, batch.N, size), batch.N]
        parts = [chunk_loss(logp[a:b], entropy[a:b], prepared, a, b, objective) for a, b in itertools.pairwise(cuts)]
        torch.testing.assert_close(torch.stack([p[0] for p in parts]).sum(), loss)
        merged = rl.merge_metrics([p[1] for p in parts])
        for name in metrics:
            torch.testing.assert_close(merged[name], metrics[name], msg=name)
