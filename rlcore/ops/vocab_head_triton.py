"""The vocabulary head's row passes in Triton, for float32, bfloat16 and float16 logits; torch's for float64."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms import vocab_head_scores as scores
from rlcore.algorithms.vocab_head_passes import Coefficients, Further, RowPasses, RowStatistics, Scale
from rlcore.algorithms.vocab_head_products import Rows
from rlcore.ops import backend
from rlcore.ops.policy_loss_raw import evaluate_chunk


def is_triton(logits: Tensor) -> bool:
    """Rows with unit stride, of a dtype whose statistics are float32."""
    return logits.dtype != torch.float64 and (logits.stride(-1) == 1 or logits.shape[-1] == 1)


@backend.on_device
def statistics(
    a: Tensor, target: Tensor, scale: Scale, entropy: bool, further: Further | None = None
) -> RowStatistics:
    """`reference.statistics_`, but the raw logits stay as they are: bending them again is cheaper than writing them."""
    if not is_triton(a):
        return reference.statistics_(a, target, scale, entropy, further)
    from rlcore.kernels import vocab_head as kernels

    found = kernels.statistics(
        a, target.contiguous(), contiguous(scale.bias), scale.temperature.contiguous(), scale.softcap,
        scale.logit_scale, entropy, further,
    )  # fmt: skip
    return RowStatistics(*found)


def gradient(
    z: Tensor,
    target: Tensor,
    stats: RowStatistics,
    d: Coefficients,
    scale: Scale,
    *,
    raw: bool,
    drop: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Rows]:
    """`reference.gradient_` of raw logits, which `statistics` has left. Rows without a coefficient become zero.

    In a narrower dtype it takes the front of each row's memory, so that a chunk costs four bytes a logit and no more.
    """
    if not is_triton(z):
        return reference.gradient_(z, target, stats, d, scale, raw=raw, drop=drop, dtype=dtype)
    from rlcore.kernels import vocab_head as kernels

    out = kernels.narrower(z, z.dtype if dtype is None else dtype)
    return write_gradient(z, out, target, stats, d, scale), slice(0, z.shape[0])


@backend.on_device
def write_gradient(
    logits: Tensor, out: Tensor, target: Tensor, stats: RowStatistics, d: Coefficients, scale: Scale
) -> Tensor:
    from rlcore.kernels import vocab_head as kernels

    return kernels.gradient(
        logits, out, target.contiguous(), contiguous(scale.bias), scale.temperature.contiguous(), scale.softcap,
        scale.logit_scale, stats.contiguous(), *d.contiguous(),
    )  # fmt: skip


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


TRITON = RowPasses(statistics, gradient, evaluate_chunk)


# ------------------------------------------------------------------------------------------------ no logits at all


@backend.on_device
def fused_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    scale: Scale,
    *,
    entropy: bool,
    further: Further | None = None,
    sharded: bool = False,
) -> RowStatistics:
    """`chunks.forward_chunks` of all rows in one kernel that holds no logits; a row's bits depend on nothing else."""
    from rlcore.kernels import vocab_head_fused as kernels

    if not sharded:
        selection.check_target(target, weight.shape[0], selection.kept_rows(mask, target.shape[0]))
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    found = kernels.statistics(
        hidden, weight, target.contiguous(), contiguous(mask), contiguous(scale.bias), scale.temperature.contiguous(),
        scale.softcap, scale.logit_scale, entropy, further,
    )  # fmt: skip
    return RowStatistics(*found)


# ------------------------------------------------------------------------------------------------ logits that exist


def score_statistics(
    logits: Tensor,
    target: Tensor,
    keep: Tensor | None,
    scale: Scale,
    *,
    entropy: bool,
    further: Further | None = None,
) -> RowStatistics:
    """`scores.statistics` of all rows in one launch, without an upcast copy; 0 where masked."""
    if not is_triton(logits):
        return scores.statistics(logits, target, keep, scale, entropy=entropy, further=further)
    check_labels(logits, target, keep)
    stats = statistics(logits, target, scale, entropy, further)
    if keep is None:
        return stats
    if further is not None:
        reference.clear(further, keep)
    return stats.where(keep)


def score_gradient(
    logits: Tensor,
    target: Tensor,
    keep: Tensor | None,
    scale: Scale,
    stats: RowStatistics,
    d: Coefficients,
    *,
    in_place: bool = False,
) -> Tensor:
    """`scores.gradient` in one launch; masked rows are not read."""
    if not is_triton(logits):
        return scores.gradient(logits, target, keep, scale, stats, d, in_place=in_place)
    d = d.where(keep)
    out = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return write_gradient(logits, out, target, stats, d, scale)


def check_labels(logits: Tensor, target: Tensor, keep: Tensor | None) -> None:
    selection.check_target(target, logits.shape[-1], selection.kept_rows(keep, target.shape[0]))
