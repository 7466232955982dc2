"""LOOP: the leave-one-out baseline in PPO's clipped surrogate, over several passes through the answers."""

from rlcore.methods.method import Method
from rlcore.methods.rloo import advantage

LOOP = Method(
    key="loop",
    title="Leave-One-Out PPO",
    paper="arXiv 2502.01600; clip and aggregation as in the authors' code (apple/ml-loop)",
    family="advantage",
    formula="A_i = r_i - mean_{j != i} r_j;  L = -mean_i mean_t min(rho_it A_i, clip(rho_it, 1/(1 + c), 1 + c) A_i)",
    advantage=advantage,
    structure={"ratio": "token", "surrogate": "ppo", "clip": (1 - 1 / 1.1, 0.1), "aggregate": "seq_mean_token_mean"},
    needs=("groups",),
    defaults={"update.epochs": 2},
)
