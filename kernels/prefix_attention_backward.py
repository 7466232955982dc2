"""Attention over packed prefix forests, backward. With p, z, s as in prefix_attention.py and delta_i = do_i . o_i:

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - delta_i) dz/ds,   dz/ds = 1 or 1 - tanh(s_ij / softcap)^2
    dq_i = scale * sum_j ds_ij k_j,   dk_j = scale * sum_i ds_ij q_i;   i: those that see j, of all its query heads

Three launches, no atomics, every sum in one order:
- delta: reads o, do and q once. It also leaves the log-sum-exp in base 2, NaN for lanes whose q or do is not finite.
- dq: as the forward pass, one program per tile of lanes, which walks the tiles of keys it sees.
- dk, dv: one program per (tile of keys, key head), which walks the tiles of lanes that see it: the rows of its subtree,
  all query heads of the key head. The keys of a long prefix are seen by nearly all lanes; their range is split over
  several programs with sums of their own in float32, which a fourth launch adds in order.
Probabilities are computed twice, once per side: 7 products of tiles for the 5 that the sums need, the price of owning
dq, dk and dv without atomics and without a float32 copy of dq.

A row contributes nothing to those that do not see it, whatever it holds: masked tiles take rows that are not finite
as 0 where a weight multiplies them, and give those that do see one NaN through the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcore.kernels.prefix_attention import (
    LOG2E,
    ROWS,
    Blocks,
    ampere,
    finite_rows,
    hip,
    load_rows,
    logits,
    numbers,
    precision,
    prefix_attention_finite,
    visible,
)


def query_blocks(D: int, dtype: torch.dtype) -> Blocks:
    """For dq: as `forward_blocks`, with a second tile of scores and do in shared memory, hence two stages there."""
    if dtype == torch.float32:
        return Blocks(32, 32, 8, 1) if D <= 64 else Blocks(16, 16, 8, 1)
    if hip():
        return Blocks(64, 32, 4, 1)
    if ampere():
        return Blocks(64, 32, 4, 2)
    return Blocks(128, 64, 8, 2) if D <= 128 else Blocks(64, 32, 8, 2)


def key_blocks(D: int, dtype: torch.dtype) -> Blocks:
    """For dk and dv. Their two sums for 128 keys of 128 columns are half of the registers of 8 warps; 32 lanes at a
    time keep both tiles of scores beside them without a stack on sm_90. 128 keys rather than 64, as q and do are read
    once per key tile. At 256 columns 16 bytes of stack are left, 704 with 32 lanes and one stage."""
    if dtype == torch.float32:
        return Blocks(32, 32, 8, 1) if D <= 64 else Blocks(16, 16, 8, 1)
    if hip():
        return Blocks(32, 64, 4, 1) if D <= 128 else Blocks(32, 32, 4, 1)
    return Blocks(32, 128, 8, 2) if D <= 128 else Blocks(16, 64, 8, 2)


@triton.jit(do_not_specialize=["pairs"])
def prefix_attention_delta_kernel(
    o_ptr,  # [M, heads, D]
    do_ptr,
    q_ptr,
    lse_ptr,  # [M, heads] float32, contiguous, as delta and lse2
    delta_ptr,
    lse2_ptr,
    o_row,
    o_head,
    do_row,
    do_head,
    q_row,
    q_head,
    pairs,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, head = pair // heads, pair % heads
    column = tl.arange(0, BLOCK_D)
    mask = (pair < pairs)[:, None] & (column < D)[None, :]
    o = tl.load(o_ptr + (row * o_row + head * o_head)[:, None] + column[None, :], mask=mask, other=0.0)
    do = tl.load(do_ptr + (row * do_row + head * do_head)[:, None] + column[None, :], mask=mask, other=0.0)
    q = tl.load(q_ptr + (row * q_row + head * q_head)[:, None] + column[None, :], mask=mask, other=0.0)
    tl.store(delta_ptr + pair, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=pair < pairs)
    lse = tl.load(lse_ptr + pair, mask=pair < pairs, other=0.0)
    lse = tl.where(finite_rows(q) & finite_rows(do), lse * LOG2E, float("nan"))
    tl.store(lse2_ptr + pair, lse, mask=pair < pairs)


@triton.jit
def query_step(
    dq, q, do, lse, delta, first, row, depth, column, k_ptr, v_ptr, finite_ptr, end_ptr, position_ptr, k_row, v_row,
    finite_row, M, factor, cap, window, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq + what keys first:first+KEYS give to it, short of the scale."""
    key = first + tl.arange(0, KEYS)
    there = (key >= 0) & (key < M)
    v = load_rows(v_ptr, key, v_row, column, there, D, BLOCK_D, MASKED)
    finite = there
    if MASKED:
        finite = tl.load(finite_ptr + key.to(tl.int64) * finite_row, mask=there, other=0) != 0
    k = load_rows(k_ptr, key, k_row, column, finite, D, BLOCK_D, MASKED)
    z, t = logits(tl.dot(q, tl.trans(k), input_precision=PRECISION), factor, cap, HAS_CAP)
    ds = tl.exp2(z - lse[:, None]) * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    if HAS_CAP:
        ds *= 1.0 - t * t
    if MASKED:
        end = tl.load(end_ptr + key, mask=there, other=0).to(tl.int32)
        key_depth = key
        if HAS_WINDOW:
            key_depth = tl.load(position_ptr + key, mask=there, other=0).to(tl.int32)
        seen = visible(row[:, None], key[None, :], end[None, :], depth[:, None], key_depth[None, :], window, HAS_WINDOW)
        ds = tl.where(seen, tl.where(finite[None, :], ds, float("nan")), 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M", "window"])
def prefix_attention_dq_kernel(
    q_ptr,  # [M, heads * GROUP, D], last dimension contiguous, as k, v and do
    k_ptr,  # [M, heads, D]
    v_ptr,  # [M, heads, D]
    do_ptr,  # [M, heads * GROUP, D]
    finite_ptr,  # [M, heads] bool, of k, contiguous
    lse_ptr,  # [M, heads * GROUP] float32, contiguous, as delta; in base 2, NaN where q or do is not finite
    delta_ptr,
    end_ptr,  # [M] int64, contiguous
    position_ptr,  # [M] int64, contiguous; not read without HAS_WINDOW
    items_ptr,  # Work.items of `query_work`
    segments_ptr,
    dq_ptr,  # [M, heads * GROUP, D], contiguous
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
    head = tl.program_id(1).to(tl.int64)
    item = items_ptr + 5 * tl.program_id(0).to(tl.int64)
    lane = (tl.load(item) * LANES + tl.arange(0, LANES)).to(tl.int32)
    row = lane // GROUP
    query_head = head * GROUP + lane % GROUP
    there = row < M
    column = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + (query_head * q_head)[:, None], row, q_row, column, there, D, BLOCK_D, True)
    do = load_rows(do_ptr + (query_head * do_head)[:, None], row, do_row, column, there, D, BLOCK_D, True)
    out = row.to(tl.int64) * (tl.num_programs(1) * GROUP) + query_head
    lse = tl.load(lse_ptr + out, mask=there, other=0.0)
    delta = tl.load(delta_ptr + out, mask=there, other=0.0)
    depth = row
    if HAS_WINDOW:
        depth = tl.load(position_ptr + row, mask=there, other=0).to(tl.int32)
    k_ptr += head * k_head
    v_ptr += head * v_head
    finite_ptr += head

    dq = tl.zeros([LANES, BLOCK_D], dtype=tl.float32)
    full_begin, full_end, masked_end = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    for segment in range(full_begin, full_end):
        first = tl.load(segments_ptr + 2 * segment).to(tl.int32)
        for step in range(tl.load(segments_ptr + 2 * segment + 1).to(tl.int32)):
            dq = query_step(
                dq, q, do, lse, delta, first + step * KEYS, row, depth, column, k_ptr, v_ptr, finite_ptr, end_ptr,
                position_ptr, k_row, v_row, tl.num_programs(1), M, factor, cap, window, D, BLOCK_D, KEYS, HAS_WINDOW,
                HAS_CAP, PRECISION, False,
            )  # fmt: skip
    for segment in range(full_end, masked_end):
        first = tl.load(segments_ptr + 2 * segment).to(tl.int32)
        for step in range(tl.load(segments_ptr + 2 * segment + 1).to(tl.int32)):
            dq = query_step(
                dq, q, do, lse, delta, first + step * KEYS, row, depth, column, k_ptr, v_ptr, finite_ptr, end_ptr,
                position_ptr, k_row, v_row, tl.num_programs(1), M, factor, cap, window, D, BLOCK_D, KEYS, HAS_WINDOW,
                HAS_CAP, PRECISION, True,
            )  # fmt: skip
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + out[:, None] * D + column[None, :], dq, mask=there[:, None] & (column < D)[None, :])


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
    q = load_rows(q_ptr + (query_head * q_head)[:, None], row, q_row, column, there, D, BLOCK_D, MASKED)
    do = load_rows(do_ptr + (query_head * do_head)[:, None], row, do_row, column, there, D, BLOCK_D, MASKED)
    z, t = logits(tl.dot(k, tl.trans(q), input_precision=PRECISION), factor, cap, HAS_CAP)
    p = tl.exp2(z - lse[None, :])
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    if HAS_CAP:
        ds *= 1.0 - t * t
    if MASKED:
        depth = row
        if HAS_WINDOW:
            depth = tl.load(position_ptr + row, mask=row < M, other=0).to(tl.int32)
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
    slot = tl.load(item + 1)
    key = (tl.load(item) * KEYS + tl.arange(0, KEYS)).to(tl.int32)
    key_there = key < M
    column = tl.arange(0, BLOCK_D)
    k = load_rows(k_ptr + head * k_head, key, k_row, column, key_there, D, BLOCK_D, True)
    v = load_rows(v_ptr + head * v_head, key, v_row, column, key_there, D, BLOCK_D, True)
    end = tl.load(end_ptr + key, mask=key_there, other=0).to(tl.int32)
    key_depth = key
    if HAS_WINDOW:
        key_depth = tl.load(position_ptr + key, mask=key_there, other=0).to(tl.int32)

    dk = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
    full_begin, full_end, masked_end = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    for segment in range(full_begin, full_end):
        first = tl.load(segments_ptr + 2 * segment).to(tl.int32)
        for step in range(tl.load(segments_ptr + 2 * segment + 1).to(tl.int32)):
            dk, dv = key_step(
                dk, dv, k, v, first + step * LANES, key, end, key_depth, column, head, heads * GROUP, q_ptr, do_ptr,
                lse_ptr, delta_ptr, position_ptr, q_row, q_head, do_row, do_head, M, factor, cap, window, GROUP, D,
                BLOCK_D, LANES, HAS_WINDOW, HAS_CAP, PRECISION, False,
            )  # fmt: skip
    for segment in range(full_end, masked_end):
        first = tl.load(segments_ptr + 2 * segment).to(tl.int32)
        for step in range(tl.load(segments_ptr + 2 * segment + 1).to(tl.int32)):
            dk, dv = key_step(
                dk, dv, k, v, first + step * LANES, key, end, key_depth, column, head, heads * GROUP, q_ptr, do_ptr,
                lse_ptr, delta_ptr, position_ptr, q_row, q_head, do_row, do_head, M, factor, cap, window, GROUP, D,
                BLOCK_D, LANES, HAS_WINDOW, HAS_CAP, PRECISION, True,
            )  # fmt: skip
    dk *= scale
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


def prefix_attention_delta(do: Tensor, q: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """[M, H] float32: do . o, and the log-sum-exp in base 2, NaN where q or do is not finite.

    The last dimension of do, q and o is contiguous, lse altogether.
    """
    M, H, D = o.shape
    delta, lse2 = (torch.empty((M, H), dtype=torch.float32, device=o.device) for _ in range(2))
    prefix_attention_delta_kernel[(triton.cdiv(M * H, ROWS),)](
        o, do, q, lse, delta, lse2, *o.stride()[:2], *do.stride()[:2], *q.stride()[:2], M * H, H, D=D,
        BLOCK_D=max(16, triton.next_power_of_2(D)), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return delta, lse2


def prefix_attention_dq(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, end: Tensor, position: Tensor,
    items: Tensor, segments: Tensor, scale: float, window: int | None, softcap: float | None, blocks: Blocks,
) -> Tensor:  # fmt: skip
    """dq [M, Hq, D]; delta and lse of `prefix_attention_delta`, items and segments of `query_work` for these blocks."""
    M, Hq, D = q.shape
    heads = k.shape[1]
    dq = torch.empty((M, Hq, D), dtype=q.dtype, device=q.device)
    prefix_attention_dq_kernel[(items.shape[0], heads)](
        q, k, v, do, prefix_attention_finite(k), lse, delta, end, position, items, segments, dq, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], *do.stride()[:2], M, scale, *numbers(scale, softcap), window or 0,
        GROUP=Hq // heads, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), LANES=blocks.lanes, KEYS=blocks.keys,
        HAS_WINDOW=window is not None, HAS_CAP=softcap is not None, PRECISION=precision(q.dtype),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return dq


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
                part, splits, out, M, D=D, BLOCK_D=BLOCK_D, KEYS=blocks.keys, ROWS=ROWS, num_warps=4
            )
    return dk, dv
