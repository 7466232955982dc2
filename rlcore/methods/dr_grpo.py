"""Dr. GRPO: GRPO without the two divisions that favour long wrong answers and questions of one mind."""

from torch import Tensor

from rlcore.layout import TokenBatch, per_token
from rlcore.methods.method import Method, answer_reward, groups
from rlcore.ops.segments import group_advantage


def advantage(reward: Tensor, batch: TokenBatch) -> Tensor:
    """A_i = r_i - mean of the group; no division by a deviation."""
    return per_token(group_advantage(answer_reward(reward, batch), groups(batch), scale="none"), batch)


DR_GRPO = Method(
    key="dr_grpo",
    title="GRPO Done Right",
    paper="arXiv 2503.20783",
    family="advantage",
    formula="A_i = r_i - mean_g;  L = -mean_i 1/L_max sum_t min(rho_it A_i, clip(rho_it, 1 - c, 1 + c) A_i)",
    advantage=advantage,
    # The length is a constant factor of the loss; the training loop puts the longest answer that it samples in.
    structure={
        "ratio": "token", "surrogate": "ppo", "clip": (0.2, 0.2), "aggregate": "seq_mean_token_sum_norm", "length": 1.0,
    },
    needs=("groups",),
)  # fmt: skip
