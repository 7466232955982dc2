"""Reverse scans over ragged sequences in one launch: returns, GAE and V-trace, as rlcore.algorithms states them.

    y[i] = b[i] + a[i] * y[i+1]       two neighbouring rows are one:  y[i] = (b[i] + a[i] b[i+1]) + (a[i] a[i+1]) y[i+2]

One program per sequence walks it from its end, a block at a time: the rows of a block are put together by an
associative scan over the pairs (a, b), and the block's first row is what the next block is given. A masked row is
(1, 0): it passes on what follows. Every sum has one order, which the lengths alone decide, so the same input gives the
same bits. fp32 throughout, rounded nowhere else; float64 is for the reference.

Memory traffic: each input once, each output once, per row 4 to 12 bytes in (and 1 for the mask) and 4 or 8 out. A
sequence is the work of one program: the walk of a few very long ones leaves most of a GPU idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows per block, warps. A sequence begins anywhere, so a thread loads single elements, neighbours side by side: 8 rows
# a thread in a long block, whose scan then needs few steps across threads for each row. Where sequences are short on
# average, one warp with 4 rows a thread takes a whole one. Not measured.
LONG = (1024, 4)
SHORT = (128, 1)
# Rows per sequence on average, up to which they are short.
FEW = 192


@triton.jit
def compose(later_a, later_b, a, b):
    return later_a * a, b + a * later_b


@triton.jit
def latest(later_known, later_x, known, x):
    return later_known | known, tl.where(known != 0, x, later_x)


@triton.jit
def scanned(a, b, after):
    """y[i] = b[i] + a[i] * y[i+1] over a block, with y = after behind it."""
    a, b = tl.associative_scan((a, b), 0, compose, reverse=True)
    return b + a * after


@triton.jit
def passed_on(x, keep, after):
    """x of the first kept row from here on, `after` where none follows in the block."""
    known, x = tl.associative_scan((keep.to(tl.int32), x), 0, latest, reverse=True)
    return tl.where(known != 0, x, after)


@triton.jit
def following(x, lane, after, BLOCK: tl.constexpr):
    """x of the next lane, `after` at the last."""
    return tl.where(lane == BLOCK - 1, after, tl.gather(x, tl.minimum(lane + 1, BLOCK - 1), 0))


@triton.jit
def first(x, lane):
    return tl.sum(tl.where(lane == 0, x, 0.0), 0)


@triton.jit
def read(ptr, row, keep):
    return tl.load(ptr + row, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def coefficient(ptr, stride, number, row, keep):
    """One per row (stride 1), one behind a pointer (stride 0), or a number of the launch."""
    if ptr is not None:
        c = read(ptr, row * stride, keep)
    else:
        c = tl.where(keep, number, 0.0)
    return c


def reverse_scan_kernel(
    x_ptr,  # [N]: delta, or the reward; floats of any width, contiguous, like all inputs
    value_ptr,  # [N] KIND "gae" and "vtrace"
    log_ratio_ptr,  # [N] KIND "vtrace"
    gamma_ptr,  # see coefficient; KIND "return": the decay
    lam_ptr,
    mask_ptr,  # [N] bool, or None
    offsets_ptr,  # [S+1] int64; None: every sequence has `length` rows
    bootstrap_ptr,  # [S], or None for 0
    out_ptr,  # [N] float32: y, or the advantage
    returns_ptr,  # [N] float32, KIND "gae" and "vtrace"
    gamma_stride,
    lam_stride,
    length,
    gamma,
    lam,
    log_rho_bar,
    log_c_bar,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    if offsets_ptr is not None:
        start, stop = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
    else:
        start, stop = sequence * length, (sequence + 1) * length
    lane = tl.arange(0, BLOCK)
    after = 0.0
    if bootstrap_ptr is not None:
        after = tl.load(bootstrap_ptr + sequence).to(tl.float32)
    # What follows the block: y, and the value of its next row. Behind the end, the return is the bootstrap.
    y_after = 0.0
    if KIND == "return":
        y_after = after
    value_after = after
    for end in range(stop, start, -BLOCK):
        row = end - BLOCK + lane
        inside = row >= start
        keep = inside
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
        x = read(x_ptr, row, keep)
        discount = coefficient(gamma_ptr, gamma_stride, gamma, row, keep)
        if KIND == "return":
            y = scanned(tl.where(keep, discount, 1.0), x, y_after)
            tl.store(out_ptr + row, tl.where(keep, y, 0.0), mask=inside)
        else:
            value = read(value_ptr, row, keep)
            ahead = value
            if mask_ptr is not None:
                ahead = passed_on(value, keep, value_after)
            decay = discount * coefficient(lam_ptr, lam_stride, lam, row, keep)
            delta = x + discount * following(ahead, lane, value_after, BLOCK) - value
            if KIND == "vtrace":
                log_ratio = read(log_ratio_ptr, row, keep)
                rho = tl.exp(tl.where(log_ratio > log_rho_bar, log_rho_bar, log_ratio))
                delta *= rho
                decay *= tl.exp(tl.where(log_ratio > log_c_bar, log_c_bar, log_ratio))
            y = scanned(tl.where(keep, decay, 1.0), tl.where(keep, delta, 0.0), y_after)
            advantage = y
            if KIND == "vtrace":
                target = following(ahead + y, lane, value_after + y_after, BLOCK)
                advantage = rho * (x + discount * target - value)
            tl.store(out_ptr + row, tl.where(keep, advantage, 0.0), mask=inside)
            tl.store(returns_ptr + row, tl.where(keep, y + value, 0.0), mask=inside)
            value_after = first(ahead, lane)
        y_after = first(y, lane)


# One compilation per kind, block and what there is: neither where a tensor begins nor a length makes another.
POINTERS = ("x", "value", "log_ratio", "gamma", "lam", "mask", "offsets", "bootstrap", "out", "returns")
reverse_scan_kernel = triton.jit(
    reverse_scan_kernel, do_not_specialize=["gamma_stride", "lam_stride", "length"],
    do_not_specialize_on_alignment=[f"{name}_ptr" for name in POINTERS],
)  # fmt: skip


def reverse_scan(
    kind: str,
    xs: tuple[Tensor, ...],
    sequences: int,
    offsets: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor = 1.0,
    log_rho_bar: float = 0.0,
    log_c_bar: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """kind "return": (y of xs[0] under decay gamma, None); "gae" of (reward, value), "vtrace" of (reward, value,
    log ratio): (advantage, returns). float32, in the shape of xs, which are contiguous and not float64.

    offsets [S+1] int64 for flat xs, None for padded ones [S, T]; mask like xs, bool; bootstrap [S]. gamma and lam are
    numbers, 0-d tensors or tensors like xs. Arguments are taken as checked.
    """
    x, n = xs[0], xs[0].numel()
    out = torch.empty_like(x, dtype=torch.float32)
    returns = None if kind == "return" else torch.empty_like(out)
    if n == 0:
        return out, returns
    given = [c if isinstance(c, Tensor) and c.device == x.device else None for c in (gamma, lam)]
    strides = [1 if c is not None and c.dim() else 0 for c in given]
    numbers = [0.0 if there is not None else float(c) for c, there in zip((gamma, lam), given)]
    block, warps = SHORT if n <= FEW * sequences else LONG
    reverse_scan_kernel[(sequences,)](
        *xs, *(None,) * (3 - len(xs)), *given, mask, offsets, bootstrap, out, returns, *strides, n // sequences,
        *numbers, log_rho_bar, log_c_bar, KIND=kind, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out, returns
