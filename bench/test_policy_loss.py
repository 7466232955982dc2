"""policy_loss: the clipped surrogate with a KL term, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rlcore as rl


@pytest.mark.parametrize("who", ["rlcore", "torch, the loss alone"])
def test_clipped_surrogate_with_kl(timed: Callable[..., None], who: str) -> None:
    sequences, length = 64, 1024
    old = -torch.rand(sequences * length)
    reference = old + 0.1 * torch.randn_like(old)
    logp = (old + 0.2 * torch.randn_like(old)).requires_grad_()
    advantage = torch.randn(sequences)
    offsets = torch.arange(sequences + 1) * length
    target = torch.zeros(sequences * length, dtype=torch.int64)
    batch = rl.TokenBatch(target, offsets, advantage=advantage, old_logp=old, ref_logp=reference)
    objective = rl.Objective(clip=(0.2, 0.28), kl=rl.KL("k3", 0.01))

    def ours() -> tuple[Tensor, Tensor]:
        loss = rl.policy_loss(logp, batch, objective)[0]
        return loss.detach(), torch.autograd.grad(loss, logp)[0]

    def plain() -> tuple[Tensor, Tensor]:
        a = advantage.repeat_interleave(length)
        ratio = (logp - old).exp()
        surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
        delta = reference - logp
        loss = (-surrogate + 0.01 * (delta.exp() - delta - 1)).mean()
        return loss.detach(), torch.autograd.grad(loss, logp)[0]

    timed(ours if who == "rlcore" else plain, plain())
