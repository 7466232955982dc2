"""The vocabulary head's row passes in C++, for float32 logits on the CPU; torch's for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_chunks as chunks
from rlcore.algorithms.vocab_head_chunks import Coefficients, Further, RowPasses, RowStatistics, Scale
from rlcore.algorithms.vocab_head_products import Rows
from rlcore.ops import backend
from rlcore.ops.policy_loss_raw import evaluate_chunk


def is_native(logits: Tensor) -> bool:
    """float32 rows on the CPU with unit stride that do not overlap (an expanded row does)."""
    lies_well = logits.stride(1) == 1 and row_stride(logits) >= logits.shape[1]
    return logits.dtype == torch.float32 and logits.device.type == "cpu" and lies_well


def row_stride(logits: Tensor) -> int:
    """The distance of two rows; a single one may say anything."""
    return logits.stride(0) if logits.shape[0] > 1 else logits.shape[1]


Chunk = tuple[int, int, int, int, int, int, int, float, float]


def chunk_arguments(logits: Tensor, target: Tensor, temperature: Tensor, scale: Scale) -> Chunk:
    """The chunk as csrc/cpu/vocab_head.h wants it; the caller keeps the tensors alive."""
    return (
        logits.data_ptr(), row_stride(logits), logits.shape[0], logits.shape[1], target.data_ptr(),
        temperature.data_ptr(), temperature.dim(), scale.logit_scale.item(),
        0.0 if scale.softcap is None else scale.softcap.item(),
    )  # fmt: skip


def statistics_(
    a: Tensor, target: Tensor, scale: Scale, entropy: bool, further: Further | None = None
) -> RowStatistics:
    """`chunks.statistics_` in C++; `further` by torch, from the chunk that C++ has bent."""
    if not is_native(a):
        return chunks.statistics_(a, target, scale, entropy, further)
    if scale.bias is not None:
        a.add_(scale.bias)
    module = backend.native()
    assert module is not None
    n = a.shape[0]
    out = RowStatistics(torch.empty(n), torch.empty(n), torch.empty(n), torch.empty(n) if entropy else torch.zeros(n))
    target, temperature = target.contiguous(), scale.temperature.contiguous()
    module.vocab_head_statistics(
        *chunk_arguments(a, target, temperature, scale),
        out.maximum.data_ptr(), out.log_sum.data_ptr(), out.logp.data_ptr(), out.entropy.data_ptr() if entropy else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    if further is not None:
        chunks.bent_further(further, a, out, scale)
    return out


def gradient_(
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
    """`chunks.gradient_` in C++."""
    if not is_native(z):
        return chunks.gradient_(z, target, stats, d, scale, raw=raw, drop=drop, dtype=dtype)
    if raw and scale.bias is not None:
        z.add_(scale.bias)
    module = backend.native()
    assert module is not None
    keep = chunks.kept_rows(d.nonzero(), z.shape[0]) if drop else slice(0, z.shape[0])
    count = chunks.count(keep)
    target, temperature = target.contiguous(), scale.temperature.contiguous()
    stats = RowStatistics(*(x.contiguous() for x in stats))
    d = Coefficients(d.logp.contiguous(), None if d.entropy is None else d.entropy.contiguous())
    module.vocab_head_gradient(
        *chunk_arguments(z, target, temperature, scale),
        stats.maximum.data_ptr(), stats.log_sum.data_ptr(), stats.entropy.data_ptr(),
        d.logp.data_ptr(), 0 if d.entropy is None else d.entropy.data_ptr(),
        0 if isinstance(keep, slice) else keep.data_ptr(), count, raw, torch.get_num_threads(),
    )  # fmt: skip
    return z[:count] if dtype is None else z[:count].to(dtype), keep


NATIVE = RowPasses(statistics_, gradient_, evaluate_chunk)
