"""bfloat16 forward passes, and gradient checkpointing: the same policy, sampled and trained."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlcore.engine import lora
from rlcore.engine.config import ModelConfig, RolloutConfig
from rlcore.engine.errors import UserError
from rlcore.engine.logging import read
from rlcore.engine.model import prepare
from rlcore.engine.packs import Pack
from rlcore.engine.policy import Policy
from rlcore.engine.precision import Float32Head, compute_in_bfloat16, numerics
from rlcore.engine.rollout import roll_out
from rlcore.engine.trainer import train
from rlcore.ops.policy_loss import Objective


def rolled_out(small, model):
    settings = RolloutConfig(samples=4, max_new_tokens=6)
    out = roll_out(model, small[1], small[2], small[2].train[:6], settings, torch.Generator().manual_seed(3))
    batch = dataclasses.replace(out.batch, advantage=torch.linspace(-1, 1.5, out.batch.N))
    return dataclasses.replace(out, batch=batch)


@pytest.mark.parametrize(("layout", "share"), [("tree", 1.5), ("padded", 0.5)])
def test_sampler_and_trainer_agree_in_bfloat16(small, layout, share):
    """Each is off the float32 policy by bfloat16's rounding, and they are no further from one another.

    On padded rows both run the same attention and are much closer.
    """
    model = copy.deepcopy(small[0])
    with torch.no_grad():
        model.lm_head.weight *= 8  # logits of a trained model's size
    exact = Policy(copy.deepcopy(model), 0, layout)
    compute_in_bfloat16(model)
    policy = Policy(model, 0, layout)
    assert policy.layout == layout, policy.why_padded
    out = rolled_out(small, model)
    args = Pack(out.prompts, out.responses, out.batch.device), out.batch
    logp = policy.logp(*args)
    assert logp.dtype == out.model_logp.dtype == torch.float32
    rounding = (exact.logp(*args) - logp).abs()
    assert 1e-3 < rounding.max() < 0.5
    mismatch = (logp - out.model_logp).abs()
    assert mismatch.mean() < share * rounding.mean()


def test_the_head_is_float32_under_autocast(small):
    """Rounded operands, float32 sums: no logit is rounded, and the float32 weights stay what they are."""
    model = copy.deepcopy(small[0])
    compute_in_bfloat16(model)
    assert type(model.lm_head) is Float32Head and model.lm_head.weight is model.model.embed_tokens.weight
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    with numerics(model):
        logits = model.lm_head(hidden)
    assert logits.dtype == torch.float32
    expected = hidden.bfloat16().double() @ model.lm_head.weight.bfloat16().double().T
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits, logits.bfloat16().float())
    assert torch.equal(model.lm_head(hidden), hidden @ model.lm_head.weight.T)
    assert copy.deepcopy(model)._rlcore_bfloat16  # a reference that is copied from a policy computes as it does


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_bfloat16_gradients_are_those_of_the_loss(small, layout):
    """float32 master weights get float32 gradients, off those in float32 by the rounding of the forward pass."""
    exact, rounded = Policy(copy.deepcopy(small[0]), 0, layout), copy.deepcopy(small[0])
    compute_in_bfloat16(rounded)
    out = rolled_out(small, small[0])
    found = []
    for policy in (exact, Policy(rounded, 0, layout)):
        loss, _ = policy.loss(Pack(out.prompts, out.responses, out.batch.device), out.batch, Objective())
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.model.parameters())
        found.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    distance = ((found[1] - found[0]).norm() / found[0].norm()).item()
    assert 1e-4 < distance < 0.05


def test_a_bfloat16_run_holds_float32_weights(tiny):
    config = tiny(model__dtype="bfloat16")
    train(config)
    path = Path(config.dir) / config.name
    saved = load_file(path / "checkpoints" / "step-000004" / "model" / "model.safetensors")
    assert all(x.dtype == torch.float32 for x in saved.values())
    assert any(not torch.equal(x, x.bfloat16().float()) for x in saved.values())
    optimizer = load_file(path / "checkpoints" / "step-000004" / "optimizer.safetensors")
    assert all(x.dtype == torch.float32 for x in optimizer.values())
    records = read(path / "metrics.jsonl")[1:]
    assert all(1e-5 < record["mismatch_max"] < 0.1 for record in records)


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_checkpointing_changes_neither_loss_nor_gradients(small, layout, adapters, tiny):
    plain = copy.deepcopy(small[0])
    if adapters:
        plain = lora.add(plain, ModelConfig(lora_rank=4), 0)
    checkpointed = prepare(copy.deepcopy(plain), tiny(model__gradient_checkpointing=True))
    out = rolled_out(small, checkpointed)  # evaluation mode: sampling goes through the KV cache as before
    pack, results = Pack(out.prompts, out.responses, out.batch.device), []
    for policy in (Policy(plain, 0, layout), Policy(checkpointed, 0, layout)):
        assert policy.layout == layout, policy.why_padded
        runs: list[int] = []
        hooks = [
            module.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
            for module in policy.model.modules()
            if type(module).__name__ == "Qwen3MLP"
        ]
        loss, _ = policy.loss(pack, out.batch, Objective())
        loss.backward()
        for hook in hooks:
            hook.remove()
        gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), gradients, len(runs), policy.logp(pack, out.batch)))
        assert not any(module.training for module in policy.model.modules())
    (loss, grads, runs, logp), (again, found, twice, logp_again) = results
    assert torch.equal(loss, again) and torch.equal(logp, logp_again)
    assert runs == 2 and twice == 4  # every layer once, and once more for the gradients
    for name, g in grads.items():
        torch.testing.assert_close(found[name], g, rtol=1e-6, atol=1e-8, msg=name)


def test_a_model_without_checkpointing(small, tiny, monkeypatch):
    model = copy.deepcopy(small[0])
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing"):
        prepare(model, tiny(model__gradient_checkpointing=True))
