"""Attention over packed prefix forests, backward. With p, z, s as in prefix_attention.py and delta_i = do_i . o_i:

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - delta_i) dz/ds,   dz/ds = 1 or 1 - tanh(s_ij / softcap)^2
    dq_i = scale * sum_j ds_ij k_j,   dk_j = scale * sum_i ds_ij q_i;   i: those that see j, of all its query heads

Three launches, no atomics, every sum in one order:
- delta: reads o, do and q once. It also leaves the log-sum-exp in base 2, NaN for lanes whose q or do is not finite.
- dq: as the forward pass, one program per tile of lanes, which walks the tiles of keys it sees.
- dk, dv (prefix_attention_keys.py): one program per tile of keys and key head, which walks the lanes that see it.
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
    blocks_of,
    finite_rows,
    lanes_of,
    load_lanes,
    load_rows,
    logits,
    numbers,
    place_of,
    precision,
    prefix_attention_finite,
    sees,
    segments_of,
)

# For dq, as FORWARD, with a second tile of scores and do in shared memory: two stages.
QUERY = {
    "sm_90": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
    # 64 keys were 112 and 280 bytes of stack; two stages at 256 columns 216.
    "sm_100": (Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 1)),
    # At 256 columns q and do of 64 lanes are in registers beside their sums: 56 bytes of stack.
    "sm_80": (Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 8, 2)),
    "amd": (Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1)),
    "float32": (Blocks(32, 32, 8, 1), Blocks(16, 32, 8, 1), Blocks(16, 16, 8, 1)),
    "amd float32": (Blocks(32, 32, 4, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 4, 1)),
}


def query_blocks(D: int, dtype: torch.dtype) -> Blocks:
    return blocks_of(QUERY, D, dtype)


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
        seen = sees(row, depth, key, there, end_ptr, position_ptr, window, HAS_WINDOW)
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
    row, query_head, there, depth = lanes_of(item, position_ptr, M, GROUP, LANES, HAS_WINDOW)
    column = tl.arange(0, BLOCK_D)
    q = load_lanes(q_ptr, row, query_head, q_row, q_head, column, there, D, BLOCK_D, True)
    do = load_lanes(do_ptr, row, query_head, do_row, do_head, column, there, D, BLOCK_D, True)
    out = place_of(row, query_head, GROUP)
    lse = tl.load(lse_ptr + out, mask=there, other=0.0)
    delta = tl.load(delta_ptr + out, mask=there, other=0.0)
    k_ptr += head * k_head
    v_ptr += head * v_head
    finite_ptr += head

    dq = tl.zeros([LANES, BLOCK_D], dtype=tl.float32)
    bounds = segments_of(item)
    for MASKED in tl.static_range(2):
        for segment in range(bounds[MASKED], bounds[MASKED + 1]):
            first = tl.load(segments_ptr + 2 * segment).to(tl.int32)
            for step in range(tl.load(segments_ptr + 2 * segment + 1).to(tl.int32)):
                dq = query_step(
                    dq, q, do, lse, delta, first + step * KEYS, row, depth, column, k_ptr, v_ptr, finite_ptr, end_ptr,
                    position_ptr, k_row, v_row, tl.num_programs(1), M, factor, cap, window, D, BLOCK_D, KEYS,
                    HAS_WINDOW, HAS_CAP, PRECISION, MASKED == 1,
                )  # fmt: skip
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + out[:, None] * D + column[None, :], dq, mask=there[:, None] & (column < D)[None, :])


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
