"""GSPO: GRPO with one probability ratio per answer, the geometric mean of its tokens', and a clip made for it."""

from rlcore.methods.grpo import advantage
from rlcore.methods.method import Method

GSPO = Method(
    key="gspo",
    title="Group Sequence Policy Optimization",
    paper="arXiv 2507.18071",
    family="ratio",
    formula="s_i = exp(mean_t log rho_it), A_i as in GRPO;  "
    "L = -mean_i min(s_i A_i, clip(s_i, 1 - c_low, 1 + c_high) A_i)",
    advantage=advantage,
    structure={"ratio": "sequence", "surrogate": "ppo", "clip": (3e-4, 4e-4), "aggregate": "seq_mean_token_mean"},
    needs=("groups",),
)
