"""Policy and value losses on log-probs that exist already."""

from __future__ import annotations

from torch import Tensor

from rlcore.algorithms import policy_loss as algorithm
from rlcore.algorithms.objective import KL, TIS, Objective
from rlcore.algorithms.value_loss import value_loss
from rlcore.layout import TokenBatch

__all__ = ["KL", "TIS", "Objective", "policy_loss", "value_loss"]


def policy_loss(
    logp: Tensor, batch: TokenBatch, objective: Objective, entropy: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a (micro-)batch under an objective, and its metrics; differentiable in logp and entropy.

    See `rlcore.algorithms.policy_loss` for the formula. One implementation serves every backend.
    """
    return algorithm.policy_loss(logp, batch, objective, entropy)
