"""GRPO: group-relative advantages in PPO's clipped surrogate, without a value model."""

from torch import Tensor

from rlcore.layout import TokenBatch, per_token
from rlcore.methods.method import Method, answer_reward, groups
from rlcore.ops.segments import group_advantage


def advantage(reward: Tensor, batch: TokenBatch) -> Tensor:
    """A_i = (r_i - mean of the group) / (std of the group + 1e-6), the same for every token of answer i."""
    r = answer_reward(reward, batch)
    return per_token(group_advantage(r, groups(batch), center="group", scale="group", ddof=1, eps=1e-6), batch)


GRPO = Method(
    key="grpo",
    title="Group Relative Policy Optimization",
    paper="arXiv 2402.03300; without its KL term, as trainers run it by default",
    family="advantage",
    formula="A_i = (r_i - mean_g) / (std_g + eps);  L = -mean_i mean_t min(rho_it A_i, clip(rho_it, 1 - c, 1 + c) A_i)",
    advantage=advantage,
    structure={"ratio": "token", "surrogate": "ppo", "clip": (0.2, 0.2), "aggregate": "seq_mean_token_mean"},
    needs=("groups",),
)
