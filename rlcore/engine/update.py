"""The optimizer steps of a step: `epochs` passes over `minibatches` of micro-batches whose losses sum."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import rlcore as rl
from rlcore.engine.config import Config
from rlcore.engine.policy import Policy
from rlcore.engine.rollout import Rollout, take
from rlcore.engine.seeding import permutation


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    objective: rl.Objective,
    rollout: Rollout,
    advantage: Tensor,
    config: Config,
    step: int,
) -> dict[str, float]:
    """The optimizer steps on one rollout, advantage [N]; returns the metrics of the loss over all of them."""
    start = time.perf_counter()
    P, G = len(rollout.prompts), config.rollout.samples
    old_logp = trainer_logp(policy, rollout, config)
    batch = replace(rollout.batch, advantage=advantage, old_logp=old_logp)
    optimizer.param_groups[0]["lr"] = learning_rate(config, step)

    steps: list[dict[str, Tensor]] = []
    for epoch in range(config.update.epochs):
        order = torch.tensor(permutation(P, config.seed, "minibatches", step, epoch))
        for chosen in order.tensor_split(config.update.minibatches):
            groups = chosen.sort().values.tolist()
            sequences = torch.tensor([g * G + i for g in groups for i in range(G)], device=batch.device)
            parts: list[dict[str, Tensor]] = []
            for micro in take(batch, sequences).split(config.update.micro_tokens, by="group"):
                assert micro.sequences is not None
                own = groups[micro.sequences.start // G : micro.sequences.stop // G]
                prompts, responses = [rollout.prompts[g] for g in own], [rollout.responses[g] for g in own]
                loss, metrics = policy.loss(prompts, responses, micro, objective)
                loss.backward()
                parts.append(metrics)
            norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.update.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            steps.append({**rl.merge_metrics(parts), "grad_norm": norm})

    mismatch = (old_logp - rollout.model_logp).abs()
    return {
        **{f"policy/{key}": value for key, value in over_steps(steps).items()},
        "mismatch_max": mismatch.max().item(),
        "mismatch_mean": mismatch.mean().item(),
        "lr": optimizer.param_groups[0]["lr"],
        "time/update": time.perf_counter() - start,
    }


def trainer_logp(policy: Policy, rollout: Rollout, config: Config) -> Tensor:
    """Log-probs [N] of the rollout's tokens under the policy before its update, as the trainer computes them.

    The sampler's own differ in the last digits (a KV cache, other shapes): ratios to these start at exactly 1, and the
    difference is logged.
    """
    G = config.rollout.samples
    parts = []
    for micro in rollout.batch.split(config.update.micro_tokens, by="group"):
        assert micro.sequences is not None
        own = slice(micro.sequences.start // G, micro.sequences.stop // G)
        parts.append(policy.logp(rollout.prompts[own], rollout.responses[own], micro))
    return torch.cat(parts)


def over_steps(steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """The metrics of several optimizer steps: counts and extremes merged as everywhere, of all others the mean."""
    merged = rl.merge_metrics(steps)
    if not {"kl_loss", "entropy_loss"} & merged.keys():
        merged.pop("policy_loss", None)  # the loss itself
    for internal in ("weight_sum", "weight_sq_sum"):
        merged.pop(internal, None)
    whole = ("tokens", "ess", "_min", "_max")
    return {key: (x if key.endswith(whole) else x / len(steps)).item() for key, x in merged.items()}


def learning_rate(config: Config, step: int) -> float:
    """The rate of a step, counted from 1: lr falls in a straight line to lr * final_lr at the last step.

    Over the first `warmup` steps it is scaled by step / warmup.
    """
    update = config.update
    rise = min(1.0, step / max(1, update.warmup))
    fall = 1 - (1 - update.final_lr) * (step - 1) / max(1, config.steps - 1)
    return update.lr * rise * fall


def clip_bounds(config: Config, structure: dict[str, Any]) -> dict[str, Any]:
    """The method's clip range with the configured ends replaced."""
    low, high = structure.get("clip", (0.2, 0.2))
    given_low, given_high = config.update.clip_low, config.update.clip_high
    return {"clip": (low if given_low is None else given_low, high if given_high is None else given_high)}
