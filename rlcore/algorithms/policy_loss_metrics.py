"""The metrics of the policy loss: 0-d sums over a chunk's rows with the minibatch's denominators, and extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.objective import Numbers, Objective
from rlcore.algorithms.policy_loss_terms import anchor, behaviour_ratio, kl_divergence
from rlcore.layout import TokenBatch
from rlcore.metrics import effective_sample_size

Metrics = dict[str, Tensor]

# Every metric in its order, which kernels count on.
METRICS = (
    "tokens", "ratio_mean", "ratio_min", "ratio_max", "clip_low_fraction", "clip_high_fraction", "clip_fraction",
    "old_kl_k1", "old_kl_k3", "zero_advantage_fraction", "advantage_mean", "dual_clip_fraction", "policy_loss",
    "kl_loss", "entropy_loss", "logp_mean", "entropy", "ref_kl_k1", "ref_kl_k3", "rollout_kl_k1", "rollout_kl_k3",
    "rollout_logp_difference_max", "weight_sum", "weight_sq_sum", "ess", "correction_clip_fraction", "loss",
)  # fmt: skip


def metric_names(batch: TokenBatch, objective: Objective, entropy: bool) -> tuple[str, ...]:
    """The names of the metrics that `chunk_loss` returns, in its order, known without running it."""
    if objective.custom_loss is not None:
        return ("tokens", "loss", *objective.custom_metrics)
    there = {
        "dual_clip_fraction": objective.has_dual_clip, "kl_loss": objective.kl is not None,
        "entropy_loss": objective.needs_entropy, "entropy": entropy, "ref_kl_k1": batch.ref_logp is not None,
        "ref_kl_k3": batch.ref_logp is not None,
    }  # fmt: skip
    first = METRICS.index("rollout_kl_k1")
    there |= dict.fromkeys(METRICS[first:-1], batch.rollout_logp is not None)
    there["correction_clip_fraction"] &= objective.has_correction
    return tuple(name for name in METRICS if there.get(name, True))


@torch.no_grad()
def ratio_metrics(
    log_ratio: Tensor, ratio: Tensor, advantage: Tensor, low: Tensor, high: Tensor, per_token: Tensor, keep: Tensor,
    numbers: Numbers, objective: Objective,
) -> Metrics:  # fmt: skip
    """What the ratio did: its moments and extremes, and the fraction of tokens that lost their gradient to a clip."""
    below, above = ratio < 1 - low, ratio > 1 + high
    if objective.surrogate == "ppo":
        below, above = below & (advantage < 0), above & (advantage > 0)
    elif objective.surrogate == "reinforce":
        below, above = torch.zeros_like(below), torch.zeros_like(above)
    metrics = {
        "tokens": keep.sum().to(ratio.dtype),
        "ratio_mean": (per_token * ratio).sum(),
        "ratio_min": torch.where(keep, ratio, torch.inf).amin() if ratio.numel() else ratio.new_tensor(torch.inf),
        "ratio_max": torch.where(keep, ratio, -torch.inf).amax() if ratio.numel() else ratio.new_tensor(-torch.inf),
        "clip_low_fraction": (per_token * below).sum(),
        "clip_high_fraction": (per_token * above).sum(),
        "clip_fraction": (per_token * (below | above)).sum(),
        "old_kl_k1": -(per_token * log_ratio).sum(),
        "old_kl_k3": (per_token * (torch.expm1(log_ratio) - log_ratio)).sum(),
        "zero_advantage_fraction": (per_token * (advantage == 0)).sum(),
        "advantage_mean": (per_token * advantage).sum(),
    }
    if objective.has_dual_clip:
        hit = (advantage < 0) & (ratio > numbers.dual_clip)
        metrics["dual_clip_fraction"] = (per_token * hit).sum()
    return metrics


@torch.no_grad()
def anchor_metrics(
    logp: Tensor, entropy: Tensor | None, rows: TokenBatch, per_token: Tensor, keep: Tensor, numbers: Numbers,
    objective: Objective,
) -> Metrics:  # fmt: skip
    """Where the policy stands: its log-prob and entropy, its distance to the reference and to the sampler."""
    metrics = {"logp_mean": (per_token * logp).sum()}
    if entropy is not None:
        metrics["entropy"] = (per_token * entropy).sum()
    if rows.ref_logp is not None:
        metrics["ref_kl_k1"] = (per_token * kl_divergence(logp, anchor(logp, rows), "k1")).sum()
        metrics["ref_kl_k3"] = (per_token * kl_divergence(logp, anchor(logp, rows), "k3")).sum()
    if rows.rollout_logp is not None:
        ratio = behaviour_ratio(logp, rows)
        old_logp = logp if rows.old_logp is None else rows.old_logp
        difference = (old_logp - rows.rollout_logp) * keep
        weight = keep * (ratio.minimum(numbers.cap) if objective.has_correction else ratio)
        metrics |= {
            "rollout_kl_k1": -(per_token * difference).sum(),
            "rollout_kl_k3": (per_token * kl_divergence(rows.rollout_logp, old_logp, "k3")).sum(),
            "rollout_logp_difference_max": difference.abs().amax() if keep.numel() else logp.new_zeros(()),
            "weight_sum": weight.sum(),
            "weight_sq_sum": (weight * weight).sum(),
        }
        metrics["ess"] = effective_sample_size({"tokens": keep.sum().to(logp.dtype), **metrics})
        if objective.has_correction:
            hit = ratio > numbers.cap
            metrics["correction_clip_fraction"] = (per_token * hit).sum()
    return metrics


def custom_metric(name: str, value: Tensor, per_token: Tensor, keep: Tensor) -> Tensor:
    """A user's metric by its name: `*_min` and `*_max` over the unmasked tokens, else the mean over the minibatch's."""
    if name.endswith(("_min", "_max")):
        sign = 1.0 if name.endswith("_max") else -1.0
        masked = torch.where(keep, sign * value, -torch.inf)
        return sign * (masked.amax() if value.numel() else masked.new_tensor(-torch.inf))
    return (per_token * torch.where(keep, value, 0)).sum()
