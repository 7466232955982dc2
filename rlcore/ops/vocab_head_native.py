"""The vocabulary head's row passes in C++, for float32 logits on the CPU; torch's for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.vocab_head_passes import Coefficients, Further, RowPasses, RowStatistics, Scale
from rlcore.algorithms.vocab_head_products import Rows
from rlcore.ops import backend
from rlcore.ops.policy_loss_raw import evaluate_chunk


def is_native(logits: Tensor) -> bool:
    return logits.dtype == torch.float32 and logits.device.type == "cpu" and selection.lie_apart(logits)


Chunk = tuple[int, int, int, int, int, int, int, float, float]


def chunk_arguments(logits: Tensor, target: Tensor, temperature: Tensor, scale: Scale) -> Chunk:
    """The chunk as csrc/cpu/vocab_head.h wants it; the caller keeps the tensors alive."""
    return (
        logits.data_ptr(), selection.row_stride(logits), logits.shape[0], logits.shape[1], target.data_ptr(),
        temperature.data_ptr(), temperature.dim(), scale.logit_scale.item(),
        0.0 if scale.softcap is None else scale.softcap.item(),
    )  # fmt: skip


def statistics_(
    a: Tensor, target: Tensor, scale: Scale, entropy: bool, further: Further | None = None
) -> RowStatistics:
    """`reference.statistics_` in C++; `further` by torch, from the chunk that C++ has bent."""
    if not is_native(a):
        return reference.statistics_(a, target, scale, entropy, further)
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
        reference.bent_further(further, a, out, scale)
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
    """`reference.gradient_` in C++."""
    if not is_native(z):
        return reference.gradient_(z, target, stats, d, scale, raw=raw, drop=drop, dtype=dtype)
    if raw and scale.bias is not None:
        z.add_(scale.bias)
    module = backend.native()
    assert module is not None
    keep = selection.kept_rows(d.nonzero(), z.shape[0]) if drop else slice(0, z.shape[0])
    count = selection.count(keep)
    target, temperature = target.contiguous(), scale.temperature.contiguous()
    stats, d = stats.contiguous(), d.contiguous()
    module.vocab_head_gradient(
        *chunk_arguments(z, target, temperature, scale),
        stats.maximum.data_ptr(), stats.log_sum.data_ptr(), stats.entropy.data_ptr(),
        d.logp.data_ptr(), 0 if d.entropy is None else d.entropy.data_ptr(),
        0 if isinstance(keep, slice) else keep.data_ptr(), count, raw, torch.get_num_threads(),
    )  # fmt: skip
    return z[:count] if dtype is None else z[:count].to(dtype), keep


NATIVE = RowPasses(statistics_, gradient_, evaluate_chunk)
