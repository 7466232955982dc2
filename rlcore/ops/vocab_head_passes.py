"""Which row passes of the vocabulary head run: Triton's on a GPU, C++ on the CPU where it is built, torch's else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from rlcore.algorithms import vocab_head_scores as scores
from rlcore.algorithms.vocab_head_passes import TORCH, RowPasses, RowStatistics
from rlcore.ops import backend, vocab_head_triton
from rlcore.ops.policy_loss_raw import evaluate_chunk
from rlcore.ops.vocab_head_cuda import CUDA
from rlcore.ops.vocab_head_native import NATIVE

# The objective of a chunk is differentiated by its own backend, whichever makes the row passes.
OTHER = TORCH._replace(objective=evaluate_chunk)


class ScorePasses(NamedTuple):
    """Statistics and gradient of logits that exist: `scores.statistics` and `scores.gradient` of one backend."""

    statistics: Callable[..., RowStatistics]
    gradient: Callable[..., Tensor]


def row_passes(x: Tensor, requested: str) -> RowPasses:
    """The row passes on x's device of a backend, "" for the fastest."""
    if requested == "cuda":
        return CUDA
    if backend.runs_triton(x, requested):
        return vocab_head_triton.TRITON
    return NATIVE if requested in ("", "native") and backend.native() is not None else OTHER


def score_passes(logits: Tensor, requested: str) -> ScorePasses:
    passes = row_passes(logits, requested)
    if passes is vocab_head_triton.TRITON:
        return ScorePasses(vocab_head_triton.score_statistics, vocab_head_triton.score_gradient)
    return ScorePasses(partial(scores.statistics, passes=passes), partial(scores.gradient, passes=passes))
