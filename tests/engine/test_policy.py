"""The two layouts of an update, prefix trees with the folded head and padded rows with logits: the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch

import rlcore as rl
from rlcore.engine.errors import UserError
from rlcore.engine.packs import Pack
from rlcore.engine.policy import Policy
from rlcore.engine.rollout import take
from rlcore.layout import TokenBatch
from rlcore.methods import methods
from rlcore.ops.policy_loss import KL, Objective

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [30], [5, 6, 7, 8, 40, 41, 42, 43, 44]]
RESPONSES = [[[11, 12, 1], [11, 12, 1], [11, 13, 14, 1]], [[1], [20, 21]], [[31, 32, 33, 34, 35, 1]], [[11, 1], [12]]]
PACK = Pack(PROMPTS, RESPONSES, torch.device("cpu"))


def ragged_batch(with_old: bool = True) -> TokenBatch:
    answers = [answer for group in RESPONSES for answer in group]
    target = torch.tensor([token for answer in answers for token in answer])
    offsets = torch.tensor([0, *(len(answer) for answer in answers)]).cumsum(0)
    group = torch.tensor([g for g, answers in enumerate(RESPONSES) for _ in answers])
    generator = torch.Generator().manual_seed(0)
    logp = -5 + torch.rand(len(target), generator=generator)
    return TokenBatch(
        target, offsets, group=group, advantage=torch.randn(len(target), generator=generator),
        old_logp=logp if with_old else None, ref_logp=logp + 0.1, rollout_logp=logp,
    )  # fmt: skip


def loss_and_gradients(policy: Policy, objective: Objective):
    policy.model.zero_grad()
    loss, metrics = policy.loss(PACK, ragged_batch(), objective)
    loss.backward()
    return loss.detach(), metrics, {name: p.grad.clone() for name, p in policy.model.named_parameters()}


@pytest.fixture
def both(small):
    model = small[0]
    return Policy(copy.deepcopy(model), 0, "tree", 0.9), Policy(copy.deepcopy(model), 0, "padded", 0.9)


@pytest.mark.parametrize("key", [*methods(), "kl and entropy", "sequence ratio"])
def test_tree_update_equals_padded_update(both, key):
    """Loss and every gradient to 1e-5 relative, ragged prompts and answers, shared beginnings, equal answers."""
    special = {
        "kl and entropy": Objective(kl=KL("k3", 0.1), entropy=0.01),
        "sequence ratio": Objective(ratio="sequence", aggregate="seq_mean_token_mean"),
    }
    objective = special[key] if key in special else methods()[key].objective()
    tree, padded = (loss_and_gradients(policy, objective) for policy in both)
    torch.testing.assert_close(tree[0], padded[0], rtol=1e-5, atol=1e-7)
    norm = torch.stack([g.norm() for g in padded[2].values()]).norm()
    assert norm > 0
    for name, expected in padded[2].items():
        assert (tree[2][name] - expected).norm() <= 1e-5 * max(expected.norm(), norm / 10), name
    for name, expected in padded[1].items():
        torch.testing.assert_close(tree[1][name], expected, rtol=1e-4, atol=1e-5)


def test_log_probs_of_both_layouts(both):
    tree, padded = (policy.logp(PACK, ragged_batch()) for policy in both)
    torch.testing.assert_close(tree, padded, rtol=0, atol=1e-5)


def test_trees_are_the_default(small):
    from rlcore.engine.config import Config

    assert Policy(copy.deepcopy(small[0]), 0, Config().update.layout).layout == "tree"


def test_tree_shares_prompts_and_beginnings():
    tree = PACK.tree
    batch = ragged_batch()
    assert torch.equal(tree.target, batch.target)
    assert torch.equal(tree.offsets, batch.offsets)
    assert torch.equal(tree.group, batch.group)
    paths = {tuple(p + r) for p, group in zip(PROMPTS, RESPONSES, strict=True) for r in group}
    assert len({path[:n] for path in paths for n in range(1, len(path) + 1)}) == tree.M


def test_micro_batches_sum_to_the_minibatch(both):
    """A minibatch in pieces: losses and gradients add up to those of the whole."""
    policy, objective = both[0], methods()["grpo"].objective()
    whole, _, expected = loss_and_gradients(policy, objective)
    policy.model.zero_grad()
    total = torch.zeros(())
    batch = ragged_batch()
    owner = [g for g, answers in enumerate(RESPONSES) for _ in answers]
    parts = rl.pack_groups([len(p) for p in PROMPTS], [[len(r) for r in answers] for answers in RESPONSES], 13)
    # The first group goes in two parts, one of them together with the second group.
    assert parts == [[0, 2], [1, 3, 4], [5], [6, 7]]
    answers = [answer for group in RESPONSES for answer in group]
    for part in parts:
        groups = sorted({owner[s] for s in part})
        responses = [[answers[s] for s in part if owner[s] == g] for g in groups]
        pack = Pack([PROMPTS[g] for g in groups], responses, batch.device)
        loss, _ = policy.loss(pack, batch.take(part), objective)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-7)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_take_keeps_rows_and_counts_anew():
    batch = ragged_batch()
    chosen = torch.tensor([5, 1, 3])
    part = take(batch, chosen)
    spans = [range(int(batch.offsets[s]), int(batch.offsets[s + 1])) for s in chosen.tolist()]
    rows = torch.tensor([i for span in spans for i in span])
    for name in ("target", "advantage", "old_logp", "rollout_logp"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[rows])
    assert part.offsets.tolist() == [0, *torch.tensor([len(span) for span in spans]).cumsum(0).tolist()]
    assert part.group.tolist() == batch.group[chosen].tolist()
    assert part.totals.tokens == len(rows) and part.totals.sequences == 3


def test_a_model_that_trees_do_not_fit_runs_padded_and_says_why(small):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2, n_positions=64, attn_pdrop=0.5)
    model = GPT2LMHeadModel(shape).train()
    policy = Policy(model, 0)
    assert policy.layout == "padded" and "dropout" in policy.why_padded
    loss, _ = policy.loss(PACK, ragged_batch(), Objective())
    loss.backward()
    with pytest.raises(UserError, match="layout"):
        Policy(model, 0, "tree")
