"""rlcore: fused kernels for reinforcement learning of language models, and the lean loop that trains with them."""

from rlcore.layout import TokenBatch, Totals, merge_metrics, per_token, shift
from rlcore.ops.backend import backend, backends
from rlcore.ops.policy_loss import KL, TIS, Objective, policy_loss, value_loss

__version__ = "0.1.0"

__all__ = [
    "KL",
    "TIS",
    "Objective",
    "TokenBatch",
    "Totals",
    "__version__",
    "backend",
    "backends",
    "merge_metrics",
    "per_token",
    "policy_loss",
    "shift",
    "value_loss",
]
