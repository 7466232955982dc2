"""Adapters: exact on trees, a frozen head without d weight, resumed bit by bit, merged, the reference for free."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlcore as rl
from rlcore.engine import checkpoint, lora
from rlcore.engine.config import CriticConfig, ModelConfig, UpdateConfig
from rlcore.engine.config_rules import validate
from rlcore.engine.critic import Critic
from rlcore.engine.errors import UserError
from rlcore.engine.logging import read
from rlcore.engine.model import load, load_or_make
from rlcore.engine.packs import Pack
from rlcore.engine.policy import Policy
from rlcore.engine.trainer import train
from rlcore.layout import TokenBatch
from rlcore.ops.policy_loss import Objective

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [30]]
RESPONSES = [[[11, 12, 1], [11, 13, 14, 1]], [[1], [20, 21]], [[31, 32, 33, 34, 1]]]
PACK = Pack(PROMPTS, RESPONSES, torch.device("cpu"))


def batch() -> TokenBatch:
    answers = [answer for group in RESPONSES for answer in group]
    target = torch.tensor([token for answer in answers for token in answer])
    offsets = torch.tensor([0, *map(len, answers)]).cumsum(0)
    return TokenBatch(target, offsets, advantage=torch.linspace(-1, 1.5, len(target)))


def adapted(small, **changes):
    """The small model with adapters that do something: B is drawn, and not zero as at the start."""
    model = lora.add(copy.deepcopy(small[0]), ModelConfig(**{"lora_rank": 4, **changes}), seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.model.zero_grad()
    loss, _ = policy.loss(PACK, batch(), Objective())
    loss.backward()
    trainable = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    return loss.detach(), {name: p.grad.clone() for name, p in trainable.items()}


def test_adapters_start_as_the_base_and_depend_on_the_seed_alone(small):
    one, two, other = (lora.add(copy.deepcopy(small[0]), ModelConfig(lora_rank=4), seed) for seed in (0, 0, 1))
    ids = torch.tensor([PROMPTS[0]])
    assert torch.equal(one(ids).logits, small[0](ids).logits)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_trees_through_adapters(small):
    """Loss, gradients of all adapters, and log-probs, on trees and on padded rows."""
    tree, padded = Policy(adapted(small), 0, "tree", 0.9), Policy(adapted(small), 0, "padded", 0.9)
    (loss, found), (expected_loss, expected) = gradients(tree), gradients(padded)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-7)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, g in expected.items():
        assert g.norm() > 0 and (found[name] - g).norm() <= 1e-5 * max(g.norm(), norm / 10), name
    ours, theirs = (policy.logp(PACK, batch()) for policy in (tree, padded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_frozen_head_makes_no_weight_gradient(small, monkeypatch):
    """6NHV with a trained head, 4NHV with a frozen one: the product that would be d weight is left out."""
    from rlcore.algorithms import vocab_head_chunks as chunks

    made = []
    original = chunks.HeadGradients.__init__

    def spy(self, hidden, weight, needs, dtype):
        original(self, hidden, weight, needs, dtype)
        made.append((needs, self._weight))

    monkeypatch.setattr(chunks.HeadGradients, "__init__", spy)
    gradients(Policy(adapted(small), 0, "tree"))
    assert made and all(needs == (True, False, False) and not weight for needs, weight in made)
    made.clear()
    policy = Policy(copy.deepcopy(small[0]), 0, "tree")
    policy.loss(PACK, batch(), Objective())[0].backward()
    assert made and all(needs == (True, True, False) and weight for needs, weight in made)


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_the_reference_is_the_model_without_its_adapters(small, layout):
    policy, base = Policy(adapted(small), 0, layout), Policy(copy.deepcopy(small[0]), 0, layout)
    now = policy.logp(PACK, batch())
    with policy.without_adapter():
        reference = policy.logp(PACK, batch())
    assert torch.equal(reference, base.logp(PACK, batch()))
    assert (now - reference).abs().max() > 1e-2
    assert torch.equal(policy.logp(PACK, batch()), now)
    gradients(policy)  # adapters are trainable as before
    with pytest.raises(ValueError, match="adapters"), base.without_adapter():
        pass


def test_an_adapter_on_the_head_runs_padded(small):
    """The head's weight alone is not what the model computes with."""
    model = copy.deepcopy(small[0])
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model = lora.add(rl.attach(model), ModelConfig(lora_rank=4, lora_targets="q_proj, lm_head"), 0)
    policy = Policy(model, 0)
    assert policy.layout == "padded" and "head has an adapter" in policy.why_padded
    found = gradients(policy)[1]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in found} == {"q_proj", "lm_head"}


@pytest.mark.parametrize("rank", [3, 4])
def test_adapters_are_scaled_by_alpha_over_rank(small, rank):
    model = adapted(small, lora_rank=rank, lora_alpha=6.0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "layers.1.mlp.up_proj" in name}
    a, b, before = (next(x for name, x in weights.items() if part in name) for part in ("lora_A", "lora_B", "base"))
    after = lora.merged(model).model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(after - before, 6.0 / rank * b @ a, rtol=1e-4, atol=1e-6)


def test_saved_adapters_are_the_same_bytes_in_every_process(small, tmp_path):
    """PEFT's targets are a set, and sets are ordered by hashes that differ between processes."""
    model = adapted(small)
    shape = model.peft_config["default"]
    files = []
    for order in (sorted(shape.target_modules), sorted(shape.target_modules, reverse=True)):
        shape.target_modules = order
        lora.save(tmp_path / "saved", model)
        files.append((tmp_path / "saved" / "adapter_config.json").read_bytes())
    assert files[0] == files[1] and len(order) == 14


def test_targets_that_do_not_exist(small):
    with pytest.raises(UserError, match=r"model\.lora_targets: 'nowhere'"):
        lora.add(copy.deepcopy(small[0]), ModelConfig(lora_rank=4, lora_targets="nowhere"), 0)


def test_without_peft(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'rlcore\[lora\]'"):
        lora.add(small[0], ModelConfig(lora_rank=4), 0)


def test_merging_needs_adapters(tiny):
    with pytest.raises(UserError, match="lora_rank"):
        validate(tiny(model__lora_merge=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_adapters(tiny, dtype):
    """Checkpoints hold adapters alone; one that was stopped and resumed ends like one that was not, bit by bit."""
    changes = {"model__lora_rank": 4, "model__dtype": dtype, "update__lr": 2e-2}
    whole = tiny(name="whole", model__lora_merge=True, **changes)
    train(whole)
    half = tiny(name="half", steps=2, **changes)
    train(half)
    # A schedule that ends elsewhere would make other steps of the first two.
    cut = tiny(name="cut", model__lora_merge=True, **changes)
    train(cut)
    last = Path(cut.dir) / "cut" / "checkpoints" / "step-000004"
    checkpoint.shutil.rmtree(last)
    checkpoint.shutil.rmtree(Path(cut.dir) / "cut" / "merged")
    train(cut, resume=True)
    kept = Path(whole.dir) / "whole" / "checkpoints" / "step-000004"
    assert {f.name for f in kept.rglob("*") if f.is_file()} >= {"adapter_model.safetensors", "base.json"}
    assert not list(kept.rglob("model.safetensors")) and not list(kept.rglob("README.md"))
    for file in kept.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (last / file.relative_to(kept)).read_bytes(), file.name
    ours, theirs = (
        [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read(Path(whole.dir) / n / "metrics.jsonl")]
        for n in ("whole", "cut")
    )
    assert ours == theirs
    assert all(record["policy/grad_norm"] > 0 and record["reward"] > 0 for record in ours[1:])
    first = load_file(kept.parent / "step-000002" / "model" / "adapter_model.safetensors")
    after = load_file(kept / "model" / "adapter_model.safetensors")
    assert all(x.dtype == torch.float32 and not torch.equal(x, after[name]) for name, x in first.items())

    # The merged model is the adapted one, and stands alone.
    model, tokenizer = load(kept / "model")
    merged, _ = load(Path(whole.dir) / "whole" / "merged", model.dtype)
    assert lora.is_adapted(model) and not lora.is_adapted(merged)
    assert model.dtype == getattr(torch, dtype)
    ids = torch.tensor([tokenizer("12 + 7 =")["input_ids"]])
    size = model(ids).logits.float().std()
    distance = (merged(ids).logits.float() - model(ids).logits.float()).abs().max()
    assert distance < (1e-5 if dtype == "float32" else 5e-2) * size
    with model.disable_adapter():
        assert (merged(ids).logits.float() - model(ids).logits.float()).abs().max() > 2 * distance

    # As the start of another run, the adapters are merged in.
    again, _ = load_or_make(tiny(model__path=str(kept / "model")), None, torch.device("cpu"), print)
    assert not lora.is_adapted(again) and again.dtype == torch.float32


def test_adapters_go_onto_no_other_weights(tiny, small, tmp_path):
    small[0].save_pretrained(tmp_path / "base")
    small[1].save_pretrained(tmp_path / "base")
    config = tiny(steps=2, model__lora_rank=4, model__path=str(tmp_path / "base"))
    train(config)
    saved = Path(config.dir) / config.name / "checkpoints" / "step-000002" / "model"
    assert json.loads((saved / "base.json").read_text())["path"] == str(tmp_path / "base")
    other = copy.deepcopy(small[0])
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="its adapters belong to the weights of"):
        load(saved)
    with pytest.raises(UserError, match="its adapters belong to the weights of"):
        train(dataclasses.replace(config, steps=3), resume=True)


def test_a_critic_shares_the_frozen_weights_alone(small):
    policy = Policy(adapted(small), 0)
    critic = Critic(policy, CriticConfig(), UpdateConfig())
    own = dict(policy.model.named_parameters())
    for name, parameter in critic.model.named_parameters():
        assert (parameter is own[name]) != ("lora_" in name) and torch.equal(parameter, own[name])
    torch.nn.init.ones_(critic.head.weight)
    before, loss = gradients(policy)[0], critic(PACK).square().sum()
    loss.backward()
    critic.step(0.1)
    assert critic(PACK).square().sum() != loss and gradients(policy)[0] == before


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_reference_and_critic_of_a_run_with_adapters(tiny, method):
    """The reference is the base: no distance before the first update, some after it, and no second copy on the disk."""
    config = tiny(method=method, steps=2, model__lora_rank=4, update__lr=2e-2, kl__place="loss")
    train(config)
    records = read(Path(config.dir) / config.name / "metrics.jsonl")[1:]
    assert records[0]["kl/answer"] == 0 != records[1]["kl/answer"]
    assert not (Path(config.dir) / config.name / "reference").exists()
    assert all(record["policy/grad_norm"] > 0 for record in records)
