"""Places and largest values of ragged segments: the k-th largest row of each, equal values in the order of their rows.

    rank[i] = how many rows j of i's segment come before i:  x[j] > x[i], or x[j] = x[i] and j < i;  NaN before all

Two launches. The first sorts blocks of the flat axis, each in registers, by one 64-bit key: (where in the block the
row's segment begins, falling value, row), so that one sort serves all segments of a block and each keeps its lanes. The
second adds, for segments that go on in other blocks, how many rows of those come before: by a binary search per row and
block, N * (blocks of the segment) * log2 BLOCK loads, which hit the L2 cache.

Memory traffic: x, mask and order once, 8 bytes per row written and read, 8 written. Both depend on sizes alone; every
result is written once. A segment of L rows costs each of its rows L / BLOCK searches, so sequences of many thousand
rows are cheap and one of some million would be better off with a radix sort. Not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcore.kernels.segments import search_steps, segment_at

# Rows per block (2048 at most: 11 bits of the key), warps: 8 keys of 8 bytes a thread in the sort.
BLOCK = 1024
NUM_WARPS = 4
BITS = tl.constexpr(11)
ROW = tl.constexpr(0x7FF)
VALUE_AND_ROW = tl.constexpr(0x7FFFFFFFFFF)
LAST = tl.constexpr(0xFFFFFFFF)  # the value of a row that is masked: behind -inf


@triton.jit
def falling(x):
    """An integer 0 .. 2^32 - 2 that rises where x falls; NaN is 0."""
    x = tl.where(x == 0, 0.0, x.to(tl.float32))  # one zero
    bits = x.to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return 0x7FFFFFFF - tl.where(x != x, 0x7FFFFFFF, rising).to(tl.int64)


@triton.jit
def bounds(row, offsets_ptr, segments, steps):
    """(segment, start, stop) of each row; what lies before or behind all segments is as one of its own."""
    segment = segment_at(row, offsets_ptr, segments, steps)
    start = tl.load(offsets_ptr + segment)
    stop = tl.load(offsets_ptr + segment + 1)
    return segment, tl.where(row < start, 0, tl.where(row >= stop, stop, start)), stop


def segment_sort_kernel(
    x_ptr,  # float32, bfloat16 or float16, contiguous
    order_ptr,  # [n] int64, or None
    mask_ptr,  # bool, or None
    offsets_ptr,  # [S+1] int64
    keys_ptr,  # [blocks * BLOCK] int64
    n,
    segments,
    steps,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    row = begin + lane
    _, start, stop = bounds(row, offsets_ptr, segments, steps)
    keep = (row < n) & (row >= start) & (row < stop)
    at = row
    if order_ptr is not None:
        at = tl.load(order_ptr + row, mask=keep, other=0)
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + at, mask=keep, other=0) != 0)
    value = tl.where(keep, falling(tl.load(x_ptr + at, mask=keep, other=0.0)), LAST)
    key = (tl.maximum(start - begin, 0) << (BITS + 32)) | (value << BITS) | lane
    tl.store(keys_ptr + row, tl.sort(key) & VALUE_AND_ROW)


def segment_rank_kernel(
    x_ptr,  # as in segment_sort_kernel
    order_ptr,
    offsets_ptr,
    keys_ptr,
    rank_ptr,  # [n] int64, or None
    values_ptr,  # [S, k] float32 of -inf, or None
    rows_ptr,  # [S, k] int64 of -1, with values
    n,
    segments,
    steps,
    k,
    BLOCK: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    begin = block * BLOCK
    segment, start, stop = bounds(begin + lane, offsets_ptr, segments, steps)
    key = tl.load(keys_ptr + begin + lane)
    value = key >> BITS
    keep = value < LAST
    rank = lane - tl.maximum(start - begin, 0)
    # The other blocks of the segments that this block's first and last row are of.
    for other in range(tl.min(start, 0) // BLOCK, (tl.max(tl.where(keep, stop, 0), 0) + BLOCK - 1) // BLOCK):
        if other != block:
            from_lane = tl.maximum(start - other * BLOCK, 0)
            low = tl.minimum(from_lane, BLOCK)
            high = tl.where(keep, tl.maximum(tl.minimum(stop - other * BLOCK, BLOCK), low), low)
            from_lane = low
            limit = value + (other < block).to(tl.int64)  # an equal value in an earlier block comes before
            for _ in range(LOG_BLOCK + 1):
                open = low < high
                middle = (low + high) // 2
                before = (tl.load(keys_ptr + other * BLOCK + middle, mask=open, other=0) >> BITS) < limit
                high = tl.where(open & (before == 0), middle, high)
                low = tl.where(open & before, middle + 1, low)
            rank += low - from_lane
    row = begin + (key & ROW)
    there = row < n
    at = row
    if order_ptr is not None:
        at = tl.load(order_ptr + row, mask=there, other=0)
    if rank_ptr is not None:
        tl.store(rank_ptr + at, tl.where(keep, rank, -1), mask=there)
    if values_ptr is not None:
        chosen = keep & (rank < k)
        slot = segment * k + rank
        tl.store(values_ptr + slot, tl.load(x_ptr + at, mask=chosen, other=0.0).to(tl.float32), mask=chosen)
        tl.store(rows_ptr + slot, at, mask=chosen)


SIZES = ["n", "segments", "steps", "k"]
POINTERS = [f"{name}_ptr" for name in ("x", "order", "mask", "offsets", "keys", "rank", "values", "rows")]
segment_sort_kernel = triton.jit(
    segment_sort_kernel, do_not_specialize=SIZES[:3], do_not_specialize_on_alignment=POINTERS[:5]
)
segment_rank_kernel = triton.jit(
    segment_rank_kernel, do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[name for name in POINTERS if name != "mask_ptr"],
)  # fmt: skip


def sorted_keys(x: Tensor, offsets: Tensor, order: Tensor | None, mask: Tensor | None) -> Tensor:
    """(falling value, row) of every row, sorted in each part of a segment that lies in one block."""
    n, segments = x.shape[0], offsets.shape[0] - 1
    blocks = triton.cdiv(n, BLOCK)
    keys = torch.empty(blocks * BLOCK, dtype=torch.int64, device=x.device)
    segment_sort_kernel[(blocks,)](
        x, order, mask, offsets, keys, n, segments, search_steps(segments), BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return keys


def segment_rank(x: Tensor, offsets: Tensor, order: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """rank [N] int64 of the entries of x, -1 where masked or in no segment; arguments as in `segment_reduce`, all
    contiguous, x not float64."""
    rank = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    launch(x, offsets, order, mask, rank, None, None, 0)
    return rank


def segment_topk(
    x: Tensor, k: int, offsets: Tensor, order: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(values [S, k] float32, entries of x [S, k] int64), the largest first; -inf and -1 where there are fewer."""
    shape = (offsets.shape[0] - 1, k)
    values = torch.full(shape, -torch.inf, dtype=torch.float32, device=x.device)
    rows = torch.full(shape, -1, dtype=torch.int64, device=x.device)
    launch(x, offsets, order, mask, None, values, rows, k)
    return values, rows


def launch(
    x: Tensor, offsets: Tensor, order: Tensor | None, mask: Tensor | None, rank: Tensor | None, values: Tensor | None,
    rows: Tensor | None, k: int,
) -> None:  # fmt: skip
    n, segments = x.shape[0], offsets.shape[0] - 1
    if n == 0 or segments == 0:
        return
    keys = sorted_keys(x, offsets, order, mask)
    segment_rank_kernel[(triton.cdiv(n, BLOCK),)](
        x, order, offsets, keys, rank, values, rows, n, segments, search_steps(segments), k, BLOCK=BLOCK,
        LOG_BLOCK=BLOCK.bit_length() - 1, num_warps=NUM_WARPS,
    )  # fmt: skip
