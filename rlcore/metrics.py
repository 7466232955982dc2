"""Metrics of micro-batches, made one again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def merge_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merge the metrics of a minibatch's micro-batches exactly.

    Every metric is a sum over the minibatch's denominators, so parts add up; names ending in `_min` and `_max` take the
    minimum and maximum; `ess`, the effective sample size of the off-policy weights as a fraction of the tokens, is
    (sum w)^2 / (n sum w^2), made anew from its sums.
    """
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif name.endswith("_min"):
                merged[name] = torch.minimum(merged[name], value)
            elif name.endswith("_max"):
                merged[name] = torch.maximum(merged[name], value)
            else:
                merged[name] = merged[name] + value
    if "ess" in merged and "weight_sum" in merged:
        merged["ess"] = effective_sample_size(merged)
    return merged


def effective_sample_size(metrics: Mapping[str, Tensor]) -> Tensor:
    """(sum w)^2 / (n sum w^2), 0-d, of n = `tokens`, `weight_sum` and `weight_sq_sum`; 1 where there is no weight."""
    squares = metrics["tokens"] * metrics["weight_sq_sum"]
    return torch.where(squares > 0, metrics["weight_sum"] ** 2 / squares.clamp(min=1e-30), torch.ones_like(squares))
