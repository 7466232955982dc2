"""The vocabulary head's row passes in CUDA C++ (csrc/cuda/vocab_head.cu), for `rl.backend("cuda")`; torch's elsewhere.

Unlike the other passes these leave the logits of pass 1 as they are: pass 2 always starts from raw logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.vocab_head_passes import Coefficients, Further, RowPasses, RowStatistics, Scale
from rlcore.algorithms.vocab_head_products import Rows
from rlcore.ops import backend
from rlcore.ops.policy_loss_raw import evaluate_chunk

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

COPY_BYTES = 2**26

Number = tuple[int, int, float]


def takes(logits: Tensor) -> bool:
    return logits.dtype in TYPES and backend.takes_cuda(logits) and selection.lie_apart(logits)


def number(x: Tensor) -> Number:
    """(address, stride, value): one per row or a number on the device by its address, one of the CPU by its value."""
    return (x.data_ptr(), x.dim(), 0.0) if x.dim() or x.is_cuda else (0, 0, x.item())


def chunk_of(logits: Tensor) -> tuple[int, str, int, int, int]:
    return logits.data_ptr(), TYPES[logits.dtype], selection.row_stride(logits), logits.shape[0], logits.shape[1]


def ready(scale: Scale) -> tuple[tuple[Tensor | None, Tensor], tuple[int, Number, Number, Number | None]]:
    """(tensors to keep alive, addresses and numbers) of a scale."""
    bias = None if scale.bias is None else scale.bias.to(torch.float32).contiguous()
    temperature = scale.temperature.contiguous()
    cap = None if scale.softcap is None else number(scale.softcap)
    return (bias, temperature), (
        0 if bias is None else bias.data_ptr(), number(temperature), number(scale.logit_scale), cap,
    )  # fmt: skip


@backend.on_device
def statistics_(
    a: Tensor, target: Tensor, scale: Scale, entropy: bool, further: Further | None = None
) -> RowStatistics:
    """`reference.statistics_` in CUDA C++, but the raw logits stay as they are; `further` by torch."""
    if not takes(a):
        return reference.statistics_(a, target, scale, entropy, further)
    maximum, log_sum, logp = (torch.empty(a.shape[0], device=a.device) for _ in range(3))
    out = RowStatistics(maximum, log_sum, logp, torch.zeros_like(logp))
    target, (_alive, numbers) = target.contiguous(), ready(scale)
    addresses = [out.maximum.data_ptr(), out.log_sum.data_ptr(), out.logp.data_ptr(),
                 out.entropy.data_ptr() if entropy else 0]  # fmt: skip
    backend.cuda().vocab_head_statistics(
        chunk_of(a), numbers, target.data_ptr(), addresses, backend.cuda_stream(a)
    )
    if further is not None:
        fill(further, a, out, scale)
    return out


def fill(further: Further, a: Tensor, stats: RowStatistics, scale: Scale) -> None:
    """By torch, which bends logits in place, and these are to stay: from copies of a few rows at a time."""
    for rows in selection.even_chunks(slice(0, a.shape[0]), max(1, COPY_BYTES // (4 * a.shape[1])), a.device):
        bent = reference.bend_(a[rows].to(torch.float32, copy=True), scale.of(rows))
        reference.bent_further(further.of(rows), bent, stats.of(rows), scale.of(rows))


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
    """`reference.gradient_` in CUDA C++. No row leaves: those without a coefficient are zeroed, and not read.

    In a narrower dtype it takes the front of each row's memory.
    """
    if not takes(z):
        return reference.gradient_(z, target, stats, d, scale, raw=raw, drop=drop, dtype=dtype)
    out = z if dtype in (None, z.dtype) else z.view(dtype)[:, : z.shape[1]]
    write_gradient(z, target, stats, d, scale, out)
    return out, slice(0, z.shape[0])


@backend.on_device
def write_gradient(
    logits: Tensor, target: Tensor, stats: RowStatistics, d: Coefficients, scale: Scale, out: Tensor
) -> None:
    """d loss / d raw logits into `out`: the logits' own memory, or another of their type, or of 16 bits for float32."""
    target, (_alive, numbers) = target.contiguous(), ready(scale)
    stats, d = stats.contiguous(), d.contiguous()
    _, out_type, out_stride, *_ = chunk_of(out)
    backend.cuda().vocab_head_gradient(
        chunk_of(logits), numbers, target.data_ptr(),
        [stats.maximum.data_ptr(), stats.log_sum.data_ptr(), stats.logp.data_ptr(), stats.entropy.data_ptr()],
        d.logp.data_ptr(), 0 if d.entropy is None else d.entropy.data_ptr(),
        out.data_ptr(), out_type, out_stride, backend.cuda_stream(logits),
    )  # fmt: skip


CUDA = RowPasses(statistics_, gradient_, evaluate_chunk)
