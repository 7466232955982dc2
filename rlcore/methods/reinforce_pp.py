"""REINFORCE++: token returns, whitened over the whole batch, in PPO's clipped surrogate. It needs no groups."""

from torch import Tensor

from rlcore.layout import TokenBatch
from rlcore.methods.method import Method
from rlcore.ops.segments import discounted_return, whiten


def advantage(reward: Tensor, batch: TokenBatch) -> Tensor:
    """A_it = (G_it - mean) / std over all tokens of the batch, G_it the sum of rewards from token t on.

    Nothing is discounted: where the reward arrives with the last token alone, G_it = r_i for every token.
    """
    return whiten(discounted_return(reward, batch.offsets), mask=batch.mask)


REINFORCE_PP = Method(
    key="reinforce_pp",
    title="REINFORCE++",
    paper="arXiv 2501.03262; without its KL term in the reward",
    family="advantage",
    formula="A_it = (G_it - mean_batch) / std_batch, G_it = sum_{s >= t} r_is;  L = -mean_it min(rho A, clip(rho) A)",
    advantage=advantage,
    structure={"ratio": "token", "surrogate": "ppo", "clip": (0.2, 0.2), "aggregate": "token_mean"},
)
