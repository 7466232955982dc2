"""Attention over packed prefix forests, backward for keys and values; the formulas are in prefix_attention_backward.py.

One program per (tile of keys, key head) walks the tiles of lanes that see it: the rows of its subtree, all query heads
of the key head. The keys of a long prefix are seen by nearly all lanes: their range is split over several programs with
sums of their own in float32, which a second launch adds in order. No atomics, every sum in one order.

Memory traffic: k and v once, dk and dv once, and per program the rows of its subtree in q, do, lse and delta, which the
L2 cache serves where programs of one subtree run side by side; a split tile's sums once in and out in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcore.kernels.prefix_attention import (
    ROWS,
    Blocks,
    blocks_of,
    depth_of,
    load_lanes,
    load_rows,
    logits,
    numbers,
    precision,
    segments_of,
    visible,
)

# For dk and dv, as FORWARD.
KEY = {
    # The two sums for 128 keys of 128 columns are half of the registers of 8 warps; 32 lanes at a time keep both tiles
    # of scores beside them. 128 keys rather than 64, as q and do are read once per key tile.
    "sm_90": (Blocks(32, 128, 8, 2), Blocks(32, 128, 8, 2), Blocks(16, 64, 8, 2)),
    # The sums come from tensor memory as a whole: 64 keys from 128 columns on, and one stage for 256.
    "sm_100": (Blocks(32, 128, 8, 2), Blocks(32, 64, 8, 2), Blocks(16, 64, 8, 1)),
    # k and v are in registers too: 128 keys of 128 columns were 64 bytes of stack.
    "sm_80": (Blocks(32, 128, 8, 2), Blocks(32, 64, 8, 2), Blocks(16, 64, 8, 2)),
    "amd": (Blocks(32, 64, 4, 1), Blocks(32, 64, 4, 1), Blocks(32, 32, 4, 1)),
    # At 64 columns 16 lanes were up to 32 bytes of stack; with 32 there is none.
    "float32": (Blocks(32, 32, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
    "amd float32": (Blocks(32, 32, 4, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 4, 1)),
}
# Warps of the sum's rows: sixteen of 256 columns did not fit in the registers of 4.
SUM_WARPS = 8


def key_blocks(D: int, dtype: torch.dtype) -> Blocks:
    return blocks_of(KEY, D, dtype)


@triton.jit
def key_step(
    dk, dv, k, v, first, key, end, key_depth, column, head, heads, q_ptr, do_ptr, lse_ptr, delta_ptr, position_ptr,
    q_row, q_head, do_row, do_head, M, factor, cap, window, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, LANES: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(dk, dv) + what lanes first:first+LANES give to them, dk short of the scale. Scores are [KEYS, LANES], so that
    the weights of both sums come from registers."""
    lane = first + tl.arange(0, LANES)
    row = lane // GROUP
    query_head = head * GROUP + lane % GROUP
    there = row < M
    out = row.to(tl.int64) * heads + query_head
    if MASKED:
        lse = tl.load(lse_ptr + out, mask=there, other=0.0)
        delta = tl.load(delta_ptr + out, mask=there, other=0.0)
        there &= lse == lse
    else:
        lse = tl.load(lse_ptr + out)
        delta = tl.load(delta_ptr + out)
    q = load_lanes(q_ptr, row, query_head, q_row, q_head, column, there, D, BLOCK_D, MASKED)
    do = load_lanes(do_ptr, row, query_head, do_row, do_head, column, there, D, BLOCK_D, MASKED)
    z, t = logits(tl.dot(k, tl.trans(q), input_precision=PRECISION), factor, cap, HAS_CAP)
    p = tl.exp2(z - lse[None, :])
    slope = p * (1.0 - t * t) if HAS_CAP else p
    ds = slope * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    if MASKED:
        depth = depth_of(row, row < M, position_ptr, HAS_WINDOW)
        seen = visible(row[None, :], key[:, None], end[:, None], depth[None, :], key_depth[:, None], window, HAS_WINDOW)
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["slots", "M", "window"])
def prefix_attention_dkdv_kernel(
    q_ptr,  # as in prefix_attention_dq_kernel
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    end_ptr,
    position_ptr,
    items_ptr,  # Work.items of `key_work`
    segments_ptr,
    dk_ptr,  # [M, heads, D], contiguous
    dv_ptr,
    parts_ptr,  # [2, slots, heads, KEYS, D] float32: dk and dv of the items that have a slot
    slots,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    do_row,
    do_head,
    M,
    scale,
    factor,
    cap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    item = items_ptr + 5 * tl.program_id(0).to(tl.int64)
    key = (tl.load(item) * KEYS + tl.arange(0, KEYS)).to(tl.int32)
    key_there = key < M
    column = tl.arange(0, BLOCK_D)
    k = load_rows(k_ptr + head * k_head, key, k_row, column, key_there, D, BLOCK_D, True)
    v = load_rows(v_ptr + head * v_head, key, v_row, column, key_there, D, BLOCK_D, True)
    end = tl.load(end_ptr + key, mask=key_there, other=0).to(tl.int32)
    key_depth = depth_of(key, key_there, position_ptr, HAS_WINDOW)

    dk = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
    bounds = segments_of(item)
    for MASKED in tl.static_range(2):
        for segment in range(bounds[MASKED], bounds[MASKED + 1]):
            first = tl.load(segments_ptr + 2 * segment).to(tl.int32)
            for step in tl.range(tl.load(segments_ptr + 2 * segment + 1).to(tl.int32), disable_licm=MASKED == 1):
                dk, dv = key_step(
                    dk, dv, k, v, first + step * LANES, key, end, key_depth, column, head, heads * GROUP, q_ptr, do_ptr,
                    lse_ptr, delta_ptr, position_ptr, q_row, q_head, do_row, do_head, M, factor, cap, window, GROUP, D,
                    BLOCK_D, LANES, HAS_WINDOW, HAS_CAP, PRECISION, MASKED == 1,
                )  # fmt: skip
    dk *= scale
    # Read again, not kept: what the loops carry is all that the registers hold.
    key = (tl.load(item, volatile=True) * KEYS + tl.arange(0, KEYS)).to(tl.int32)
    key_there = key < M
    slot = tl.load(item + 1)
    inside = (column < D)[None, :]
    if slot < 0:
        at = (key.to(tl.int64) * heads + head)[:, None] * D + column[None, :]
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=key_there[:, None] & inside)
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=key_there[:, None] & inside)
    else:
        at = (((slot * heads + head) * KEYS + tl.arange(0, KEYS)) * D)[:, None] + column[None, :]
        tl.store(parts_ptr + at, dk, mask=inside)
        tl.store(parts_ptr + slots.to(tl.int64) * heads * (KEYS * D) + at, dv, mask=inside)


@triton.jit(do_not_specialize=["M"])
def prefix_attention_sum_kernel(
    parts_ptr,  # [slots, heads, KEYS, D] float32
    splits_ptr,  # Work.splits
    out_ptr,  # [M, heads, D], contiguous
    M,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (split, head, r): rows r * ROWS and on of a split tile are the sum of its slots, first to last."""
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    split = splits_ptr + 3 * tl.program_id(0).to(tl.int64)
    place = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (column < D)[None, :]
    slot = tl.load(split + 1)
    total = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for part in range(tl.load(split + 2)):
        at = (((slot + part) * heads + head) * KEYS + place) * D
        total += tl.load(parts_ptr + at[:, None] + column[None, :], mask=inside, other=0.0)
    key = tl.load(split) * KEYS + place
    at = ((key * heads + head) * D)[:, None] + column[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=(key < M)[:, None] & inside)


def prefix_attention_dkdv(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, end: Tensor, position: Tensor,
    items: Tensor, segments: Tensor, splits: Tensor, slots: int, scale: float, window: int | None,
    softcap: float | None, blocks: Blocks,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dk, dv) [M, Hkv, D]; items, segments, splits and slots of `key_work` for these blocks."""
    M, Hq, D = q.shape
    heads = k.shape[1]
    BLOCK_D = max(16, triton.next_power_of_2(D))
    dk, dv = (torch.empty((M, heads, D), dtype=q.dtype, device=q.device) for _ in range(2))
    parts = torch.empty((2, slots, heads, blocks.keys, D), dtype=torch.float32, device=q.device)
    prefix_attention_dkdv_kernel[(items.shape[0], heads)](
        q, k, v, do, lse, delta, end, position, items, segments, dk, dv, parts, slots, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], *do.stride()[:2], M, scale, *numbers(scale, softcap), window or 0,
        GROUP=Hq // heads, D=D, BLOCK_D=BLOCK_D, LANES=blocks.lanes, KEYS=blocks.keys, HAS_WINDOW=window is not None,
        HAS_CAP=softcap is not None, PRECISION=precision(q.dtype), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if slots:
        for part, out in zip(parts, (dk, dv)):
            prefix_attention_sum_kernel[(splits.shape[0], heads, blocks.keys // ROWS)](
                part, splits, out, M, D=D, BLOCK_D=BLOCK_D, KEYS=blocks.keys, ROWS=ROWS, num_warps=SUM_WARPS
            )
    return dk, dv
