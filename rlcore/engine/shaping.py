"""From the reward of every answer to the reward of every token."""

from __future__ import annotations

import torch
from torch import Tensor

import rlcore as rl


def at_last_token(reward: Tensor, batch: rl.TokenBatch) -> Tensor:
    """The reward [S] of every answer at its last token, 0 at all others: [N]. Answers have at least one token."""
    assert batch.offsets is not None
    placed = torch.zeros(batch.N, dtype=reward.dtype, device=reward.device)
    placed[batch.offsets[1:] - 1] = reward
    return placed
