"""Row passes over logits that exist already: the same statistics and gradients, block by block, without a GEMM."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_chunks as chunks
from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.vocab_head_passes import TORCH, Coefficients, Further, RowPasses, RowStatistics, Scale
from rlcore.algorithms.vocab_head_products import Rows


def is_even(logits: Tensor) -> bool:
    """Whether the rows of all sequences lie at one distance: [N, V], or [B, T, V] that is no slice of T."""
    return logits.dim() == 2 or logits.stride(0) == logits.stride(1) * logits.shape[1] or logits.shape[0] < 2


def block_rows(logits: Tensor, dtype: torch.dtype) -> int:
    """Rows of a block: on a CPU a block for the cache of each core, for one thread works on whole rows."""
    cores = torch.get_num_threads() if logits.device.type == "cpu" else 1
    size = selection.of_device(selection.BLOCK_BYTES, logits.device)
    step = cores * max(1, size // (logits.shape[-1] * dtype.itemsize))
    return max(1, min(step, logits.shape[:-1].numel()))


def score_blocks(
    logits: Tensor, out: Tensor, keep: Tensor | None, step: int
) -> Iterator[tuple[Tensor, Tensor, Rows, Rows]]:
    """(a sheet of logits [n, V], that of `out`, a block's rows in the sheet, its flat rows), kept rows only on CPU.

    Logits [B, T, V] whose rows do not lie evenly (a slice of T) are walked sequence by sequence, never copied whole.
    """
    V = logits.shape[-1]
    sheets, outs = [[x.view(-1, V)] if is_even(logits) else x.unbind(0) for x in (logits, out)]
    first = 0
    for sheet, made in zip(sheets, outs, strict=True):
        n = sheet.shape[0]
        rows = selection.kept_rows(None if keep is None else keep[first : first + n], n)
        left = selection.count(rows)
        for start in range(0, left, step):
            block = slice(start, min(start + step, left))
            here: Rows = block if isinstance(rows, slice) else rows[block]
            flat = slice(first + here.start, first + here.stop) if isinstance(here, slice) else here + first
            yield sheet, made, here, flat
        first += n


def clear_masked_(z: Tensor, keep: Tensor | None, rows: Rows) -> Tensor:
    """Where masked rows stay (GPU) they become zero, whatever they hold."""
    return z if keep is None or selection.compacts(keep.device) else z.masked_fill_(~keep[rows, None], 0)


def statistics(
    logits: Tensor,
    target: Tensor,
    keep: Tensor | None,
    scale: Scale,
    *,
    entropy: bool,
    further: Further | None = None,
    passes: RowPasses = TORCH,
) -> RowStatistics:
    """Statistics of logits [N, V] or [B, T, V] per flat row [N], 0 where masked; target and keep are flat [N].

    `further`, of N zeros, is filled likewise.
    """
    dtype, N = scale.logit_scale.dtype, target.shape[0]
    target, scale = chunks.neutral(keep, target, scale)
    selection.check_target(target, logits.shape[-1], selection.kept_rows(keep, N))
    stats = reference.empty_statistics(N, dtype, logits.device)
    # The pass bends its block in place; it leaves one alone whose scale is 1.
    rows_leave = keep is None or selection.compacts(keep.device)
    stays = logits.dtype == dtype and reference.is_one(scale.temperature) and rows_leave
    step = block_rows(logits, dtype)
    buffer = logits.new_empty((0 if stays else step, logits.shape[-1]), dtype=dtype)
    for sheet, _, here, rows in score_blocks(logits, logits, keep, step):
        z = sheet[here] if stays else buffer[: selection.count(here)].copy_(sheet[here])
        clear_masked_(z, keep, rows)
        found = reference.row_statistics(passes, z, target, rows, scale, entropy, further)
        for x, y in zip(stats, found, strict=True):
            x[rows] = y
    if keep is not None and not selection.compacts(keep.device):
        stats = stats.where(keep)
        if further is not None:
            reference.clear(further, keep)
    return stats


def gradient(
    logits: Tensor,
    target: Tensor,
    keep: Tensor | None,
    scale: Scale,
    stats: RowStatistics,
    d: Coefficients,
    *,
    in_place: bool = False,
    passes: RowPasses = TORCH,
) -> Tensor:
    """d loss / d logits in the logits' shape and dtype, with `in_place` in their memory, where rows must not overlap.

    Rows without a coefficient are 0 and never read on CPU.
    """
    dtype = scale.logit_scale.dtype
    d = d.where(keep)
    target, scale = chunks.neutral(keep, target, scale)
    out = logits if in_place else torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    moved = d.nonzero() if selection.compacts(logits.device) else keep
    step = block_rows(logits, dtype)
    buffer = None
    for sheet, made, here, rows in score_blocks(logits, out, moved, step):
        # A gradient is made where it belongs, if it can be.
        stays = isinstance(here, slice) and sheet.dtype == dtype and sheet.stride(1) == 1
        if stays:
            z = made[here]
        else:
            buffer = logits.new_empty((step, logits.shape[-1]), dtype=dtype) if buffer is None else buffer
            z = buffer[: selection.count(here)]
        if not (stays and in_place):
            z.copy_(sheet[here])
        clear_masked_(z, moved, rows)
        passes.gradient(z, target[rows], stats.of(rows), d.of(rows), scale.of(rows), raw=True)
        if not stays:
            made[here] = z if isinstance(here, slice) else z.to(made.dtype)
    if in_place and moved is not None and selection.compacts(moved.device):
        out[~moved.reshape(out.shape[:-1])] = 0
    return out
