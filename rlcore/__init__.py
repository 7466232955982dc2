"""rlcore: fused kernels for reinforcement learning of language models, and the lean loop that trains with them."""

import rlcore.interrupt  # noqa: F401 -- it comes first: torch takes seconds
from rlcore.adapters.transformers import AttachError, attach, trunk
from rlcore.layout import TokenBatch, Totals, per_token, shift
from rlcore.methods import Method, methods
from rlcore.metrics import merge_metrics
from rlcore.ops.backend import backend, backends, batch_invariant
from rlcore.ops.policy_loss import KL, TIS, Objective, policy_loss, value_loss
from rlcore.ops.prefix_attention import prefix_attention
from rlcore.ops.segments import (
    discounted_return,
    gae,
    group_advantage,
    group_metrics,
    reverse_scan,
    segment_count,
    segment_max,
    segment_mean,
    segment_min,
    segment_rank,
    segment_std,
    segment_sum,
    segment_topk,
    vtrace,
    whiten,
)
from rlcore.ops.vocab_head import LogProbs, linear_logprob, linear_policy_loss, logprob
from rlcore.ops.vocab_head_parallel import vocab_parallel_logprob
from rlcore.packing import pack_groups
from rlcore.prefix_tree import PrefixTree

__version__ = "0.1.0"

__all__ = [
    "KL",
    "TIS",
    "AttachError",
    "LogProbs",
    "Method",
    "Objective",
    "PrefixTree",
    "TokenBatch",
    "Totals",
    "__version__",
    "attach",
    "backend",
    "backends",
    "batch_invariant",
    "discounted_return",
    "gae",
    "group_advantage",
    "group_metrics",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "merge_metrics",
    "methods",
    "pack_groups",
    "per_token",
    "policy_loss",
    "prefix_attention",
    "reverse_scan",
    "segment_count",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_rank",
    "segment_std",
    "segment_sum",
    "segment_topk",
    "shift",
    "trunk",
    "value_loss",
    "vocab_parallel_logprob",
    "vtrace",
    "whiten",
]
