"""The critic: a copy of the policy's trunk with a scalar head, which estimates the reward still to come."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import rlcore as rl
from rlcore.adapters.transformers import unwrap
from rlcore.engine.config import CriticConfig, UpdateConfig
from rlcore.engine.packs import Pack
from rlcore.engine.policy import Policy


class Critic(nn.Module):
    """V [N]: one value before every answer token, from the hidden state that predicts it; 0 everywhere at first.

    It starts from the policy's weights, shares none that train with it, and has an optimizer of its own.
    """

    def __init__(self, policy: Policy, config: CriticConfig, update: UpdateConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = copy.copy(policy)
        self.model = self.trunk.model = copy_without_head(policy.model)
        size = self.model.config.get_text_config().hidden_size
        self.head = nn.Linear(size, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.AdamW(
            (p for p in self.parameters() if p.requires_grad),
            lr=config.lr,
            betas=(update.beta1, update.beta2),
            weight_decay=update.weight_decay,
        )

    def forward(self, pack: Pack) -> Tensor:
        hidden = self.trunk.hidden(pack)
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)

    def loss(self, pack: Pack, batch: rl.TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped squared error of a micro-batch with `returns` and `old_value`, and its metrics."""
        return rl.value_loss(self(pack), batch, self.config.clip or None)

    def step(self, lr: float) -> Tensor:
        """One optimizer step; returns the norm of the gradient before clipping."""
        self.optimizer.param_groups[0]["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def copy_without_head(model: Any) -> Any:
    """A copy of what trains; what is frozen is the model's own, and nothing stands in place of the head of words."""
    # deepcopy takes what it finds under an object's id for the copy of it.
    done: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, {**done, id(unwrap(model).get_output_embeddings()): nn.Identity()})


def explained_variance(value: Tensor, returns: Tensor, mask: Tensor | None = None) -> float:
    """1 - var(returns - value) / var(returns): 1 where the critic knows all, 0 where it knows the mean alone.

    value, returns and mask are [N]; masked tokens do not count.
    """
    if mask is not None:
        value, returns = value[mask], returns[mask]
    variance = returns.var()
    return (1 - (returns - value).var() / variance).item() if variance > 0 else 0.0
