"""RLOO: REINFORCE on whole answers, each with the mean reward of the others in its group as baseline."""

from torch import Tensor

from rlcore.layout import TokenBatch, per_token
from rlcore.methods.method import Method, answer_reward, groups
from rlcore.ops.segments import group_advantage


def advantage(reward: Tensor, batch: TokenBatch) -> Tensor:
    """A_i = r_i - mean of the other rewards of the group; no division by a deviation."""
    r = answer_reward(reward, batch)
    return per_token(group_advantage(r, groups(batch), center="leave_one_out", scale="none"), batch)


RLOO = Method(
    key="rloo",
    title="REINFORCE Leave-One-Out",
    paper="arXiv 2402.14740; without its KL term in the reward",
    family="advantage",
    formula="A_i = r_i - mean_{j != i} r_j;  L = -mean_i A_i sum_t log pi(y_it)",
    advantage=advantage,
    structure={"ratio": "none", "surrogate": "reinforce", "aggregate": "seq_mean_token_sum"},
    needs=("groups",),
)
