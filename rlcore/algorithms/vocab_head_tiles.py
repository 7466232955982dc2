"""The head's gradients from known statistics, by chunks of rows or by tiles of the vocabulary: 6NHV FLOPs by recompute.

Once the statistics of all rows are known, d logits of a tile of the vocabulary [N, v] needs nothing of the others:

    d weight[tile] = d logits^T h [v, H]        d hidden += d logits W[tile] [N, H]

So a row of d weight is one product, in the weight's dtype at once: no float32 sum of [V, H] exists. What is summed is d
hidden, read and written once per tile; there are as many tiles as there would be chunks, so this is less traffic, and
less memory, where N < V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_chunks as chunks
from rlcore.algorithms import vocab_head_products as products
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.vocab_head_passes import TORCH, Coefficients, RowPasses, RowStatistics, Scale, to_fit

Gradients = tuple[Tensor, list[Tensor], Tensor]
# A tile's columns are the rows of a GPU's product for d weight.
COLUMN_BLOCK = 128


def by_tiles(hidden: Tensor, weight: Tensor) -> bool:
    """Not on a CPU, where rows without a coefficient leave the products and d weight is summed by slices anyway."""
    return not selection.compacts(weight.device) and hidden.shape[0] < weight.shape[0]


def weight_gradient_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of the d weight that `backward` returns: the weight's own, on a CPU the statistics', in slices."""
    return dtype if selection.compacts(weight.device) else weight.dtype


def backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    scale: Scale,
    stats: RowStatistics,
    d: Coefficients,
    needs: Sequence[bool],
    *,
    passes: RowPasses = TORCH,
    chunk_bytes: int | None = None,
) -> Gradients:
    """(d hidden [N, H], d weight [V, H] whole or in slices, d bias [V])."""
    head = (hidden, weight, target, mask, scale, stats, d)
    if by_tiles(hidden, weight):
        return backward_tiles(*head, needs, passes=passes, chunk_bytes=chunk_bytes)
    dtype = scale.logit_scale.dtype
    found = products.HeadGradients(hidden, weight, (needs[0], needs[1], needs[2]), dtype)
    chunks.backward_chunks(*head, found, passes=passes, chunk_bytes=chunk_bytes)
    return found.hidden, [x.to(weight_gradient_dtype(weight, dtype)) for x in found.weight], found.bias


def backward_tiles(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    scale: Scale,
    stats: RowStatistics,
    d: Coefficients,
    needs: Sequence[bool],
    *,
    passes: RowPasses = TORCH,
    chunk_bytes: int | None = None,
) -> Gradients:
    """`backward` by tiles of at most `chunk_bytes` of logits (one column at least), all rows at once."""
    (N, H), V, dtype = hidden.shape, weight.shape[0], scale.logit_scale.dtype
    d = d.where(mask)
    target, scale = chunks.neutral(mask, target, scale)
    h = selection.take_hidden(hidden, slice(0, N), mask, products.product_dtype(weight, dtype))
    d, factor = to_fit(d, stats, scale, h.dtype)
    d_hidden = hidden.new_zeros((N if needs[0] else 0, H), dtype=dtype)
    d_weight = weight.new_empty((V if needs[1] else 0, H))
    d_bias = weight.new_empty(V if needs[2] else 0, dtype=dtype)
    held = selection.held_bytes(hidden, dtype) if needs[0] else 0
    width = tile_columns(N, V, dtype, hidden.device, chunk_bytes, held)
    buffer = chunks.logits_buffer(weight[:width], N, dtype)
    for start in range(0, V, width):
        tile = slice(start, min(start + width, V))
        w = weight[tile].to(h.dtype)
        z = products.multiply(h, w.t(), buffer[:, : w.shape[0]])
        here = scale if scale.bias is None else scale._replace(bias=scale.bias[tile])
        d_logits, _ = passes.gradient(z, target - start, stats, d, here, raw=True, dtype=h.dtype)
        if needs[0]:
            products.multiply_add(d_logits, w, d_hidden)
        # Added in float32; parts of a split sum may meet in 16 bits where torch lets them, as in any linear layer
        # (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction).
        if needs[1] and d_weight.dtype == h.dtype:
            products.multiply(d_logits.t(), h, d_weight[tile], factor)
        elif needs[1]:
            d_weight[tile] = d_logits.t() @ h
        if needs[2]:
            torch.sum(d_logits, 0, dtype=dtype, out=d_bias[tile])
    if factor is not None:
        d_hidden.mul_(factor)
        d_bias.mul_(factor)
    return d_hidden, [d_weight] if needs[1] else [], d_bias


def tile_columns(
    N: int, V: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None, held: int = 0
) -> int:
    """How many columns of logits a tile of all rows may hold, beside `held` bytes."""
    columns = max(1, selection.logits_bytes(device, chunk_bytes, held) // (max(N, 1) * dtype.itemsize))
    return min(V, columns - columns % COLUMN_BLOCK if columns > COLUMN_BLOCK else columns)
