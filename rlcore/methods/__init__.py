"""Published methods by key: each is an advantage and an objective composed of the library's functions."""

from rlcore.methods.cispo import CISPO
from rlcore.methods.dapo import DAPO
from rlcore.methods.dr_grpo import DR_GRPO
from rlcore.methods.grpo import GRPO
from rlcore.methods.gspo import GSPO
from rlcore.methods.lite_ppo import LITE_PPO
from rlcore.methods.loop import LOOP
from rlcore.methods.method import Method
from rlcore.methods.ppo import PPO
from rlcore.methods.reinforce_pp import REINFORCE_PP
from rlcore.methods.rloo import RLOO

__all__ = ["Method", "methods"]

ALL = (GRPO, RLOO, REINFORCE_PP, PPO, DR_GRPO, GSPO, DAPO, CISPO, LITE_PPO, LOOP)


def methods() -> dict[str, Method]:
    """All methods by key; `state` says "runs" or what is missing."""
    return {method.key: method for method in ALL}
