"""Every architecture on trees of three shapes against the same model, one sequence at a time; adapters; autocast.

Log-probs, a policy loss with everything on, and the gradient of every parameter. float32: 1e-5 of a tensor's norm, for
gradients at least of 1e-2 of the norm of all. bfloat16: the root mean square of the error to the float32 model is at
most twice that of the plain bfloat16 model.
"""

from __future__ import annotations

import contextlib
import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import rlcore as rl
from rlcore.adapters import transformers as adapter
from rlcore.adapters.transformers import head
from rlcore.ops import vocab_head_raw as raw

pytest.importorskip("transformers")
from decoder_cases import MODELS, SHAPES, build, single_logits

OBJECTIVE = rl.Objective(clip=(0.2, 0.28), kl=rl.KL("k3", 0.05), entropy=0.01, aggregate="seq_mean_token_mean")
DRAWS = 16
CHECKPOINTING = {"kept": None, "recomputed": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}
# A mixture of experts that uses all of them has no ties between experts, where rounding to bfloat16 would decide.
ALL_EXPERTS = {name: {"num_experts_per_tok": 4} for name in ("GptOss", "Qwen3Moe")}


class Results(NamedTuple):
    """logp [N], the loss under each draw of advantages [DRAWS], and the gradients of the first loss."""

    logp: Tensor
    losses: Tensor
    gradients: dict[str, Tensor]


def batches_of(tree, logp):
    """Made-up advantages, and old and reference log-probs around the model's own, drawn several times.

    Half of the ratios are outside of the clip's bounds and none is near one, where rounding would decide.
    """
    source = torch.Generator().manual_seed(0)
    steps = torch.tensor([-0.5, -0.08, 0.08, 0.5])
    drawn = []
    for _ in range(DRAWS):
        old, ref = (logp + steps[torch.randint(4, (tree.N,), generator=source)] for _ in range(2))
        advantage = rl.per_token(torch.randn(tree.S, generator=source), tree.offsets)
        drawn.append(rl.TokenBatch(tree.target, tree.offsets, advantage=advantage, old_logp=old, ref_logp=ref))
    return drawn


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def from_single_sequences(model, tree, sequences, batches=None):
    """The reference, losses in plain torch on the model's own logits, and the batches, which are made where missing."""
    logits = single_logits(model, tree, sequences).float()
    full = torch.log_softmax(logits, dim=-1)
    logp, entropy = full.gather(1, tree.target[:, None])[:, 0], -(full.exp() * full).sum(-1)
    batches = batches_of(tree, logp.detach()) if batches is None else batches
    with rl.backend("reference"):
        losses = torch.stack([rl.policy_loss(logp, batch, OBJECTIVE, entropy=entropy)[0] for batch in batches])
    return Results(logp.detach(), losses.detach(), gradients_of(model, losses[0])), batches


def from_tree(model, tree, batches):
    hidden = rl.trunk(model, tree)
    loss, _ = rl.linear_policy_loss(hidden, batch=batches[0], objective=OBJECTIVE, **head(model)._asdict())
    gradients = gradients_of(model, loss)
    with torch.no_grad():
        linear = {"hidden": hidden.detach(), **head(model)._asdict()}
        logp = rl.linear_logprob(target=tree.target, **linear).logp
        losses = [rl.linear_policy_loss(batch=batch, objective=OBJECTIVE, **linear)[0] for batch in batches]
    return Results(logp, torch.stack(losses), gradients)


def attached(plain, checkpointing):
    model = copy.deepcopy(plain)
    checkpoint(model, checkpointing)
    return rl.attach(model)


def checkpoint(model, checkpointing):
    if CHECKPOINTING[checkpointing]:
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
        model.train()


def norm(*tensors):
    return sum(float(x.double().square().sum()) for x in tensors) ** 0.5


def cases(fast):
    """Every architecture with every kind of checkpointing; those not in `fast` are for `make test-full`."""
    return [
        pytest.param(name, kind, marks=[] if (name, kind) in fast else [pytest.mark.slow])
        for name in MODELS
        for kind in CHECKPOINTING
    ]


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    cases({*((name, "kept") for name in MODELS), ("Mistral", "recomputed"), ("GptOss", "reentrant")}),
)
def test_float32(name, checkpointing):
    plain = build(name)
    model = attached(plain, checkpointing)
    check_float32(plain, model, checkpointing)


def check_float32(plain, model, checkpointing):
    trainable = [name for name, p in plain.named_parameters() if p.requires_grad]
    for label, shape in SHAPES.items():
        tree, sequences = shape()
        expected, batches = from_single_sequences(plain, tree, sequences)
        with adapter.witnesses() as calls:
            found = from_tree(model, tree, batches)
        assert len(calls) == 3 * (1 if checkpointing == "kept" else 2), "layers attend again where they are recomputed"
        assert norm(found.logp - expected.logp) <= 1e-5 * norm(expected.logp), label
        assert norm(found.losses - expected.losses) <= 1e-5 * norm(expected.losses), label
        assert list(found.gradients) == list(expected.gradients) == trainable
        floor = 1e-2 * norm(*expected.gradients.values())
        for parameter, g in expected.gradients.items():
            assert norm(g) > 0, (label, parameter)
            assert norm(found.gradients[parameter] - g) <= 1e-5 * max(norm(g), floor), (label, parameter)


@pytest.mark.parametrize(("name", "checkpointing"), cases({("Qwen3", "kept"), ("Gemma2", "kept")}))
def test_bfloat16(name, checkpointing):
    plain = build(name, dtype=torch.bfloat16, **ALL_EXPERTS.get(name, {}))
    exact, model = copy.deepcopy(plain).float(), attached(plain, checkpointing)
    check_rounded(exact, plain, model)


def check_rounded(exact, plain, model, context=contextlib.nullcontext):
    """The errors of tree and plain model, both in low precision, over all three shapes, tensor by tensor."""
    errors: dict[str, list[list[Tensor]]] = {}
    for shape in SHAPES.values():
        tree, sequences = shape()
        reference, batches = from_single_sequences(exact, tree, sequences)
        with context():
            ordinary, _ = from_single_sequences(plain, tree, sequences, batches)
            found = from_tree(model, tree, batches)
        expected = {"log-probs": reference.logp, "loss": reference.losses, **reference.gradients}
        for error, result in zip((0, 1), (found, ordinary), strict=True):
            values = {"log-probs": result.logp, "loss": result.losses, **result.gradients}
            assert values.keys() == expected.keys()
            for label, x in expected.items():
                errors.setdefault(label, [[], []])[error].append(values[label] - x)
    ratios = {label: norm(*ours) / norm(*theirs) for label, (ours, theirs) in errors.items()}
    assert not {label: ratio for label, ratio in ratios.items() if ratio > 2}


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    cases({("Qwen3", "kept"), ("Mistral", "recomputed"), ("GptOss", "kept"), ("Phi3", "reentrant")}),
)
def test_adapters(name, checkpointing, monkeypatch):
    """LoRA on all linear layers: gradients of the adapters, and none of the head's weight is made."""
    plain = adapted(name)
    model = attached(plain, checkpointing)
    made = []
    original = raw.linear_policy_loss

    def spy(*arguments):
        result = original(*arguments)
        needs = next(x for x in arguments if isinstance(x, list) and x and isinstance(x[0], bool))
        made.append((needs, sum(part.numel() for part in result[3])))
        return result

    monkeypatch.setattr(raw, "linear_policy_loss", spy)
    check_float32(plain, model, checkpointing)
    assert {True: ([True, False, False], 0)} == {needs[0]: (needs, size) for needs, size in made if needs[0]}
    assert head(model).weight.grad is None


def adapted(name):
    """A model with adapters that do something: B is drawn, and not zero as at the start."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(name), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.05)
    return model


@pytest.mark.parametrize(("name", "checkpointing"), cases({("Qwen3", "kept"), ("Mistral", "recomputed")}))
def test_autocast(name, checkpointing):
    """float32 weights under bfloat16 autocast, forward pass and recomputation."""
    plain = build(name, **ALL_EXPERTS.get(name, {}))
    model = attached(plain, checkpointing)
    check_rounded(copy.deepcopy(plain), plain, model, lambda: torch.autocast("cpu", torch.bfloat16))
