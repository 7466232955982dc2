"""What changes from step to step by rule: the learning rate, and a moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlcore.engine.config import Config


def learning_rate(config: Config, step: int, peak: float | None = None) -> float:
    """The rate of a step, counted from 1: peak * min(1, step / warmup) * what the schedule leaves of it.

    linear: from 1 at the first step to final_lr at the last. cosine: from 1 at the end of the warm-up to final_lr at
    the last step. constant: 1. The peak is the policy's where none is given.
    """
    update = config.update
    rise = min(1.0, step / max(1, update.warmup))
    return (update.lr if peak is None else peak) * rise * left(config, step)


def left(config: Config, step: int) -> float:
    final = config.update.final_lr
    if config.update.schedule == "constant":
        return 1.0
    if config.update.schedule == "linear":
        return 1 - (1 - final) * (step - 1) / max(1, config.steps - 1)
    start = max(1, config.update.warmup)
    progress = max(0, step - start) / max(1, config.steps - start)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


class MovingAverage:
    """The exponential moving average of a model's trainable weights: e <- decay e + (1 - decay) w, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self.own.items()}

    @torch.no_grad()
    def update(self) -> None:
        now = [p.detach().float() for p in self.own.values()]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block."""
        kept = {name: p.detach().clone() for name, p in self.own.items()}
        self.write(self.weights)
        try:
            yield
        finally:
            self.write(kept)

    @torch.no_grad()
    def write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.own.items():
            parameter.copy_(weights[name])
