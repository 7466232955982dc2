"""Every method's gradient at every optimizer step, against its formula in float64, one answer at a time.

Two passes of two minibatches in micro-batches, temperature 0.9, KL to another model in the reward, a length penalty and
a filter: what of a rollout reaches the loss, with which weight, and that old log-probs and values stay those of before.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from rlcore.engine.config import Config
from rlcore.engine.policy import Policy
from rlcore.engine.reference import Reference
from rlcore.engine.resolve import with_keys
from rlcore.engine.rollout import Rollout, roll_out, take
from rlcore.engine.seeding import generator
from rlcore.engine.timing import Stopwatch
from rlcore.engine.update import Learner
from rlcore.methods import methods

P, G, LONGEST, TEMPERATURE = 6, 3, 5, 0.9
KL, PENALTY, GAMMA, LAM, VALUE_CLIP = 0.2, 0.7, 0.9, 0.7, 0.02
KEYS = {
    "rollout.samples": G, "rollout.max_new_tokens": LONGEST, "rollout.temperature": TEMPERATURE,
    "update.minibatches": 2, "update.epochs": 2, "update.warmup": 0, "update.micro_tokens": 12,
    "kl.place": "reward", "kl.coef": KL, "kl.kind": "k1", "rollout.overlong_buffer": 0.5,
    "rollout.overlong_penalty": PENALTY, "rollout.overlong_filter": True, "critic.lr": 3e-3, "critic.gamma": GAMMA,
    "critic.lam": LAM, "critic.clip": VALUE_CLIP, "update.max_grad_norm": 0.5, "critic.max_grad_norm": 0.25,
}  # fmt: skip
# Its clip is so narrow that larger steps would leave no answer inside, and no gradient.
RATES = {"gspo": 1e-7}
CLIPS = {"dapo": (0.8, 1.28), "loop": (1 / 1.1, 1.1), "gspo": (1 - 3e-4, 1 + 4e-4)}


def answers_of(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of all S sequences."""
    return [(p, answer) for p, group in zip(rollout.prompts, rollout.responses, strict=True) for answer in group]


def logps(model, rollout):
    """Log-probs of the tokens of every answer."""
    found = []
    for prompt, answer in answers_of(rollout):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        found.append(logits.log_softmax(-1)[range(len(answer)), answer])
    return found


def values(trunk, head, rollout):
    """Values before the tokens of every answer."""
    found = []
    for prompt, answer in answers_of(rollout):
        hidden = trunk.model(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 : -1]
        found.append(head(hidden).squeeze(-1))
    return found


def rewards(rollout, reward, old, reference):
    """What is paid at every token."""
    paid = [-KL * (a - b) for a, b in zip(old, reference, strict=True)]
    for x, r in zip(paid, reward.double(), strict=True):
        x[-1] += r - PENALTY * min(max((len(x) - LONGEST / 2) / (LONGEST / 2), 0), 1)
    return paid


def advantages(key, paid, kept, value):
    """Of all tokens, by the method's formula; and the critic's returns."""
    whole = torch.stack([x.sum() for x in paid]).reshape(P, G)
    centred, returns = whole - whole.mean(1, keepdim=True), None
    if key in ("grpo", "gspo", "dapo", "cispo"):
        centred = centred / (whole.std(1, keepdim=True) + 1e-6)
    elif key in ("rloo", "loop"):
        centred = centred * G / (G - 1)
    elif key == "lite_ppo":
        centred = centred / (whole.std() + 1e-6)
    found = [a.expand(len(x)) for a, x in zip(centred.reshape(-1), paid, strict=True)]
    if key == "reinforce_pp":
        found = [torch.stack([x[t:].sum() for t in range(len(x))]) for x in paid]
    if key == "ppo":
        found = [surprises(x, v) for x, v in zip(paid, value, strict=True)]
        returns = [a + v for a, v in zip(found, value, strict=True)]
    if key in ("reinforce_pp", "ppo"):
        counted = torch.cat([a for a, is_kept in zip(found, kept, strict=True) if is_kept])
        found = [(a - counted.mean()) / (counted.var() + 1e-8).sqrt() for a in found]
    return found, returns


def surprises(paid, value):
    """GAE by its definition."""
    delta = paid + GAMMA * torch.cat([value[1:], torch.zeros(1)]) - value
    weight = (GAMMA * LAM) ** torch.arange(len(paid)).double()
    return torch.stack([(weight[: len(paid) - t] * delta[t:]).sum() for t in range(len(paid))])


def loss_of_answer(key, logp, old, advantage, tokens, answers):
    ratio = (logp - old).exp()
    if key == "rloo":
        return -(advantage * logp).sum() / answers
    if key == "cispo":
        return -(ratio.detach().clamp(max=5) * advantage * logp).sum() / tokens
    low, high = CLIPS.get(key, (0.8, 1.2))
    if key == "gspo":
        ratio = (logp - old).mean().exp()
    each = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if key == "dr_grpo":
        return each.sum() / LONGEST / answers
    return each.mean() / answers if key in ("grpo", "loop", "gspo") else each.sum() / tokens


def value_loss_of_answer(value, old, returns, tokens):
    clipped = old + (value - old).clamp(-VALUE_CLIP, VALUE_CLIP)
    return torch.maximum((value - returns) ** 2, (clipped - returns) ** 2).sum() / 2 / tokens


def moved(model, seed):
    model, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
    return model


@pytest.mark.parametrize("key", methods())
def test_gradients_are_those_of_the_formula(small, key, monkeypatch):
    model, tokenizer, task = small
    config = with_keys(Config(method=key, steps=10), {**KEYS, "update.lr": RATES.get(key, 3e-3)})
    policy = Policy(moved(model, 0), tokenizer.pad_token_id, temperature=TEMPERATURE)
    frozen = moved(model, 1)
    learner = Learner(config, methods()[key], policy, Reference(policy, copy.deepcopy(frozen)))
    critic = learner.critic
    if critic is not None:
        torch.nn.init.normal_(critic.head.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    rollout = roll_out(policy.model, tokenizer, task, task.train[:P], config.rollout, generator("gradients"))
    kept = torch.rand(P * G, generator=torch.Generator().manual_seed(3)) < 0.6
    rollout = dataclasses.replace(rollout, finished=kept)
    reward = torch.rand(P * G, generator=torch.Generator().manual_seed(4))

    with torch.no_grad():
        old, reference = (logps(copy.deepcopy(m).double(), rollout) for m in (policy.model, frozen))
        parts = [] if critic is None else [copy.deepcopy(part).double() for part in (critic.model, critic.head)]
        old_value = values(*parts, rollout) if parts else None
        advantage, returns = advantages(key, rewards(rollout, reward, old, reference), kept, old_value)

    checked = {"policy": 0, "critic": 0}

    def compare(who, found, groups, loss):
        """`found`, modules with gradients, against the sum of `loss(exact, sequence, tokens)` over a minibatch."""
        exact = [copy.deepcopy(module).double() for module in found]
        own = [p for module in found for p in module.parameters()]
        other = [p for module in exact for p in module.parameters()]
        for parameter in other:
            parameter.grad = None
        chosen = [s for g in groups for s in range(g * G, g * G + G) if kept[s]]
        tokens = sum(len(old[s]) for s in chosen)
        loss(exact, chosen, tokens).backward()
        a, b = (torch.cat([p.grad.double().flatten() for p in side if p.grad is not None]) for side in (own, other))
        assert b.norm() > 0 and (a - b).norm() < 1e-4 * b.norm()
        checked[who] += 1

    def of_policy(exact, chosen, tokens, answers):
        now = logps(exact[0], rollout)
        return sum(loss_of_answer(key, now[s], old[s], advantage[s], tokens, answers) for s in chosen)

    def of_critic(exact, chosen, tokens):
        now = values(*exact, rollout)
        return sum(value_loss_of_answer(now[s], old_value[s], returns[s], tokens) for s in chosen)

    clip_gradients = torch.nn.utils.clip_grad_norm_
    groups: list[int] = []

    def before_the_step(parameters, most):
        trained = list(parameters)
        if trained[0] is next(policy.model.parameters()):
            answers = G * len(groups)
            compare("policy", [policy.model], groups, lambda *args: of_policy(*args, answers))
            assert most == 0.5
        else:
            compare("critic", [critic.model, critic.head], groups, of_critic)
            assert most == 0.25
        return clip_gradients(trained, most)

    def noted(batch, sequences):
        groups[:] = (sequences[::G] // G).tolist()
        return take(batch, sequences)

    monkeypatch.setattr("rlcore.engine.update.take", noted)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", before_the_step)
    learner.learn(rollout, reward, 1, Stopwatch())
    assert checked == {"policy": 4, "critic": 4 if key == "ppo" else 0}
