"""Ragged sums and counts over the segments of a flat axis.

    sums[s] = sum of x[i],  counts[s] = number of i,   over offsets[s] <= i < offsets[s+1] with mask[i]

Memory traffic: x once, the mask once, 16 bytes per segment: the kernel is bound by reading x. Every program adds the
rows of its share lane by lane and its lanes in one tree, without atomics, so a result depends on nothing but x, the
offsets and the launch sizes, which follow from N and S alone. Sums are taken in fp32, for fp64 input in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows per step of a program. A segment begins anywhere, so a thread loads single elements, neighbours side by side;
# with 4 warps of 32 it has 8 such loads in flight, which hides the latency of memory at a full set of programs.
BLOCK = 1024
NUM_WARPS = 4
# Programs wanted at least: several for each of the 100 to 150 processors of a large GPU, so that a few long segments
# do not leave most of it idle. Where there are fewer segments, each is shared by several programs.
PROGRAMS = 1024


@triton.jit
def segment_sum_kernel(
    x_ptr,  # [N], elements x_stride apart
    mask_ptr,  # [N] bool, contiguous; not read without HAS_MASK
    offsets_ptr,  # [S+1] int64, contiguous
    sums_ptr,  # [S, parts] ACC
    counts_ptr,  # [S, parts] int64
    x_stride,
    parts,
    BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program (s, p) takes blocks p, p + parts, p + 2 parts ... of segment s."""
    segment = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_ptr + segment)
    stop = tl.load(offsets_ptr + segment + 1)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=ACC)
    count = tl.zeros([BLOCK], dtype=tl.int64)
    blocks = (stop - start + BLOCK - 1) // BLOCK
    for block in range(part, blocks, parts):
        row = start + block * BLOCK + lane
        keep = row < stop
        if HAS_MASK:
            keep = keep & (tl.load(mask_ptr + row, mask=keep, other=0) != 0)
        # A masked row is not loaded, so what it holds can not matter.
        total += tl.load(x_ptr + row * x_stride, mask=keep, other=0.0).to(ACC)
        count += keep.to(tl.int64)
    tl.store(sums_ptr + segment * parts + part, tl.sum(total, 0))
    tl.store(counts_ptr + segment * parts + part, tl.sum(count, 0))


def share(rows: int, segments: int) -> int:
    """Programs per segment: from the sizes alone, since reading the lengths would wait for the GPU."""
    return max(1, min(triton.cdiv(rows, BLOCK), triton.cdiv(PROGRAMS, segments)))


def segment_sum_count(x: Tensor, offsets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums [S] (float64 for float64 x, else float32) and counts [S] int64 of the unmasked rows of each segment.

    x [N] of any stride, float64, float32, bfloat16 or float16; offsets [S+1] int64; mask [N] bool or None. Arguments
    are taken as checked. Not differentiable by itself.
    """
    segments = offsets.shape[0] - 1
    parts = share(x.shape[0], segments)
    sums = torch.empty(
        (segments, parts), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
    )
    counts = torch.empty((segments, parts), dtype=torch.int64, device=x.device)
    segment_sum_kernel[(segments, parts)](
        x,
        None if mask is None else mask.contiguous(),
        offsets.contiguous(),
        sums,
        counts,
        x.stride(0),
        parts,
        BLOCK=BLOCK,
        HAS_MASK=mask is not None,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        num_warps=NUM_WARPS,
    )
    return (sums[:, 0], counts[:, 0]) if parts == 1 else (sums.sum(1), counts.sum(1))
