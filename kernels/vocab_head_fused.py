"""Statistics of the head's logits without the logits: a tile of them is made in registers and goes no further.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature
    maximum, log_sum = log sum_v exp(z_v - maximum), logp = z_y - maximum - log_sum, H = -sum_v p_v log p_v
    if asked for also argmax_v p_v and sum_v p_v^2

2NHV FLOPs. Program (t, s, g) owns a tile of rows and a range of SPLIT vocabulary entries: it walks the range tile by
tile, each a product over the whole hidden size, and keeps four to six numbers a row online; a second kernel merges the
ranges in order. Memory: 16 to 24 bytes per row and range, and nothing else. The GROUP row tiles of a group run side by
side over one range after another: their rows stay in the L2 cache, and W comes from memory once per group.

Tiles and ranges are fixed by dtype, vocabulary, softcap, what is asked for and kind of GPU, never by the number of
rows, so a row's numbers are the same bits in any batch. Masked rows are not read, and a tile of nothing else is
skipped. Speed is not measured yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from rlcore.kernels.vocab_head import LOG_ZERO, LOWEST, at_least, bend, numbers

# rows, vocabulary entries and depth of a tile, warps, stages; one program on a processor. Registers and stack are the
# compiler's (bench/static).
TILES = {
    # The sums of 128 x 256 are 128 of a thread's 255 registers; three stages of operands are 144 of 227 KiB. A fourth,
    # or the arithmetic of a softcap or of `further`, put registers on the stack.
    "sm_90": (128, 256, 64, 8, 3),
    "sm_90 small": (128, 128, 64, 8, 4),
    # The sums of 128 x 256 leave the tensor memory all at once: with a softcap a thread kept 1 to 3 KiB on the stack,
    # of 128 x 128 nothing. Four stages are 128 KiB.
    "sm_100": (128, 128, 64, 8, 4),
    # Operands come through registers too: 128 x 256, or a depth of 64, did not fit in them. Four stages take 48 KiB,
    # which the smaller chips of this kind (and sm_120) have as well.
    "sm_80": (128, 128, 32, 8, 4),
    # 64 KiB of local memory hold 128 x 128 x 64 twice.
    "amd": (128, 128, 64, 8, 2),
    # No tensor cores (no TF32 unless asked for): smaller tiles, whose operands fit in registers.
    "float32": (64, 64, 16, 4, 2),
}
# Vocabulary entries of a program: 38 ranges of a vocabulary of 152K, which keep a large GPU busy from 4 row tiles on.
SPLIT = 4096
# Row tiles side by side: 16 of 128 rows of hidden size 4,096 are 16 MiB in 16 bits, a third of an H100's L2 cache; a
# batch of 8,192 rows then reads W four times from memory, not h once for every tile of W.
GROUP = 16
MERGE_ROWS = 128


@triton.jit(
    do_not_specialize=["n"],
    do_not_specialize_on_alignment=["target_ptr", "mask_ptr", "temperature_ptr"],
)
def tile_statistics_kernel(
    h_ptr,  # [n, H], rows h_stride apart
    h_stride,
    w_ptr,  # [V, H], rows w_stride apart
    w_stride,
    n,
    V,
    H,
    target_ptr,  # [n] int64
    mask_ptr,  # [n] int32, or None
    bias_ptr,  # [V], or None
    temperature_ptr,
    temperature_stride,
    softcap_ptr,
    logit_scale_ptr,
    # [splits, 4, n]: maximum, sum of e = exp(z - maximum), z of the label, sum of e (z - maximum); with FURTHER 6 and
    # not 4: sum of e^2, and the bits of the entry that has the maximum
    part_ptr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    FURTHER: tl.constexpr,
):
    """Program (t, s, g): row tile t of group g over vocabulary entries [s SPLIT, (s + 1) SPLIT)."""
    tile = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1).to(tl.int64)
    keep = row < n
    if MASKED:
        keep = keep & (tl.load(mask_ptr + row, mask=keep, other=0) != 0)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    at_label = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    best = tl.zeros([ROWS], tl.int32)
    if tl.max(keep.to(tl.int32), 0) > 0:
        label = tl.load(target_ptr + row, mask=keep, other=-1)
        temperature = tl.load(temperature_ptr + row * temperature_stride, mask=keep, other=1.0)
        scale = tl.load(logit_scale_ptr)
        if CAPPED:
            cap = tl.load(softcap_ptr)
            inner, outer = (scale / cap + tl.zeros([ROWS], tl.float32))[:, None], (cap / temperature)[:, None]
        else:
            inner, outer = (scale / temperature)[:, None], 1.0
        depth = tl.arange(0, DEPTH)
        h_ptrs = h_ptr + row[:, None] * h_stride + depth[None, :]
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, V), COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < V
            w_ptrs = w_ptr + column[None, :] * w_stride + depth[:, None]
            a = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in range(0, H, DEPTH):
                left = H - k
                x = tl.load(h_ptrs + k, mask=keep[:, None] & (depth[None, :] < left), other=0.0)
                y = tl.load(w_ptrs + k, mask=inside[None, :] & (depth[:, None] < left), other=0.0)
                a = tl.dot(x, y, a, input_precision="ieee")
            if BIASED:
                a += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            z = bend(a, inner, outer, CAPPED)[0]
            z = tl.where(inside[None, :], z, float("-inf"))
            at_label += tl.sum(tl.where(column[None, :] == label[:, None], z, 0.0), 1)
            higher = tl.maximum(top, tl.max(z, 1))
            down = tl.maximum(top - higher, LOG_ZERO)
            shrink = tl.exp(down)
            below = at_least(z - higher[:, None], LOG_ZERO)
            e = tl.exp(below)
            if ENTROPY:
                weighted = shrink * (weighted + total * down) + tl.sum(e * below, 1)
            if FURTHER:
                squares = shrink * shrink * squares + tl.sum(e * e, 1)
                found = tl.min(tl.where(z == higher[:, None], column[None, :], V), 1)
                best = tl.where(higher > top, found.to(tl.int32), best)
            total = shrink * total + tl.sum(e, 1)
            top = higher
    step = n.to(tl.int64)
    part_ptr += split * (6 if FURTHER else 4) * step + row
    tl.store(part_ptr, top, mask=row < n)
    tl.store(part_ptr + step, total, mask=row < n)
    tl.store(part_ptr + 2 * step, at_label, mask=row < n)
    if ENTROPY:
        tl.store(part_ptr + 3 * step, weighted, mask=row < n)
    if FURTHER:
        tl.store(part_ptr + 4 * step, squares, mask=row < n)
        tl.store(part_ptr + 5 * step, best.to(tl.float32, bitcast=True), mask=row < n)


@triton.jit(do_not_specialize=["n", "splits"], do_not_specialize_on_alignment=["target_ptr", "mask_ptr"])
def merge_kernel(
    part_ptr,
    target_ptr,
    mask_ptr,
    maximum_ptr,  # this and the next three: [n] fp32
    log_sum_ptr,
    logp_ptr,
    entropy_ptr,
    top1_ptr,  # [n] int64, or None, as the next
    sum_sq_ptr,
    n,
    V,
    splits,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    FURTHER: tl.constexpr,
):
    """The ranges of a row, in order; zeros where masked, logp NaN where the label is outside the vocabulary."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < n
    keep = there
    if MASKED:
        keep = keep & (tl.load(mask_ptr + row, mask=there, other=0) != 0)
    step = n.to(tl.int64)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    at_label = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    best = tl.zeros([ROWS], tl.int32)
    for split in range(splits):
        part = part_ptr + split * (6 if FURTHER else 4) * step + row
        found = tl.load(part, mask=there, other=LOWEST)
        found_total = tl.load(part + step, mask=there, other=0.0)
        at_label += tl.load(part + 2 * step, mask=there, other=0.0)
        higher = tl.maximum(top, found)
        down, found_down = tl.maximum(top - higher, LOG_ZERO), tl.maximum(found - higher, LOG_ZERO)
        shrink, found_shrink = tl.exp(down), tl.exp(found_down)
        if ENTROPY:
            found_weighted = tl.load(part + 3 * step, mask=there, other=0.0)
            weighted = shrink * (weighted + total * down) + found_shrink * (found_weighted + found_total * found_down)
        if FURTHER:
            found_squares = tl.load(part + 4 * step, mask=there, other=0.0)
            squares = shrink * shrink * squares + found_shrink * found_shrink * found_squares
            found_best = tl.load(part + 5 * step, mask=there, other=0.0).to(tl.int32, bitcast=True)
            best = tl.where(found > top, found_best, best)
        total = shrink * total + found_shrink * found_total
        top = higher
    label = tl.load(target_ptr + row, mask=there, other=-1)
    log_sum = tl.log(total)
    logp = tl.where((label >= 0) & (label < V), (at_label - top) - log_sum, float("nan"))
    tl.store(maximum_ptr + row, tl.where(keep, top, 0.0), mask=there)
    tl.store(log_sum_ptr + row, tl.where(keep, log_sum, 0.0), mask=there)
    tl.store(logp_ptr + row, tl.where(keep, logp, 0.0), mask=there)
    entropy = log_sum - weighted / total if ENTROPY else tl.zeros([ROWS], tl.float32)
    tl.store(entropy_ptr + row, tl.where(keep, entropy, 0.0), mask=there)
    if FURTHER:
        tl.store(top1_ptr + row, tl.where(keep, best, 0).to(tl.int64), mask=there)
        tl.store(sum_sq_ptr + row, tl.where(keep, squares / (total * total), 0.0), mask=there)


def tiles(dtype: torch.dtype, small: bool) -> tuple[int, int, int, int, int]:
    if dtype == torch.float32:
        return TILES["float32"]
    if triton.knobs.runtime.interpret:
        return TILES["sm_80"]
    target = driver.active.get_current_target()
    if target.backend == "hip":
        return TILES["amd"]
    if target.arch == 90:
        return TILES["sm_90 small" if small else "sm_90"]
    return TILES["sm_100" if 100 <= target.arch < 120 else "sm_80"]


def statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    entropy: bool,
    further: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, log_sum, logp, entropy), each [n] fp32, zero where masked; entropy is zeros unless asked for.

    `further` receives the likeliest entries [n] int64, of several the lowest, and sums of p^2 [n] fp32.

    hidden [n, H] and weight [V, H] of one dtype, bf16, fp16 or fp32, unit stride along H; target, mask, bias and
    temperature contiguous; all on one device.
    """
    (n, H), V = hidden.shape, weight.shape[0]
    rows, columns, depth, warps, stages = tiles(hidden.dtype, softcap is not None or further is not None)
    splits = triton.cdiv(V, SPLIT)
    part = torch.empty((splits, 4 if further is None else 6, n), dtype=torch.float32, device=hidden.device)
    out = tuple(torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(4))
    # As 32 bits: from a mask of 8 bits before the load of a float32 operand, Triton 3.7 concludes on sm_100 that the
    # operand has no more digits, and multiplies in TF32.
    mask = None if mask is None else mask.to(torch.int32)
    if n:
        row_tiles = triton.cdiv(n, rows)
        group = min(row_tiles, GROUP)
        tile_statistics_kernel[(group, splits, triton.cdiv(row_tiles, group))](
            hidden, hidden.stride(0), weight, weight.stride(0), n, V, H, target, mask, bias,
            *numbers(temperature, softcap, logit_scale), part,
            SPLIT=SPLIT, ROWS=rows, COLUMNS=columns, DEPTH=depth, MASKED=mask is not None, BIASED=bias is not None,
            CAPPED=softcap is not None, ENTROPY=entropy, FURTHER=further is not None, num_warps=warps,
            num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
            part, target, mask, *out, *((None, None) if further is None else further), n, V, splits,
            ROWS=MERGE_ROWS, MASKED=mask is not None, ENTROPY=entropy, FURTHER=further is not None, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
