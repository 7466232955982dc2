"""The terms of the clipped-surrogate family, row by row, as the papers state them: ratio, surrogate, correction, KL."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.objective import Numbers, Objective
from rlcore.layout import TokenBatch

# exp(20) = 4.9e8: far outside every clip range, and far from the overflow that would turn 0 * inf into NaN gradients.
LOG_RATIO_BOUND = 20.0


def importance_ratio(
    logp: Tensor, rows: TokenBatch, level: Tensor | None, start: int, stop: int, objective: Objective
) -> tuple[Tensor, Tensor]:
    """log-ratio and ratio pi/pi_old of every row at the objective's level; without old_logp the value is 1.

    token: r_t; sequence, segment: the geometric mean exp(mean log r) over the unit's unmasked tokens (GSPO);
    none: pi/sg(pi), which is 1 and has the gradient of log pi.
    """
    old_logp = logp.detach() if rows.old_logp is None or objective.ratio == "none" else rows.old_logp
    log_ratio = logp - old_logp
    if level is not None:
        log_ratio = unit_mean(log_ratio, level[start:stop], rows.mask)
    log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return log_ratio, log_ratio.exp()


def unit_mean(x: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of x over the unmasked rows of each row's unit, [n]; masked rows of x are 0 already."""
    if not len(unit):
        return x
    unit = unit - unit.min()
    zeros = x.new_zeros(x.shape[0])
    count = zeros.index_add(0, unit, torch.ones_like(x) if mask is None else mask.to(x.dtype))
    total = zeros.index_add(0, unit, x)
    return (total / count.clamp(min=1))[unit]


def surrogate(
    logp: Tensor, ratio: Tensor, advantage: Tensor, low: Tensor, high: Tensor, numbers: Numbers, objective: Objective
) -> Tensor:
    """The policy term per row, [n], to be minimised.

    ppo: max(-r A, -clip(r, 1-low, 1+high) A), and for A < 0 at most -c A with dual clip c (1912.09729);
    cispo: -sg(clip(r)) A log pi; reinforce: -r A, or -A log pi where there is no ratio.
    """
    if objective.surrogate == "reinforce":
        return -advantage * (logp if objective.ratio == "none" else ratio)
    clipped = ratio.clamp(1 - low, 1 + high)
    if objective.surrogate == "cispo":
        return -clipped.detach() * advantage * logp
    loss = torch.maximum(-ratio * advantage, -clipped * advantage)
    if objective.has_dual_clip:
        bound = -numbers.dual_clip * advantage
        loss = torch.where(advantage < 0, torch.minimum(loss, bound), loss)
    return loss


def truncated_weight(logp: Tensor, rows: TokenBatch, numbers: Numbers) -> Tensor:
    """Truncated importance sampling: min(pi_old / pi_rollout, cap) per row, a constant (verl#2953)."""
    return behaviour_ratio(logp, rows).minimum(numbers.cap)


def behaviour_ratio(logp: Tensor, rows: TokenBatch) -> Tensor:
    """exp(old_logp - rollout_logp): what the trainer's and the sampler's probabilities of a token differ by."""
    old_logp = logp.detach() if rows.old_logp is None else rows.old_logp
    assert rows.rollout_logp is not None
    return (old_logp - rows.rollout_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def anchor(logp: Tensor, rows: TokenBatch) -> Tensor:
    """The reference's log-probs; rows that `kl_mask` leaves out get the policy's own: what they hold is not read."""
    assert rows.ref_logp is not None
    return rows.ref_logp if rows.kl_mask is None else torch.where(rows.kl_mask, rows.ref_logp, logp.detach())


def kl_divergence(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators of KL(pi || ref) from one sample, with x = log pi - log ref.

    k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x. As losses their gradients differ: k2's is the gradient of the KL in
    expectation, k1's is zero in expectation. Source: Schulman, "Approximating KL divergence" (2020).
    """
    x = (logp - ref_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x * x / 2
    return torch.expm1(-x) + x
