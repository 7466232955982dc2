"""Reverse scans over ragged sequences: returns, GAE and V-trace, as rlcore.algorithms states them.

    y[i] = b[i] + a[i] * y[i+1]       two neighbouring rows are one:  y[i] = (b[i] + a[i] b[i+1]) + (a[i] a[i+1]) y[i+2]

One program per sequence walks it from its end, a block at a time: the rows of a block are put together by an
associative scan over the pairs (a, b), and the block's first row is what the next block is given. A masked row is
(1, 0): it passes on what follows. Every sum has one order, which the lengths alone decide, so the same input gives the
same bits. fp32 throughout, rounded nowhere else; float64 is for the reference.

Memory traffic: each input once, each output once, per row 4 to 12 bytes in (and 1 for the mask) and 4 or 8 out.

512 sequences of 4096 rows are 512 programs of 4 warps, 4 to a processor of an H100 (it has 132, with room for 16), and
walk 4 blocks each: all are under way at once, which is as much as a second launch could bring about. A walk takes as
long as the longest sequence, though, however idle the GPU. So where sequences are fewer than processors and long, each
is cut into parts: a first launch leaves (a, b) of every part, a second walks the parts with what those behind them come
to. It reads the inputs twice, and one part has no less than some blocks. Not measured.
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
# Sequences from which each is walked by one program; below, programs wanted, parts of a sequence at most, and blocks
# per part at least, were all rows in one sequence (their lengths are not known here without waiting for the GPU).
MANY = 128
PROGRAMS = 512
MOST_PARTS = 64
LEAST_BLOCKS = 8


@triton.jit
def compose(later_a, later_b, a, b):
    return later_a * a, b + a * later_b


@triton.jit
def latest(later_known, later_x, known, x):
    return later_known | known, tl.where(known != 0, x, later_x)


@triton.jit
def scanned(a, b, after):
    """(y, the product of a from each row on): y[i] = b[i] + a[i] * y[i+1] over a block, with y = after behind it."""
    a, b = tl.associative_scan((a, b), 0, compose, reverse=True)
    return b + a * after, a


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
def first_kept(x_ptr, mask_ptr, row, stop, after, BLOCK: tl.constexpr):
    """x of the first kept row from `row` on, `after` where none follows before `stop`."""
    while row < stop:
        rows = row + tl.arange(0, BLOCK)
        keep = rows < stop
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + rows, mask=keep, other=0) != 0)
        nearest = tl.min(tl.where(keep, rows, stop), 0)
        if nearest < stop:
            after = tl.load(x_ptr + nearest).to(tl.float32)
            row = stop
        else:
            row += BLOCK
    return after


@triton.jit
def behind(a_ptr, b_ptr, part, after, MOST: tl.constexpr):
    """y behind a part: what parts 0 .. part - 1, counted from the end, make of y = after behind them all."""
    lane = tl.arange(0, MOST)
    a = tl.load(a_ptr + lane, mask=lane < part, other=1.0)
    b = tl.load(b_ptr + lane, mask=lane < part, other=0.0)
    a, b = tl.associative_scan((a, b), 0, compose)
    return tl.sum(tl.where(lane == MOST - 1, b + a * after, 0.0), 0)


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
    a_ptr,  # [S, parts] float32, (a, b) of each part, the last rows first; None: one part, one launch
    b_ptr,
    gamma_stride,
    lam_stride,
    length,
    gamma,
    lam,
    log_rho_bar,
    log_c_bar,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,  # leave (a, b) of a part, not its rows' results
    MOST: tl.constexpr,
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
    product = 1.0
    if a_ptr is not None:
        part, parts = tl.program_id(1), tl.num_programs(1)
        rows = ((stop - start + parts - 1) // parts + BLOCK - 1) // BLOCK * BLOCK
        a_ptr += sequence * parts
        b_ptr += sequence * parts
        last = stop
        stop = tl.maximum(stop - part * rows, start)
        start = tl.maximum(stop - rows, start)
        if KIND != "return":
            value_after = first_kept(value_ptr, mask_ptr, stop, last, after, BLOCK)
        if FOLD:
            y_after = 0.0
        else:
            y_after = behind(a_ptr, b_ptr, part, y_after, MOST)
    for end in range(stop, start, -BLOCK):
        row = end - BLOCK + lane
        inside = row >= start
        keep = inside
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
        x = read(x_ptr, row, keep)
        discount = coefficient(gamma_ptr, gamma_stride, gamma, row, keep)
        if KIND == "return":
            y, a = scanned(tl.where(keep, discount, 1.0), x, y_after)
            if not FOLD:
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
            y, a = scanned(tl.where(keep, decay, 1.0), tl.where(keep, delta, 0.0), y_after)
            advantage = y
            if KIND == "vtrace":
                target = following(ahead + y, lane, value_after + y_after, BLOCK)
                advantage = rho * (x + discount * target - value)
            if not FOLD:
                tl.store(out_ptr + row, tl.where(keep, advantage, 0.0), mask=inside)
                tl.store(returns_ptr + row, tl.where(keep, y + value, 0.0), mask=inside)
            value_after = first(ahead, lane)
        y_after = first(y, lane)
        if FOLD:
            product *= first(a, lane)
    if FOLD:
        tl.store(a_ptr + part, product)
        tl.store(b_ptr + part, y_after)


# One compilation per kind, block, launch and what there is: neither where a tensor begins nor a length makes another.
POINTERS = ("x", "value", "log_ratio", "gamma", "lam", "mask", "offsets", "bootstrap", "out", "returns", "a", "b")
reverse_scan_kernel = triton.jit(
    reverse_scan_kernel, do_not_specialize=["gamma_stride", "lam_stride", "length"],
    do_not_specialize_on_alignment=[f"{name}_ptr" for name in POINTERS],
)  # fmt: skip


def parts_of(rows: int, sequences: int) -> int:
    """Programs per sequence."""
    if sequences >= MANY:
        return 1
    return max(1, min(MOST_PARTS, PROGRAMS // sequences, rows // (LEAST_BLOCKS * LONG[0])))


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
    parts = 1 if block == SHORT[0] else parts_of(n, sequences)
    a = b = None
    if parts > 1:
        a, b = torch.empty((2, sequences, parts), dtype=torch.float32, device=x.device)
    for fold in (True, False) if parts > 1 else (False,):
        reverse_scan_kernel[(sequences, parts)](
            *xs, *(None,) * (3 - len(xs)), *given, mask, offsets, bootstrap, out, returns, a, b, *strides,
            n // sequences, *numbers, log_rho_bar, log_c_bar, KIND=kind, BLOCK=block, FOLD=fold, MOST=MOST_PARTS,
            num_warps=warps,
        )  # fmt: skip
    return out, returns
