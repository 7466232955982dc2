"""Published methods by key: each is an advantage and an objective composed of the library's functions."""

from rlcore.methods.grpo import GRPO
from rlcore.methods.method import Method
from rlcore.methods.reinforce_pp import REINFORCE_PP
from rlcore.methods.rloo import RLOO

__all__ = ["Method", "methods"]


def methods() -> dict[str, Method]:
    """All methods by key; `state` says "runs" or what is missing."""
    return {method.key: method for method in (GRPO, RLOO, REINFORCE_PP)}
