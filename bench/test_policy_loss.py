"""policy_loss: loss, gradient and every metric of the clipped surrogate with a KL term, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import check
from torch import Tensor

import rlcore as rl

LOW, HIGH, BETA = 0.2, 0.28, 0.01


def plain_loss(logp: Tensor, old: Tensor, ref: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the metrics of `rl.policy_loss`, as a trainer writes them."""
    log_ratio = logp - old
    ratio = log_ratio.exp()
    surrogate = torch.maximum(-ratio * advantage, -ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
    delta = ref - logp
    k3 = delta.exp() - 1 - delta
    policy, kl = surrogate.mean(), BETA * k3.mean()
    with torch.no_grad():
        below, above = (ratio < 1 - LOW) & (advantage < 0), (ratio > 1 + HIGH) & (advantage > 0)
        metrics = {
            "ratio_mean": ratio.mean(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "clip_low_fraction": below.float().mean(),
            "clip_high_fraction": above.float().mean(),
            "clip_fraction": (below | above).float().mean(),
            "old_kl_k1": -log_ratio.mean(),
            "old_kl_k3": (ratio - 1 - log_ratio).mean(),
            "zero_advantage_fraction": (advantage == 0).float().mean(),
            "advantage_mean": advantage.mean(),
            "policy_loss": policy.detach(),
            "kl_loss": kl.detach(),
            "logp_mean": logp.mean(),
            "ref_kl_k1": -delta.mean(),
            "ref_kl_k3": k3.mean(),
        }
    return policy + kl, metrics


@pytest.mark.parametrize("tokens, least", [(524_288, 8.0), (1_024, 1.0)])
def test_clipped_surrogate_with_kl(tokens: int, least: float, compare: Callable[..., float], run: Any) -> None:
    sequences = 64
    length = (min(tokens, 4096) if run.quick else tokens) // sequences
    old = -torch.rand(sequences * length)
    reference = old + 0.1 * torch.randn_like(old)
    logp = (old + 0.2 * torch.randn_like(old)).requires_grad_()
    advantage = torch.randn(sequences)
    offsets = torch.arange(sequences + 1) * length
    target = torch.zeros(sequences * length, dtype=torch.int64)
    batch = rl.TokenBatch(target, offsets, advantage=advantage, old_logp=old, ref_logp=reference)
    objective = rl.Objective(clip=(LOW, HIGH), kl=rl.KL("k3", BETA))
    per_token = advantage.repeat_interleave(length)

    def ours() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, metrics = rl.policy_loss(logp, batch, objective)
        return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics

    def plain() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, metrics = plain_loss(logp, old, reference, per_token)
        return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics

    (*mine, metrics), (*other, expected) = ours(), plain()
    check("policy_loss", mine, other)
    check("metrics", [metrics[name] for name in expected], list(expected.values()), tolerance=1e-3)
    compare(f"policy_loss and metrics, {tokens:,} tokens", ours, plain, "plain torch", least=least)
