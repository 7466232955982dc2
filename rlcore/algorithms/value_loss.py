"""The critic's clipped squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.objective import number
from rlcore.algorithms.policy_loss import full_precision
from rlcore.layout import TokenBatch


def value_loss(value: Tensor, batch: TokenBatch, clip: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of the values against `batch.returns`, a mean over the minibatch's tokens.

    L = 1/(2 tokens) sum_i max((v_i - R_i)^2, (clip(v_i, v_old_i - c, v_old_i + c) - R_i)^2); without `clip` the first
    term alone. value is [N] or [B, T] like `batch.target`; float32 (float64 for float64). With `clip` the batch needs
    `old_value`. Micro-batches sum to the minibatch. Raises ValueError that names what is missing.
    Source: PPO as implemented in OpenAI baselines; the factor 1/2 as in verl, TRL and OpenRLHF.
    """
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch: expected an rl.TokenBatch; got {type(batch).__name__}")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"value: expected a floating tensor; got {getattr(value, 'dtype', type(value))}")
    if value.shape != batch.shape:
        raise ValueError(f"value: expected shape {tuple(batch.shape)} like batch.target; got {tuple(value.shape)}")
    if batch.returns is None:
        raise ValueError("batch.returns: the value loss reads it, but the batch has none")
    if clip is not None and batch.old_value is None:
        raise ValueError("batch.old_value: needed with clip; the batch has none")
    if clip is not None:
        number("clip", clip, 0.0, exclusive=True)
    assert batch.totals is not None
    value = full_precision(value)
    keep = torch.ones_like(value, dtype=torch.bool) if batch.mask is None else batch.mask
    value = torch.where(keep, value, 0)
    returns = torch.where(keep, batch.returns.detach().to(value.dtype), 0)
    per_token = keep / batch.totals.tokens.to(value.dtype).clamp(min=1)

    error = (value - returns) ** 2
    metrics = {}
    if clip is not None:
        assert batch.old_value is not None
        old_value = torch.where(keep, batch.old_value.detach().to(value.dtype), 0)
        # Inside the range exactly the value: old + (v - old) is not v to the last digit, and would count as clipped.
        clipped_error = (torch.clamp(value, old_value - clip, old_value + clip) - returns) ** 2
        metrics["value_clip_fraction"] = (per_token * (clipped_error > error)).sum()
        error = torch.maximum(error, clipped_error)
    loss = 0.5 * (per_token * error).sum()
    metrics["value_loss"] = loss.detach()
    metrics["value_mean"] = (per_token * value.detach()).sum()
    metrics["return_mean"] = (per_token * returns).sum()
    return loss, metrics
