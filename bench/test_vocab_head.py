"""vocab_head: hidden states to log-probs and to a loss, forward and backward, beside the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlcore as rl

N, H, V = 512, 256, 8192


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, H, requires_grad=True)
    weight = (torch.randn(V, H) / H**0.5).requires_grad_()
    return hidden, weight, torch.randint(V, (N,))


def matrix_products(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """The three products that no method without stored logits avoids (6NHV), with fresh outputs."""
    h, w = hidden.detach(), weight.detach()
    logits = h @ w.T

    def run() -> None:
        h @ w.T
        logits @ w
        logits.T @ h

    return run


@pytest.mark.parametrize("who", ["rlcore", "torch"])
def test_log_probs(timed: Callable[..., None], who: str) -> None:
    hidden, weight, target = inputs()

    def gradients(logp: Tensor) -> tuple[Tensor, ...]:
        return (logp.detach(), *torch.autograd.grad(logp.mean(), (hidden, weight)))

    def ours() -> tuple[Tensor, ...]:
        return gradients(rl.linear_logprob(hidden, weight, target).logp)

    def plain() -> tuple[Tensor, ...]:
        return gradients((hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0])

    timed(ours if who == "rlcore" else plain, plain())


@pytest.mark.parametrize("who", ["rlcore", "torch", "matrix products"])
def test_clipped_loss(timed: Callable[..., None], benchmark: Any, who: str) -> None:
    hidden, weight, target = inputs()
    old = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0].detach() + 0.1 * torch.randn(N)
    advantage = torch.randn(8)
    batch = rl.TokenBatch(target, torch.arange(9) * (N // 8), advantage=advantage, old_logp=old)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    def ours() -> tuple[Tensor, ...]:
        return gradients(rl.linear_policy_loss(hidden, weight, batch, rl.Objective())[0])

    def plain() -> tuple[Tensor, ...]:
        logp = (hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None])[:, 0]
        a = advantage.repeat_interleave(N // 8)
        ratio = (logp - old).exp()
        return gradients(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean())

    if who == "matrix products":
        timed(matrix_products(hidden, weight), None)
    else:
        timed(ours if who == "rlcore" else plain, plain())
