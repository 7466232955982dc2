"""From the reward of every answer to the reward of every token: length penalty, KL penalty."""

from __future__ import annotations

import torch
from torch import Tensor

import rlcore as rl
from rlcore.engine.config import RolloutConfig


def at_last_token(reward: Tensor, batch: rl.TokenBatch) -> Tensor:
    """The reward [S] of every answer at its last token, 0 at all others: [N]. Answers have at least one token."""
    assert batch.offsets is not None
    placed = torch.zeros(batch.N, dtype=reward.dtype, device=reward.device)
    placed[batch.offsets[1:] - 1] = reward
    return placed


def length_penalty(lengths: Tensor, config: RolloutConfig) -> Tensor:
    """The soft limit on the length of answers, [S] float32, to be added to the reward: 0 or less.

    p = -penalty (length - (L - B)) / B for L - B < length <= L, 0 for shorter answers, with L = max_new_tokens and
    B = overlong_buffer L tokens, which need not be whole. Source: DAPO (2503.14476), equation 13.
    """
    longest = config.max_new_tokens
    buffer = config.overlong_buffer * longest
    if not buffer:
        return torch.zeros(lengths.shape, device=lengths.device)
    return -config.overlong_penalty * ((lengths - (longest - buffer)) / buffer).clamp(0, 1)


def next_coefficient(coef: float, kl: float, target: float, horizon: int, answers: int) -> float:
    """The KL coefficient after a step whose answers were `kl` nats from the reference, as a mean over answers.

    coef <- coef (1 + answers / horizon * clip(kl / target - 1, -0.2, 0.2)): proportional control in the logarithm.
    Source: Ziegler et al. 2019 (1909.08593), section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * answers / horizon)
