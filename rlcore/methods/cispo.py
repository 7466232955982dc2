"""CISPO: the importance weight is clipped, not the update, so that every token keeps its gradient."""

from rlcore.methods.grpo import advantage
from rlcore.methods.method import Method

CISPO = Method(
    key="cispo",
    title="Clipped IS-weight Policy Optimization",
    paper="arXiv 2506.13585 (MiniMax-M1); no lower bound, upper bound 5, as trainers run it",
    family="ratio",
    formula="A_i as in GRPO;  L = -mean_it sg(min(rho_it, 1 + c)) A_i log pi(y_it)",
    advantage=advantage,
    structure={"ratio": "token", "surrogate": "cispo", "clip": (1.0, 4.0), "aggregate": "token_mean"},
    needs=("groups",),
)
