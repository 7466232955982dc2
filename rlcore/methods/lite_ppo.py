"""Lite PPO: the group's mean as baseline, the batch's deviation as scale, token mean: two tricks on PPO's loss."""

from torch import Tensor

from rlcore.layout import TokenBatch, per_token
from rlcore.methods.method import Method, answer_reward, groups
from rlcore.ops.segments import group_advantage


def advantage(reward: Tensor, batch: TokenBatch) -> Tensor:
    """A_i = (r_i - mean of the group) / (std of all rewards of the batch about their own mean + 1e-6)."""
    return per_token(group_advantage(answer_reward(reward, batch), groups(batch), scale="batch"), batch)


LITE_PPO = Method(
    key="lite_ppo",
    title="Lite PPO",
    paper="arXiv 2508.08221 (Tricks or Traps)",
    family="advantage",
    formula="A_i = (r_i - mean_g) / (std_batch + eps);  L = -mean_it min(rho_it A_i, clip(rho_it, 1 - c, 1 + c) A_i)",
    advantage=advantage,
    structure={"ratio": "token", "surrogate": "ppo", "clip": (0.2, 0.2), "aggregate": "token_mean"},
    needs=("groups",),
)
