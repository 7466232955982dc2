"""Row passes over logits that exist already: the same statistics and gradients, block by block, without a GEMM."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_chunks as chunks
from rlcore.algorithms.vocab_head_chunks import Coefficients, Rows, RowStatistics, Scale


def score_blocks(logits: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[Tensor, Rows]]:
    """(copy of a block of logits in `dtype`, its flat rows), kept rows only on CPU.

    Logits [B, T, V] whose rows do not lie evenly (a slice of T) are walked sequence by sequence, never copied whole.
    """
    V = logits.shape[-1]
    even = logits.dim() == 2 or logits.stride(0) == logits.stride(1) * logits.shape[1] or logits.shape[0] < 2
    sheets = [logits.view(-1, V)] if even else logits.unbind(0)
    first = 0
    for sheet in sheets:
        n = sheet.shape[0]
        part = None if keep is None else keep[first : first + n]
        rows = chunks.kept_rows(part, n)
        for block in chunks.blocks(chunks.count(rows), V, dtype, logits.device):
            here: Rows = block if isinstance(rows, slice) else rows[block]
            z = sheet[here].to(dtype, copy=True)
            if part is not None and not chunks.compacts(part.device):
                z = torch.where(part[here, None], z, 0)
            yield z, slice(first + here.start, first + here.stop) if isinstance(here, slice) else here + first
        first += n


def statistics(logits: Tensor, target: Tensor, keep: Tensor | None, scale: Scale, *, entropy: bool) -> RowStatistics:
    """Statistics of logits [N, V] or [B, T, V] per flat row [N], 0 where masked; target and keep are flat [N]."""
    dtype, N = scale.logit_scale.dtype, target.shape[0]
    target, scale = chunks.neutral(keep, target, scale)
    chunks.check_target(target, logits.shape[-1], chunks.kept_rows(keep, N))
    stats = chunks.empty_statistics(N, dtype, logits.device)
    for z, rows in score_blocks(logits, keep, dtype):
        found = chunks.block_statistics(chunks.bend_(z, scale.of(rows)), target[rows], entropy)
        for x, y in zip(stats, found, strict=True):
            x[rows] = y
    if keep is not None and not chunks.compacts(keep.device):
        stats = RowStatistics(*(torch.where(keep, x, 0) for x in stats))
    return stats


def gradient(
    logits: Tensor, target: Tensor, keep: Tensor | None, scale: Scale, stats: RowStatistics, d: Coefficients
) -> Tensor:
    """d loss / d logits in the logits' shape and dtype; rows without a coefficient are 0 and never read on CPU."""
    dtype, V = scale.logit_scale.dtype, logits.shape[-1]
    if keep is not None:
        d = Coefficients(*(None if x is None else torch.where(keep, x, 0) for x in d))  # type: ignore[arg-type]
    target, scale = chunks.neutral(keep, target, scale)
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    flat = out.view(-1, V)
    moved = d.nonzero() if chunks.compacts(logits.device) else keep
    for z, rows in score_blocks(logits, moved, dtype):
        chunks.bend_(z, scale.of(rows))
        flat[rows] = chunks.block_gradient_(z, target[rows], stats.of(rows), d.of(rows), scale.of(rows)).to(out.dtype)
    return out
