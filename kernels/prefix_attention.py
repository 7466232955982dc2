"""Attention over packed prefix forests, forward: query row i sees key row j iff j <= i < end[j].

    o_i = sum_j p_ij v_j,   p_ij = exp(z_ij - lse_i),   lse_i = log(exp(sink) + sum_j exp(z_ij))
    z_ij = s_ij, or softcap * tanh(s_ij / softcap);   s_ij = scale * (q_i . k_j);   window: depth[i] - depth[j] < window

A program has one tile of lanes (a lane is one query head of one row; the query heads of a key head lie side by side,
so the tile's rows are few and each key tile serves all of them) and walks the tiles of keys it sees, with an online
softmax in base 2 and float32. Which tiles these are is known from the tree
(rlcore/algorithms/prefix_attention_tiles.py): siblings are never visited, and the mask is computed, from `end`, only in
tiles that are not seen as a whole.

Memory traffic: q once, o once, and per program the rows of its path in k and v: for lanes of `group` heads that is
M / (lanes / group) passes over paths, served by the L2 cache, where programs of one key head run side by side.
Launch: x = tiles of lanes, the longest first; y = key heads. No atomics; a row's result depends on its path and on
where in its tile it lies.

A row contributes nothing to queries that do not see it, whatever it holds. The zero weight of a hidden key would give
NaN times a v that is not finite, so a pass over v marks such rows first; masked tiles take them as 0 and give the
queries that do see one NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# (row, head) pairs per program of the row passes: 16 rows of 128 columns are 16 values a thread at 4 warps.
ROWS = 16


class Blocks(NamedTuple):
    """Lanes and keys of a tile, warps per program, stages of the software pipeline."""

    lanes: int
    keys: int
    warps: int
    stages: int


# By kind of chip and head size, up to 64, 128 and 256: chosen by what the compiler reports (bench/static), so that
# nothing is on the stack on sm_90 and little elsewhere; times are not measured.
FORWARD = {
    # 8 warps hold 128 lanes of 128 columns in half of their registers, which leaves room for 64 scores a lane; three
    # stages are 132 KiB. At 256 columns half the keys: 64 would go to the stack.
    "sm_90": (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2)),
    # Sums come from tensor memory to registers as a whole, beside the scores: 64 keys were 32 to 160 bytes of stack,
    # 128 lanes of 256 columns 344. 16 warps do not use tensor memory at all.
    "sm_100": (Blocks(128, 32, 8, 3), Blocks(128, 32, 8, 3), Blocks(64, 32, 8, 2)),
    # q is in registers too: at 256 columns 64 lanes, as 128 were 400 bytes of stack.
    "sm_80": (Blocks(128, 32, 8, 3), Blocks(128, 32, 8, 3), Blocks(64, 32, 8, 2)),
    # 64 KiB of shared memory and waves of 64 threads: 4 of them, one stage.
    "amd": (Blocks(128, 64, 4, 1), Blocks(128, 64, 4, 1), Blocks(64, 32, 4, 1)),
    # No tensor cores: a product keeps whole rows of both sides in registers, hence small tiles.
    "float32": (Blocks(32, 32, 4, 1), Blocks(16, 32, 8, 1), Blocks(16, 16, 8, 1)),
    # 512 registers a thread at 4 waves, 256 at 8.
    "amd float32": (Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 16, 8, 1)),
}


def forward_blocks(D: int, dtype: torch.dtype) -> Blocks:
    return blocks_of(FORWARD, D, dtype)


def blocks_of(table: dict[str, tuple[Blocks, Blocks, Blocks]], D: int, dtype: torch.dtype) -> Blocks:
    return table[kind(dtype)][0 if D <= 64 else 1 if D <= 128 else 2]


def kind(dtype: torch.dtype) -> str:
    """The chip's, as far as tiles go: sm_120 has the products and the shared memory of sm_80, or nearly."""
    if triton.knobs.runtime.interpret:
        return "float32" if dtype == torch.float32 else "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "amd float32" if dtype == torch.float32 else "amd"
    if dtype == torch.float32:
        return "float32"
    return "sm_90" if target.arch == 90 else "sm_100" if 100 <= target.arch < 120 else "sm_80"


@triton.jit
def tanh_of(x):
    """An odd polynomial near 0, where 1 - 2 / (e^2x + 1) loses its digits."""
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    s = a * a
    p = s * -5.70498872745e-3 + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    magnitude = tl.where(a < 0.625, p * s * a + a, far)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def logits(s, factor, cap, HAS_CAP: tl.constexpr):
    """(z in base 2, tanh of the softcap): factor is scale * log2 e, or scale / softcap beside cap, softcap * log2 e."""
    z = s * factor
    t = z
    if HAS_CAP:
        t = tanh_of(z)
        z = t * cap
    return z, t


@triton.jit
def visible(row, key, end, depth, key_depth, window, HAS_WINDOW: tl.constexpr):
    """Shapes broadcast. end is 0 for keys outside the sequence, which nobody sees."""
    seen = (key <= row) & (row < end)
    if HAS_WINDOW:
        seen = seen & (depth - key_depth < window)
    return seen


@triton.jit
def depth_of(row, there, position_ptr, HAS_WINDOW: tl.constexpr):
    """Without a window nobody asks for it: the row itself."""
    depth = row
    if HAS_WINDOW:
        depth = tl.load(position_ptr + row, mask=there, other=0).to(tl.int32)
    return depth


@triton.jit
def sees(row, depth, key, there, end_ptr, position_ptr, window, HAS_WINDOW: tl.constexpr):
    """[rows, keys]; keys that are not `there` are seen by nobody."""
    end = tl.load(end_ptr + key, mask=there, other=0).to(tl.int32)
    key_depth = depth_of(key, there, position_ptr, HAS_WINDOW)
    return visible(row[:, None], key[None, :], end[None, :], depth[:, None], key_depth[None, :], window, HAS_WINDOW)


@triton.jit
def lanes_of(item, position_ptr, M, GROUP: tl.constexpr, LANES: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """(row, head, whether the row is there, depth) of each lane of an item of `query_work`."""
    lane = (tl.load(item) * LANES + tl.arange(0, LANES)).to(tl.int32)
    row = lane // GROUP
    head = tl.program_id(1).to(tl.int64) * GROUP + lane % GROUP
    there = row < M
    return row, head, there, depth_of(row, there, position_ptr, HAS_WINDOW)


@triton.jit
def segments_of(item):
    """(begin, end of the full ones and begin of the masked ones, end) of an item of a `Work`. They are kept through
    the loops: 32 bits, or registers go to the stack."""
    return tl.load(item + 2).to(tl.int32), tl.load(item + 3).to(tl.int32), tl.load(item + 4).to(tl.int32)


@triton.jit
def place_of(row, head, GROUP: tl.constexpr):
    """[rows, heads] in the order of contiguous tensors; 64 bits, as heads * M * D may pass 2^31."""
    return row.to(tl.int64) * (tl.num_programs(1) * GROUP) + head


@triton.jit
def load_rows(ptr, row, stride, column, there, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D]; rows that are not `there` are 0 if MASKED, columns from D on always."""
    at = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(at, mask=there[:, None] & (column < D)[None, :], other=0.0)
    elif BLOCK_D != D:
        return tl.load(at, mask=(column < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_lanes(
    ptr, row, head, row_stride, head_stride, column, there, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """As load_rows, of a head for each row."""
    return load_rows(ptr + (head * head_stride)[:, None], row, row_stride, column, there, D, BLOCK_D, MASKED)


@triton.jit
def finite_rows(x):
    return tl.min((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32), 1) != 0


@triton.jit(do_not_specialize=["pairs"])
def prefix_attention_finite_kernel(
    x_ptr,  # [M, heads, D], last dimension contiguous
    finite_ptr,  # [M, heads] bool, contiguous
    x_row,
    x_head,
    pairs,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = (pair // heads * x_row + pair % heads * x_head)[:, None] + column[None, :]
    x = tl.load(x_ptr + at, mask=(pair < pairs)[:, None] & (column < D)[None, :], other=0.0)
    tl.store(finite_ptr + pair, finite_rows(x), mask=pair < pairs)


@triton.jit
def forward_step(
    acc, top, total, q, first, row, depth, column, k_ptr, v_ptr, finite_ptr, end_ptr, position_ptr, k_row, v_row,
    finite_row, M, factor, cap, window, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys first:first+KEYS enter the running (sum of values, maximum, sum of weights)."""
    key = first + tl.arange(0, KEYS)
    there = (key >= 0) & (key < M)
    k = load_rows(k_ptr, key, k_row, column, there, D, BLOCK_D, MASKED)
    z, _ = logits(tl.dot(q, tl.trans(k), input_precision=PRECISION), factor, cap, HAS_CAP)
    if MASKED:
        seen = sees(row, depth, key, there, end_ptr, position_ptr, window, HAS_WINDOW)
        z = tl.where(seen, z, float("-inf"))
    new_top = tl.maximum(top, tl.max(z, 1))
    # A lane that has seen nothing yet keeps the maximum -inf; its weights are 0 and not exp(-inf + inf).
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(z - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if MASKED:
        there = tl.load(finite_ptr + key.to(tl.int64) * finite_row, mask=there, other=0) != 0
        p = tl.where(seen & (there == 0)[None, :], float("nan"), p)
    v = load_rows(v_ptr, key, v_row, column, there, D, BLOCK_D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["M", "window"])
def prefix_attention_forward_kernel(
    q_ptr,  # [M, heads * GROUP, D], last dimension contiguous, as k and v
    k_ptr,  # [M, heads, D]
    v_ptr,  # [M, heads, D]
    finite_ptr,  # [M, heads] bool, of v, contiguous
    sink_ptr,  # [heads * GROUP] float32, contiguous; not read without HAS_SINK
    end_ptr,  # [M] int64, contiguous
    position_ptr,  # [M] int64, contiguous; not read without HAS_WINDOW
    items_ptr,  # Work.items
    segments_ptr,  # Work.segments
    o_ptr,  # [M, heads * GROUP, D], contiguous
    lse_ptr,  # [M, heads * GROUP] float32, contiguous
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    M,
    factor,
    cap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    item = items_ptr + 5 * tl.program_id(0).to(tl.int64)
    row, query_head, there, depth = lanes_of(item, position_ptr, M, GROUP, LANES, HAS_WINDOW)
    column = tl.arange(0, BLOCK_D)
    q = load_lanes(q_ptr, row, query_head, q_row, q_head, column, there, D, BLOCK_D, True)
    k_ptr += head * k_head
    v_ptr += head * v_head
    finite_ptr += head

    acc = tl.zeros([LANES, BLOCK_D], dtype=tl.float32)
    if HAS_SINK:
        top = tl.load(sink_ptr + query_head) * LOG2E
        total = tl.full([LANES], 1.0, dtype=tl.float32)
    else:
        top = tl.full([LANES], float("-inf"), dtype=tl.float32)
        total = tl.zeros([LANES], dtype=tl.float32)
    bounds = segments_of(item)
    for MASKED in tl.static_range(2):
        for segment in range(bounds[MASKED], bounds[MASKED + 1]):
            first = tl.load(segments_ptr + 2 * segment).to(tl.int32)
            for step in range(tl.load(segments_ptr + 2 * segment + 1).to(tl.int32)):
                acc, top, total = forward_step(
                    acc, top, total, q, first + step * KEYS, row, depth, column, k_ptr, v_ptr, finite_ptr, end_ptr,
                    position_ptr, k_row, v_row, tl.num_programs(1), M, factor, cap, window, D, BLOCK_D, KEYS,
                    HAS_WINDOW, HAS_CAP, PRECISION, MASKED == 1,
                )  # fmt: skip

    out = place_of(row, query_head, GROUP)
    tl.store(lse_ptr + out, (top + tl.log2(total)) * LN2, mask=there)
    o = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + out[:, None] * D + column[None, :], o, mask=there[:, None] & (column < D)[None, :])


def precision(dtype: torch.dtype) -> str:
    """float32 products are exact to float32 unless torch has been asked for less."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def numbers(scale: float, softcap: float | None) -> tuple[float, float]:
    """(factor, cap) of `logits`."""
    log2e = LOG2E.value
    return (scale * log2e, 0.0) if softcap is None else (scale / softcap, softcap * log2e)


def prefix_attention_finite(x: Tensor) -> Tensor:
    """[M, H] bool: whether all of x [M, H, D] in the last dimension, which is contiguous, is finite."""
    M, H, D = x.shape
    finite = torch.empty((M, H), dtype=torch.bool, device=x.device)
    prefix_attention_finite_kernel[(triton.cdiv(M * H, ROWS),)](
        x, finite, *x.stride()[:2], M * H, H, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), ROWS=ROWS, num_warps=4
    )
    return finite


def prefix_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, end: Tensor, position: Tensor, items: Tensor, segments: Tensor,
    sink: Tensor | None, scale: float, window: int | None, softcap: float | None, blocks: Blocks,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [M, Hq, D], lse [M, Hq] float32) from q [M, Hq, D], k and v [M, Hkv, D], the last dimension contiguous.

    items and segments are those of `query_work` for blocks.lanes and blocks.keys, on the device. Arguments are taken
    as checked. Not differentiable by itself.
    """
    M, Hq, D = q.shape
    heads = k.shape[1]
    o = torch.empty((M, Hq, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((M, Hq), dtype=torch.float32, device=q.device)
    prefix_attention_forward_kernel[(items.shape[0], heads)](
        q, k, v, prefix_attention_finite(v), None if sink is None else sink.float().contiguous(), end, position,
        items, segments, o, lse, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], M, *numbers(scale, softcap),
        window or 0,
        GROUP=Hq // heads, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), LANES=blocks.lanes, KEYS=blocks.keys,
        HAS_SINK=sink is not None, HAS_WINDOW=window is not None, HAS_CAP=softcap is not None,
        PRECISION=precision(q.dtype), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return o, lse
