"""Which tree a batch is packed as changes nothing: order of responses and of groups, parts, and what is predicted."""

from __future__ import annotations

import random

import pytest
import torch

import rlcore as rl
from rlcore.adapters.transformers import head

pytest.importorskip("transformers")
from decoder_cases import build, ids

OBJECTIVE = rl.Objective(clip=(0.2, 0.28), aggregate="seq_mean_token_mean")


def groups(source):
    """Prompts of 1 to 9 tokens with ragged answers, one empty and one of one token among them."""
    prompts = [ids(source, n) for n in (9, 1, 4, 6)]
    lengths = ((7, 1, 0, 5), (3, 12), (6, 6, 2), (1, 8, 4))
    return prompts, [[ids(source, n) for n in own] for own in lengths]


def loss_and_gradients(model, prompts, answers, batch):
    model.zero_grad()
    tree = rl.PrefixTree.from_groups(prompts, answers)
    assert torch.equal(tree.target, batch.target)
    hidden = rl.trunk(model, tree)
    loss, _ = rl.linear_policy_loss(hidden, batch=batch, objective=OBJECTIVE, **head(model)._asdict())
    loss.backward()
    return hidden.detach(), loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def batch_of(prompts, answers):
    flat = [answer for own in answers for answer in own]
    offsets = torch.tensor([0, *map(len, flat)]).cumsum(0)
    target = torch.tensor([token for answer in flat for token in answer])
    source = torch.Generator().manual_seed(0)
    return rl.TokenBatch(
        target,
        offsets,
        advantage=rl.per_token(torch.randn(len(flat), generator=source), offsets),
        old_logp=-4 + torch.rand(len(target), generator=source),
        group=torch.tensor([g for g, own in enumerate(answers) for _ in own]),
    )


def assert_same(found, expected):
    (loss, gradients), (other, references) = found, expected
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-7)
    norm = torch.stack([g.norm() for g in references.values()]).norm()
    for name, g in references.items():
        assert (gradients[name] - g).norm() <= 1e-5 * max(g.norm(), norm / 100), name


@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "GptOss"])
def test_permuting_responses_and_trees_permutes_outputs(name):
    model, source = rl.attach(build(name)), random.Random(5)
    prompts, answers = groups(source)
    batch = batch_of(prompts, answers)
    hidden, loss, gradients = loss_and_gradients(model, prompts, answers, batch)
    starts = [0, *torch.tensor([len(own) for own in answers]).cumsum(0).tolist()]
    for _ in range(3):
        trees = source.sample(range(len(prompts)), len(prompts))
        inside = [source.sample(range(len(own)), len(own)) for own in answers]
        order = [starts[g] + i for g in trees for i in inside[g]]
        moved = batch.take(order)
        own = [[answers[g][i] for i in inside[g]] for g in trees]
        found = loss_and_gradients(model, [prompts[g] for g in trees], own, moved)
        rows = torch.cat([torch.arange(int(batch.offsets[s]), int(batch.offsets[s + 1])) for s in order])
        torch.testing.assert_close(found[0], hidden[rows], rtol=1e-4, atol=1e-5)
        assert_same(found[1:], (loss, gradients))


@pytest.mark.parametrize("most", [1, 12, 30])
def test_parts_add_up_to_the_whole(most):
    """Packed by a budget of tokens: one answer at a time, groups in parts, several groups together."""
    model = rl.attach(build("Qwen3"))
    prompts, answers = groups(random.Random(5))
    batch = batch_of(prompts, answers)
    _, loss, expected = loss_and_gradients(model, prompts, answers, batch)
    owner, flat = batch.group.tolist(), [answer for own in answers for answer in own]
    total, sums = torch.zeros(()), {name: torch.zeros_like(g) for name, g in expected.items()}
    parts = rl.pack_groups([len(p) for p in prompts], [[len(a) for a in own] for own in answers], most)
    for part in parts:
        chosen = sorted({owner[s] for s in part})
        own = [[flat[s] for s in part if owner[s] == g] for g in chosen]
        _, one, gradients = loss_and_gradients(model, [prompts[g] for g in chosen], own, batch.take(part))
        total += one
        for name, g in gradients.items():
            sums[name] += g
    assert len(parts) == {1: 11, 12: 9, 30: 4}[most]
    assert_same((total, sums), (loss, expected))


@pytest.mark.parametrize("name", ["Qwen3", "Mistral"])
def test_what_is_not_predicted_is_read_all_the_same(name):
    """Turns of a model and of a tool: the rows of the chosen tokens are those of the tree that predicts all."""
    model, source = rl.attach(build(name)), random.Random(6)
    stem = ids(source, 5)
    paths = [stem + ids(source, n) for n in (9, 4, 12)] + [stem[:3] + ids(source, 6)]
    bits = [[0, *(int(t % 5 < 2) for t in range(1, len(path)))] for path in paths]
    whole, some = rl.PrefixTree.from_paths(paths, share=True), rl.PrefixTree.from_paths(paths, bits, share=True)
    kept = torch.tensor([bit for own in bits for bit in own[1:]], dtype=torch.bool)
    results = []
    for tree, chosen in ((whole, kept), (some, slice(None))):
        model.zero_grad()
        hidden = rl.trunk(model, tree)[chosen]
        hidden.square().sum().backward()
        results.append((hidden.detach(), {n: p.grad for n, p in model.model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert_same((torch.zeros(()), results[1][1]), (torch.zeros(()), results[0][1]))


def test_a_deep_chain_and_a_thousand_paths():
    model, source = rl.attach(build("Qwen3", max_position_embeddings=256)), random.Random(7)
    stem = ids(source, 200)
    chain = [stem[:n] + ids(source, 1) for n in range(1, 201)]
    bush = [ids(source, source.randrange(1, 4)) for _ in range(1000)]
    with torch.no_grad():
        for paths in (chain, bush):
            tree = rl.PrefixTree.from_paths(paths, share=True)
            alone = rl.trunk(model, tree.unshared())
            torch.testing.assert_close(rl.trunk(model, tree), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        (None, TypeError, "tree: expected a PrefixTree, got NoneType"),
        ([[1, 2]], TypeError, "tree: expected a PrefixTree, got list"),
        (rl.PrefixTree.from_paths([[1, 40]]), ValueError, "tree: expected token ids below 40, got 1 to 40"),
        (rl.PrefixTree.from_paths([[1, -3, 4]]), ValueError, "tree: expected token ids below 40, got -3 to 4"),
    ],
)
def test_trunk_names_what_is_no_tree_of_the_model(tree, error, message):
    model = rl.attach(build("Qwen3"))
    with pytest.raises(error, match=message):
        rl.trunk(model, tree)


def test_refuses_a_model_whose_weights_are_not_loaded():
    with pytest.raises(rl.AttachError, match="its weights are not loaded"):
        rl.attach(build("Qwen3").to("meta"))
