"""PPO: a learned critic, generalized advantage estimates, whitened over the batch, in the clipped surrogate."""

from torch import Tensor

from rlcore.layout import TokenBatch
from rlcore.methods.method import Method, required
from rlcore.ops.segments import Advantages, gae, whiten


def estimates(reward: Tensor, batch: TokenBatch, gamma: float, lam: float) -> Advantages:
    """GAE over the unmasked tokens; behind the last one the value is 0, also where an answer was cut off."""
    value = required(batch.value, "batch.value", "its advantages compare rewards with the critic's values")
    return gae(reward, value, batch.offsets, gamma, lam, batch.mask)


def advantage(reward: Tensor, batch: TokenBatch, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, whitened over the batch's tokens."""
    return whiten(estimates(reward, batch, gamma, lam).advantage, mask=batch.mask)


def returns(reward: Tensor, batch: TokenBatch, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """R_t = A_t + V_t with the advantages before whitening: what the critic learns."""
    return estimates(reward, batch, gamma, lam).returns


PPO = Method(
    key="ppo",
    title="Proximal Policy Optimization",
    paper="arXiv 1707.06347, with GAE (1506.02438); the advantages whitened over the batch, as trainers run it",
    family="advantage",
    formula="A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l});  L = -mean_it min(rho A, clip(rho) A)",
    advantage=advantage,
    returns=returns,
    structure={"ratio": "token", "surrogate": "ppo", "clip": (0.2, 0.2), "aggregate": "token_mean"},
    needs=("critic",),
)
