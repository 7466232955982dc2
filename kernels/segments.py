"""Reductions over the segments of a flat axis, and the weighted statistics that advantages are made of.

    sum, mean, std, min, max, count of x[i] over offsets[s] <= i < offsets[s+1] with mask[i]
    scope: W = sum of w[i],  mean = (sum of w[i] x[i]) / W,  sigma = sqrt((sum of w[i] (x[i] - mean)^2) / (W - ddof))

The flat axis is cut at every multiple of BLOCK rows and at the ends of segments, so that a segment of a million rows
among short ones is the work of many programs. A piece is one block of registers: its deviations are taken from its own
mean at no second read, and pieces are put together by  sum of w (x - mean)^2 = sum over pieces of (their own sum of
squares + W_piece (mean_piece - mean)^2): two passes, nothing is ever subtracted from a sum of squares. Everything is
added in float64, as the reference does, so that where a segment lies on the axis, and with it how it is cut, does not
show in float32 results: one addition per row is little beside the reading of 4 bytes where float64 runs at half or a
fortieth of the rate of float32; where it is slower still, adding may take longer than reading. Not measured.

Memory traffic: x once, the mask, weights and order once, 24 bytes per piece. Launch: S programs for the first piece of
each segment and one for each cut between; a second launch adds the pieces of each segment, first to last, unless all
rows lie before the first cut. No atomics: the same arguments give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a piece, warps. A segment begins anywhere, so a thread loads single elements, neighbours side by side: 8 of
# them a thread for long segments, all under way at once. With 48 registers 5 programs are on a processor of an H100,
# which has 40 KiB of loads under way then: enough for its share of the bandwidth. Where segments are short on average,
# one warp takes a whole one. Not measured.
LONG = (2048, 8)
SHORT = (128, 1)
# Rows per segment on average, up to which they are short.
FEW = 256
# Pieces that one warp adds at a time, 8 a thread: most segments have a few, one of a million rows 489 or 7813.
MERGED = 256


@triton.jit
def segment_at(row, offsets_ptr, segments, steps):
    """The last segment that begins at or before each row (0 before all), in int64. steps: see `search_steps`."""
    low = row * 0
    high = row * 0 + segments
    for _ in range(steps):
        middle = (low + high) // 2
        begun = tl.load(offsets_ptr + middle) <= row
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def widened(x):
    """float64, by way of float32, which the interpreter needs for bfloat16."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def positive_or_1(x):
    return tl.where(x > 0, x, 1.0)


@triton.jit
def extreme(x, there, LARGEST: tl.constexpr):
    """The largest or smallest, NaN where one is there."""
    if LARGEST:
        found = tl.max(tl.where(there, x, float("-inf")), 0)
    else:
        found = tl.min(tl.where(there, x, float("inf")), 0)
    return tl.where(tl.max((there & (x != x)).to(tl.int32), 0) != 0, float("nan"), found)


@triton.jit
def finish(out_ptr, segment, segments, total, value, square, ddof, KIND: tl.constexpr):
    """Writes a segment's results from its weight, its sum (or extreme) and its sum of squared deviations."""
    if KIND == "count":
        tl.store(out_ptr + segment, total.to(tl.int64))
    elif KIND == "mean":
        tl.store(out_ptr + segment, value / positive_or_1(total))
    elif KIND == "std":
        deviation = tl.sqrt(square / positive_or_1(total - ddof))
        tl.store(out_ptr + segment, tl.where(total <= ddof, 0.0, deviation))
    elif KIND == "scope":
        # 1 where the deviation is not defined, so that dividing by it changes nothing.
        deviation = tl.sqrt(square / positive_or_1(total - ddof))
        tl.store(out_ptr + segment, total)
        tl.store(out_ptr + segments + segment, value / positive_or_1(total))
        tl.store(out_ptr + 2 * segments + segment, tl.where(total <= ddof, 1.0, deviation))
    else:
        tl.store(out_ptr + segment, value)


def segment_piece_kernel(
    x_ptr,  # [*], contiguous, as are mask and weight of the same rows
    order_ptr,  # [N] int64: row i of the flat axis is entry order[i] of x; None: entry i
    mask_ptr,  # bool, or None
    weight_ptr,  # floats, or None for 1
    offsets_ptr,  # [S+1] int64
    parts_ptr,  # [3, pieces] float64, with SPLIT
    out_ptr,  # [S], "scope": [3, S]; without SPLIT
    segments,
    pieces,
    steps,
    ddof,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program s < S: rows of segment s up to the next cut. Program S - 1 + c: rows from cut c on of the segment that
    goes on there, if one does."""
    piece = tl.program_id(0).to(tl.int64)
    segments = segments.to(tl.int64)
    if piece < segments:
        start = tl.load(offsets_ptr + piece)
        stop = tl.minimum(tl.load(offsets_ptr + piece + 1), (start // BLOCK + 1) * BLOCK)
    else:
        start = (piece - segments + 1) * BLOCK
        segment = segment_at(start, offsets_ptr, segments, steps)
        goes_on = tl.load(offsets_ptr + segment) < start
        stop = tl.where(goes_on, tl.minimum(tl.load(offsets_ptr + segment + 1), start + BLOCK), start)
    row = start + tl.arange(0, BLOCK)
    keep = row < stop
    if order_ptr is not None:
        row = tl.load(order_ptr + row, mask=keep, other=0)
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + row, mask=keep, other=0) != 0)
    weight = keep.to(tl.float64)
    if weight_ptr is not None:
        weight = widened(tl.load(weight_ptr + row, mask=keep, other=0.0))
    total = tl.sum(weight, 0)
    value = total
    square = 0.0
    if KIND != "count":
        # A masked row is not loaded, so what it holds can not matter.
        x = widened(tl.load(x_ptr + row, mask=keep, other=0.0))
        if KIND == "min" or KIND == "max":
            value = extreme(x, keep, KIND == "max")
        else:
            value = tl.sum(x * weight, 0)
        if KIND == "std" or KIND == "scope":
            away = tl.where(keep, x - value / positive_or_1(total), 0.0)
            square = tl.sum(weight * (away * away), 0)
    if SPLIT:
        tl.store(parts_ptr + piece, total)
        tl.store(parts_ptr + pieces.to(tl.int64) + piece, value)
        tl.store(parts_ptr + 2 * pieces.to(tl.int64) + piece, square)
    else:
        finish(out_ptr, piece, segments, total, value, square, ddof, KIND)


@triton.jit
def pieces_of(base, segment, segments, first, last, LANES: tl.constexpr):
    """(places, whether they are there) of pieces base .. base + LANES of a segment cut first + 1 .. last."""
    i = base + tl.arange(0, LANES)
    return tl.where(i == 0, segment, segments + first + i - 1), i <= last - first


def segment_merge_kernel(
    parts_ptr,  # [3, pieces] float64, as segment_piece_kernel leaves them
    offsets_ptr,  # [S+1] int64
    out_ptr,  # [S], "scope": [3, S]
    segments,
    pieces,
    ddof,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    segments = segments.to(tl.int64)
    pieces = pieces.to(tl.int64)
    first = tl.load(offsets_ptr + segment) // BLOCK
    last = tl.maximum((tl.load(offsets_ptr + segment + 1) - 1) // BLOCK, first)
    totals = tl.zeros([LANES], tl.float64)
    values = tl.zeros([LANES], tl.float64)
    if KIND == "max":
        values += float("-inf")
    if KIND == "min":
        values += float("inf")
    for base in range(0, last - first + 1, LANES):
        place, there = pieces_of(base, segment, segments, first, last, LANES)
        totals += tl.load(parts_ptr + place, mask=there, other=0.0)
        x = tl.load(parts_ptr + pieces + place, mask=there, other=0.0)
        if KIND == "min" or KIND == "max":
            better = x > values if KIND == "max" else x < values
            values = tl.where(there & (better | (x != x)), x, values)
        else:
            values += x
    total = tl.sum(totals, 0)
    if KIND == "min" or KIND == "max":
        value = extreme(values, totals == totals, KIND == "max")
    else:
        value = tl.sum(values, 0)
    square = 0.0
    if KIND == "std" or KIND == "scope":
        mean = value / positive_or_1(total)
        squares = tl.zeros([LANES], tl.float64)
        for base in range(0, last - first + 1, LANES):
            place, there = pieces_of(base, segment, segments, first, last, LANES)
            weight = tl.load(parts_ptr + place, mask=there, other=0.0)
            away = tl.load(parts_ptr + pieces + place, mask=there, other=0.0) / positive_or_1(weight) - mean
            squares += tl.load(parts_ptr + 2 * pieces + place, mask=there, other=0.0)
            squares += tl.where(weight > 0, weight * (away * away), 0.0)
        square = tl.sum(squares, 0)
    finish(out_ptr, segment, segments, total, value, square, ddof, KIND)


# One compilation per kind and what there is: neither where a tensor begins nor a length makes another.
SIZES = ["segments", "pieces", "steps"]
POINTERS = [f"{name}_ptr" for name in ("x", "order", "mask", "weight", "offsets", "parts", "out")]
segment_piece_kernel = triton.jit(
    segment_piece_kernel, do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS
)
segment_merge_kernel = triton.jit(
    segment_merge_kernel, do_not_specialize=SIZES[:2], do_not_specialize_on_alignment=POINTERS[4:]
)


def search_steps(segments: int) -> int:
    """Halvings that tell one of so many segments."""
    return max(1, segments).bit_length()


def segment_reduce(
    kind: str,
    x: Tensor,
    offsets: Tensor,
    order: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ddof: float = 1.0,
) -> Tensor:
    """One number per segment, [S]: kind "sum", "mean", "std", "min", "max" in float64 for float64 x, else in float32;
    "count" in int64; "scope": [3, S] float64, (weight, mean, standard deviation).

    x [N] of any float dtype, offsets [S+1] int64, mask bool and weight like x; order [N] int64: the rows of the flat
    axis as entries of x. Empty segments give sum, mean, std 0, min inf, max -inf. Arguments are taken as checked. Not
    differentiable by itself.
    """
    segments, rows = offsets.shape[0] - 1, x.shape[0]
    dtype = {"count": torch.int64, "scope": torch.float64}.get(kind, torch.float32)
    if x.dtype == torch.float64 and kind != "count":
        dtype = torch.float64
    out = torch.empty((3, segments) if kind == "scope" else segments, dtype=dtype, device=x.device)
    if segments == 0:
        return out
    block, warps = SHORT if rows <= FEW * segments else LONG
    pieces = segments + max(0, rows - 1) // block
    split, offsets = pieces > segments, offsets.contiguous()
    parts = torch.empty((3, pieces), dtype=torch.float64, device=x.device) if split else None
    given = (None if t is None else t.contiguous() for t in (x, order, mask, weight))
    segment_piece_kernel[(pieces,)](
        *given, offsets, parts, out, segments, pieces, search_steps(segments), float(ddof), KIND=kind, SPLIT=split,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    if split:
        segment_merge_kernel[(segments,)](
            parts, offsets, out, segments, pieces, float(ddof), KIND=kind, BLOCK=block, LANES=MERGED, num_warps=1
        )
    return out
