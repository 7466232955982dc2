"""DAPO: GRPO with a higher upper clip, token mean, no groups without signal, and a soft limit on the length."""

from rlcore.methods.grpo import advantage
from rlcore.methods.method import Method

DAPO = Method(
    key="dapo",
    title="Decoupled Clip and Dynamic Sampling Policy Optimization",
    paper="arXiv 2503.14476",
    family="sampling",
    formula="A_i as in GRPO over groups that disagree, r_i less the overlong penalty;  "
    "L = -mean_it min(rho_it A_i, clip(rho_it, 1 - c_low, 1 + c_high) A_i)",
    advantage=advantage,
    structure={"ratio": "token", "surrogate": "ppo", "clip": (0.2, 0.28), "aggregate": "token_mean"},
    needs=("groups",),
    # The paper's buffer is 4096 of 20480 tokens.
    defaults={"rollout.dynamic_sampling": True, "rollout.overlong_buffer": 0.2},
)
