"""The vocabulary head in bounded chunks: GEMM -> row pass over the chunk's logits -> (in place) d logits -> two GEMMs.

Everything here works on flat rows, without autograd, in the statistics' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_products as products
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.vocab_head_passes import (
    TORCH,
    Coefficients,
    Further,
    RowPasses,
    RowStatistics,
    Scale,
    clear,
    empty_statistics,
    row_statistics,
    to_fit,
)
from rlcore.algorithms.vocab_head_products import HeadGradients, Rows


def neutral(mask: Tensor | None, target: Tensor, scale: Scale) -> tuple[Tensor, Scale]:
    """Where masked rows stay in the GEMM (GPU), give them a valid label and temperature."""
    if mask is None or selection.compacts(mask.device):
        return target, scale
    if scale.temperature.dim():
        scale = scale._replace(temperature=torch.where(mask, scale.temperature, 1.0))
    return torch.where(mask, target, 0), scale


def logits_buffer(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """One buffer for all chunks of a call: fresh pages cost as much as a sweep over the logits.

    On a GPU every row begins at a multiple of 256 bytes, for wide loads and aligned operands whatever the vocabulary.
    """
    V = weight.shape[0]
    width = V if weight.device.type == "cpu" else -(-V // 64) * 64
    return weight.new_empty((rows, width), dtype=dtype)[:, :V]


def chunk_buffer(
    hidden: Tensor, weight: Tensor, rows: Rows, dtype: torch.dtype, chunk_bytes: int | None, *, d_hidden: bool
) -> Tensor:
    """`logits_buffer` of as many of the rows as a chunk may hold, beside a `d_hidden` if one is made."""
    held = selection.held_bytes(hidden, dtype) if d_hidden else 0
    bound = selection.chunk_rows(weight.shape[0], dtype, hidden.device, chunk_bytes, held)
    return logits_buffer(weight, min(bound, selection.count(rows)), dtype)


def forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    scale: Scale,
    *,
    entropy: bool,
    gradient: bool = False,
    rows: Rows | None = None,
    buffer: Tensor | None = None,
    passes: RowPasses = TORCH,
    chunk_bytes: int | None = None,
    sharded: bool = False,
    further: Further | None = None,
) -> tuple[RowStatistics, Tensor]:
    """Statistics of every row [N], zero where masked: 2NHV. With `gradient` also d logp / d hidden [N, H]: 4NHV.

    `further`, of N zeros, is filled likewise.
    Where the weight is a shard of the vocabulary (`sharded`), a label outside it has the log-prob NaN and is no error.
    """
    N, V, dtype = hidden.shape[0], weight.shape[0], scale.logit_scale.dtype
    rows = selection.kept_rows(mask, N) if rows is None else rows
    target, scale = neutral(mask, target, scale)
    if not sharded:
        selection.check_target(target, V, rows)
    stats = empty_statistics(N, dtype, hidden.device)
    slope = HeadGradients(hidden, weight, (gradient, False, False), dtype)
    if buffer is None:
        buffer = chunk_buffer(hidden, weight, rows, dtype, chunk_bytes, d_hidden=gradient)
    for part in selection.even_chunks(rows, buffer.shape[0], hidden.device):
        h = selection.take_hidden(hidden, part, mask, products.product_dtype(weight, dtype))
        z = products.project(h, weight, buffer[: selection.count(part)])
        found = row_statistics(passes, z, target, part, scale, entropy, further)
        for x, y in zip(stats, found, strict=True):
            x[part] = y
        if gradient:
            here = scale.of(part)
            d, factor = to_fit(Coefficients(torch.ones_like(found.logp), None), found, here, h.dtype)
            d_logits, _ = passes.gradient(z, target[part], found, d, here, raw=False, dtype=h.dtype)
            slope.add(part, h, weight, d_logits, factor)
    if mask is not None and not selection.compacts(mask.device):
        stats = stats.where(mask)
        if further is not None:
            clear(further, mask)
        if gradient:
            slope.hidden.masked_fill_(~mask[:, None], 0)
    return stats, slope.hidden


def backward_chunks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    scale: Scale,
    stats: RowStatistics,
    d: Coefficients,
    gradients: HeadGradients,
    *,
    rows: Rows | None = None,
    buffer: Tensor | None = None,
    passes: RowPasses = TORCH,
    chunk_bytes: int | None = None,
) -> None:
    """Recompute form: logits again, then d logits in place, then two GEMMs (6NHV), over rows with a coefficient."""
    N, dtype = hidden.shape[0], scale.logit_scale.dtype
    d = d.where(mask)
    if rows is None:
        rows = selection.kept_rows(d.nonzero(), N)
    else:
        keep = selection.kept_rows(d.of(rows).nonzero(), selection.count(rows))
        rows = selection.keep_within(rows, keep)
    target, scale = neutral(mask, target, scale)
    if buffer is None:
        buffer = chunk_buffer(hidden, weight, rows, dtype, chunk_bytes, d_hidden=gradients.needs[0])
    for part in selection.even_chunks(rows, buffer.shape[0], hidden.device):
        h = selection.take_hidden(hidden, part, mask, products.product_dtype(weight, dtype))
        z = products.project(h, weight, buffer[: selection.count(part)])
        found, here = stats.of(part), scale.of(part)
        own, factor = to_fit(d.of(part), found, here, h.dtype)
        d_logits, _ = passes.gradient(z, target[part], found, own, here, raw=True, dtype=h.dtype)
        gradients.add(part, h, weight, d_logits, factor)
