"""The bare recurrence over a flat axis, for torch.compile and for gradients: chunk-carry in two launches.

    y[i] = b[i] + a[i] * y[i+1],  cut behind rows that are `last`, where y = b whatever follows

A block of rows is one row of the same kind, (cut, a, b), found by an associative scan over its rows. The first launch
leaves that of each block; in the second, each program puts together the blocks that follow its own, up to the first
with a cut, 256 at a time, and then scans its rows with what comes out. Programs own blocks of the flat axis, not
sequences, so few long sequences fill a GPU as many short ones do. The order of additions follows from N alone: no
atomics, and one program waits for no other.

Memory traffic: each input twice (the second time from the L2 cache, where it fits), y once, 20 bytes per block. The
reference's dtype, float64 on a GPU, is kept: what is rounded here is rounded nowhere else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows per block, warps: 4 rows of three numbers a thread; 2048 blocks of 10^6 rows are several per processor. Not
# measured.
BLOCK = 512
NUM_WARPS = 4
# Blocks put together at a time by those warps: 131 thousand rows.
FOLDED = 256


@triton.jit
def compose(later_cut, later_a, later_b, cut, a, b):
    """Two neighbours as one. Behind a cut nothing is multiplied: 0 times infinity would be NaN."""
    cut_here = cut != 0
    return cut | later_cut, tl.where(cut_here, 0.0, later_a * a), tl.where(cut_here, b, b + a * later_b)


@triton.jit
def first(x, lane):
    return tl.sum(tl.where(lane == 0, x, 0), 0)


@triton.jit
def block_of(delta_ptr, decay_ptr, last_ptr, row, n):
    """(cut, a, b) of each row; behind the end nothing changes."""
    inside = row < n
    cut = tl.load(last_ptr + row, mask=inside, other=0).to(tl.int32)
    a = tl.load(decay_ptr + row, mask=inside, other=1.0)
    b = tl.load(delta_ptr + row, mask=inside, other=0.0)
    return cut, a, b


def linear_fold_kernel(delta_ptr, decay_ptr, last_ptr, cut_ptr, a_ptr, b_ptr, n, BLOCK: tl.constexpr):
    """[blocks] (cut, a, b): program c leaves those of rows c * BLOCK and on."""
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    cut, a, b = block_of(delta_ptr, decay_ptr, last_ptr, block * BLOCK + lane, n)
    cut, a, b = tl.associative_scan((cut, a, b), 0, compose, reverse=True)
    tl.store(cut_ptr + block, first(cut, lane))
    tl.store(a_ptr + block, first(a, lane))
    tl.store(b_ptr + block, first(b, lane))


def linear_scan_kernel(
    delta_ptr,  # [n], as decay and y of one float dtype, contiguous
    decay_ptr,
    last_ptr,  # [n] bool
    cut_ptr,  # [blocks] int32, of linear_fold_kernel, as a and b
    a_ptr,
    b_ptr,
    y_ptr,
    n,
    BLOCK: tl.constexpr,
    FOLDED: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0).to(tl.int64)
    # y behind this block is after_b + after_a * (y behind the blocks that were put together).
    lane = tl.arange(0, FOLDED)
    after_a = tl.full([], 1.0, a_ptr.dtype.element_ty)
    after_b = tl.full([], 0.0, a_ptr.dtype.element_ty)
    base = block + 1
    while base < blocks:
        there = base + lane < blocks
        cut = tl.load(cut_ptr + base + lane, mask=there, other=0)
        a = tl.load(a_ptr + base + lane, mask=there, other=1.0)
        b = tl.load(b_ptr + base + lane, mask=there, other=0.0)
        cut, a, b = tl.associative_scan((cut, a, b), 0, compose, reverse=True)
        after_b += after_a * first(b, lane)
        after_a *= first(a, lane)
        base = tl.where(first(cut, lane) != 0, blocks, base + FOLDED)
    row = block * BLOCK + tl.arange(0, BLOCK)
    cut, a, b = block_of(delta_ptr, decay_ptr, last_ptr, row, n)
    cut, a, b = tl.associative_scan((cut, a, b), 0, compose, reverse=True)
    tl.store(y_ptr + row, tl.where(cut != 0, b, b + a * after_b), mask=row < n)


POINTERS = [f"{name}_ptr" for name in ("delta", "decay", "last", "cut", "a", "b", "y")]
linear_fold_kernel = triton.jit(
    linear_fold_kernel, do_not_specialize=["n"], do_not_specialize_on_alignment=POINTERS[:-1]
)
linear_scan_kernel = triton.jit(linear_scan_kernel, do_not_specialize=["n"], do_not_specialize_on_alignment=POINTERS)


def linear_scan(delta: Tensor, decay: Tensor, last: Tensor) -> Tensor:
    """y [N] of delta and decay [N], of one float dtype, and last [N] bool. Not differentiable by itself."""
    n, y = delta.shape[0], torch.empty_like(delta, memory_format=torch.contiguous_format)
    if n == 0:
        return y
    given = delta.contiguous(), decay.contiguous(), last.contiguous()
    blocks = triton.cdiv(n, BLOCK)
    cut = torch.empty(blocks, dtype=torch.int32, device=delta.device)
    a, b = torch.empty((2, blocks), dtype=delta.dtype, device=delta.device)
    linear_fold_kernel[(blocks,)](*given, cut, a, b, n, BLOCK=BLOCK, num_warps=NUM_WARPS)
    linear_scan_kernel[(blocks,)](
        *given, cut, a, b, y, n, BLOCK=BLOCK, FOLDED=FOLDED, num_warps=NUM_WARPS
    )
    return y
