"""Row passes over logits that are in memory: statistics of every row, and logits -> d logits.

    z = softcap * tanh(logit_scale * (a + b) / softcap) / temperature    (no softcap: logit_scale (a + b) / temperature)
    logp = z_y - lse(z)        H = -sum_v p_v log p_v
    if asked for also argmax_v p_v and sum_v p_v^2
    d a_v = (d_logp (1[v = y] - p_v) - d_entropy p_v (log p_v + H)) dz_v/da_v

a is fp32, bf16 or fp16, [n, V] or [B, T, V] whose rows lie anywhere, unit stride along V; all arithmetic is fp32.
Memory traffic: statistics read the logits once (4nV bytes in fp32) and write 16 to 28 bytes a row; the gradient reads
them once and writes 4nV or 2nV bytes. Both are bound by memory: one exponential per logit is a third of what the
special function units do while its four bytes arrive. One program owns one row, so a row's numbers do not depend on
the others. The gradient may be written over the logits, on NVIDIA also in a narrower dtype: bf16 then fills the first
half of each fp32 row. How many rows there are, how far apart and at which address is no constant of a kernel; whether
every row begins at a multiple of 16 bytes is one, for without it no load is wider than an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 4,096 logits in 8 warps are 16 a thread: four 16-byte loads in flight each, 16 KiB a program; with the sums beside
# them 45 to 80 registers, so that three to five programs share a processor and cover the latency of memory; with the
# likeliest entry 126 to 150, and one or two programs.
BLOCK = 4096
# The gradient has more to hold for every logit: with 2,048 it is 25 to 60 registers, so that four to eight programs
# share a processor, each thread with 16 or 32 bytes in flight.
GRADIENT_BLOCK = 2048
NUM_WARPS = 8

LOWEST = tl.constexpr(-3.4028234663852886e38)
# exp(-1e4) is 0; log-probabilities below it are lifted to it, so that 0 * log 0 is 0 and not NaN.
LOG_ZERO = tl.constexpr(-1e4)


@triton.jit
def at_least(x, bound):
    """max(x, bound) that lets NaN through."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh_and_slope(x):
    """tanh x and 1 - tanh^2 x; with e = exp(-2|x|) the slope is 4e / (1 + e)^2, which loses no digits far out.

    Near 0 tanh is x + x^3 P(x^2), fitted here by weighted least squares on |x| < 0.55: relative error below 2^-23.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    u = x * x
    p = u * -0.006272607482969761 + 0.02107025310397148
    p = p * u - 0.053851865231990814
    p = p * u + 0.13332580029964447
    p = p * u - 0.33333316445350647
    part = 2.0 * e / (1.0 + e)
    far = tl.where(x < 0.0, part - 1.0, 1.0 - part)
    return tl.where(u < 0.3025, x + x * u * p, far), 2.0 * part / (1.0 + e)


@triton.jit
def bend(a, inner, outer, CAPPED: tl.constexpr):
    """(the logits z, dz/da without the factor logit_scale / temperature) of raw logits a."""
    if CAPPED:
        t, slope = tanh_and_slope(a * inner)
        return t * outer, slope
    else:
        return a * inner, 1.0


@triton.jit
def factors(temperature_ptr, temperature_stride, softcap_ptr, logit_scale_ptr, row, CAPPED: tl.constexpr):
    """(inner, outer, logit_scale / temperature) of a row: z = outer * tanh(inner * a), or inner * a."""
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    scale = tl.load(logit_scale_ptr)
    slope = scale / temperature
    if CAPPED:
        cap = tl.load(softcap_ptr)
        return scale / cap, cap / temperature, slope
    else:
        return slope, slope, slope


@triton.jit
def load_raw(a_ptr, bias_ptr, column, V, WHOLE: tl.constexpr, BIASED: tl.constexpr):
    """Raw logits of one row, -inf beyond the vocabulary. Without a mask wide loads need no V divisible by 16."""
    if WHOLE:
        a = tl.load(a_ptr + column).to(tl.float32)
        return a + tl.load(bias_ptr + column).to(tl.float32) if BIASED else a
    else:
        a = tl.load(a_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        return a + tl.load(bias_ptr + column, mask=column < V, other=0.0).to(tl.float32) if BIASED else a


@triton.jit
def fold(z, first, top, total, weighted, squares, best, ENTROPY: tl.constexpr, FURTHER: tl.constexpr):
    """Logits z [BLOCK], of the entries from `first` on, into a row's numbers: the running maximum; by lane the sums of
    e = exp(z - top), of e (z - top) and of e^2; and the lowest entry that has the maximum."""
    higher = tl.maximum(top, tl.max(z, 0))
    down = tl.maximum(top - higher, LOG_ZERO)  # finite, so that times an empty sum it is 0
    shrink = tl.exp(down)
    below = at_least(z - higher, LOG_ZERO)
    e = tl.exp(below)
    if ENTROPY:
        weighted = shrink * (weighted + total * down) + e * below
    if FURTHER:
        squares = shrink * shrink * squares + e * e
        found = first + tl.min(tl.where(z == higher, tl.arange(0, z.shape[0]), z.shape[0]), 0)
        best = tl.where(higher > top, found, best)
    return higher, shrink * total + e, weighted, squares, best


@triton.jit
def row_at(ptr, row, sheet_stride, row_stride, rows_per_sheet, ALIGNED: tl.constexpr):
    """Where a row begins; every one of them at a multiple of 16 bytes if ALIGNED."""
    ptr += (row // rows_per_sheet) * sheet_stride + (row % rows_per_sheet) * row_stride
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit(
    do_not_specialize=["rows_per_sheet", "sheet_stride", "row_stride"],
    do_not_specialize_on_alignment=["a_ptr", "target_ptr", "temperature_ptr"],
)
def statistics_kernel(
    a_ptr,
    sheet_stride,  # row r lies at (r // rows_per_sheet) * sheet_stride + (r % rows_per_sheet) * row_stride
    row_stride,
    rows_per_sheet,
    V,
    target_ptr,  # [n] int64
    bias_ptr,  # [V] or None
    temperature_ptr,  # elements temperature_stride apart: 0 or 1
    temperature_stride,
    softcap_ptr,  # one element, or None
    logit_scale_ptr,  # one element
    maximum_ptr,  # this and what follows: [n] fp32
    log_sum_ptr,
    logp_ptr,
    entropy_ptr,
    top1_ptr,  # [n] int64, or None, as the next
    sum_sq_ptr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    FURTHER: tl.constexpr,
):
    """Program r: the statistics of row r in one sweep. A label outside [0, V) has no log-prob: NaN."""
    row = tl.program_id(0).to(tl.int64)
    a_ptr = row_at(a_ptr, row, sheet_stride, row_stride, rows_per_sheet, ALIGNED)
    inner, outer, _ = factors(temperature_ptr, temperature_stride, softcap_ptr, logit_scale_ptr, row, CAPPED)
    lane = tl.arange(0, BLOCK)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    best = tl.full([], 0, tl.int32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = bend(load_raw(a_ptr, bias_ptr, start + lane, V, True, BIASED), inner, outer, CAPPED)[0]
        top, total, weighted, squares, best = fold(z, start, top, total, weighted, squares, best, ENTROPY, FURTHER)
    if whole < V:
        z = bend(load_raw(a_ptr, bias_ptr, whole + lane, V, False, BIASED), inner, outer, CAPPED)[0]
        z = tl.where(whole + lane < V, z, float("-inf"))  # a softcap, or a negative scale, has bent -inf
        top, total, weighted, squares, best = fold(z, whole, top, total, weighted, squares, best, ENTROPY, FURTHER)
    total = tl.sum(total, 0)
    log_sum = tl.log(total)
    label = tl.load(target_ptr + row)
    inside = (label >= 0) & (label < V)
    a = tl.load(a_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
    if BIASED:
        a += tl.load(bias_ptr + label, mask=inside, other=0.0).to(tl.float32)
    z = bend(a, inner, outer, CAPPED)[0]
    tl.store(maximum_ptr + row, top)
    tl.store(log_sum_ptr + row, log_sum)
    # (z - top) - log_sum is exact where p -> 1; z - lse has lost eps * |lse|.
    tl.store(logp_ptr + row, (z - top) - log_sum)
    if ENTROPY:
        # H = log_sum - sum_v p_v (z_v - top)
        tl.store(entropy_ptr + row, log_sum - tl.sum(weighted, 0) / total)
    if FURTHER:
        tl.store(top1_ptr + row, best.to(tl.int64))
        tl.store(sum_sq_ptr + row, tl.sum(squares, 0) / (total * total))


@triton.jit
def gradient_of(a, column, label, inner, outer, slope, top, log_sum, d_logp, d_entropy, entropy,
                CAPPED: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    """d loss / d a of raw logits a."""
    z, bent = bend(a, inner, outer, CAPPED)
    log_p = at_least((z - top) - log_sum, LOG_ZERO)
    if ENTROPY:
        d = -tl.exp(log_p) * (d_logp + d_entropy * (log_p + entropy))
    else:
        d = -tl.exp(log_p) * d_logp
    # The label's term joins here, in fp32: beside what bf16 has rounded it would be lost for p -> 1.
    d = tl.where(column == label, d + d_logp, d) * slope
    return d * bent if CAPPED else d


@triton.jit(
    do_not_specialize=["rows_per_sheet", "sheet_stride", "row_stride", "out_sheet_stride", "out_row_stride"],
    do_not_specialize_on_alignment=[
        "a_ptr", "out_ptr", "target_ptr", "temperature_ptr", "maximum_ptr", "log_sum_ptr", "logp_ptr", "entropy_ptr",
        "d_logp_ptr", "d_entropy_ptr",
    ],
)  # fmt: skip
def gradient_kernel(
    a_ptr,
    sheet_stride,
    row_stride,
    out_ptr,  # any floating dtype
    out_sheet_stride,
    out_row_stride,
    rows_per_sheet,
    V,
    target_ptr,
    bias_ptr,
    temperature_ptr,
    temperature_stride,
    softcap_ptr,
    logit_scale_ptr,
    maximum_ptr,  # this and what follows: [n] fp32
    log_sum_ptr,
    logp_ptr,
    entropy_ptr,
    d_logp_ptr,
    d_entropy_ptr,  # or None
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    OVER: tl.constexpr,  # `out` lies in the memory of `a`, narrower
):
    """Program r: d logits of row r; zeros, and nothing read, where both coefficients are zero.

    A label outside [0, V) adds nothing, for it may be another shard's; where logp is NaN the whole row becomes NaN.
    Over the logits themselves a narrower block k is written before its own place, so the blocks after it are still
    whole; of its own and those before it all threads have read before any writes.
    """
    row = tl.program_id(0).to(tl.int64)
    a_ptr = row_at(a_ptr, row, sheet_stride, row_stride, rows_per_sheet, ALIGNED)
    out_ptr = row_at(out_ptr, row, out_sheet_stride, out_row_stride, rows_per_sheet, ALIGNED)
    lane = tl.arange(0, BLOCK)
    d_logp = tl.load(d_logp_ptr + row)
    d_entropy = tl.load(d_entropy_ptr + row) if ENTROPY else 0.0
    if (d_logp == 0.0) & (d_entropy == 0.0):
        for start in range(0, V, BLOCK):
            tl.store(out_ptr + start + lane, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=start + lane < V)
    else:
        inner, outer, slope = factors(temperature_ptr, temperature_stride, softcap_ptr, logit_scale_ptr, row, CAPPED)
        top, log_sum, logp = tl.load(maximum_ptr + row), tl.load(log_sum_ptr + row), tl.load(logp_ptr + row)
        entropy = tl.load(entropy_ptr + row) if ENTROPY else 0.0
        d_logp = tl.where(logp == logp, d_logp, float("nan"))
        label = tl.load(target_ptr + row)
        label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
        whole = V // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            column = start + lane
            a = load_raw(a_ptr, bias_ptr, column, V, True, BIASED)
            if OVER:
                tl.debug_barrier()
            d = gradient_of(a, column, label, inner, outer, slope, top, log_sum, d_logp, d_entropy, entropy,
                            CAPPED, ENTROPY)  # fmt: skip
            tl.store(out_ptr + column, d.to(out_ptr.dtype.element_ty))
        if whole < V:
            column = whole + lane
            a = load_raw(a_ptr, bias_ptr, column, V, False, BIASED)
            if OVER:
                tl.debug_barrier()
            d = gradient_of(a, column, label, inner, outer, slope, top, log_sum, d_logp, d_entropy, entropy,
                            CAPPED, ENTROPY)  # fmt: skip
            tl.store(out_ptr + column, d.to(out_ptr.dtype.element_ty), mask=column < V)


def rows_of(logits: Tensor) -> tuple[int, int, int]:
    """(sheet stride, row stride, rows per sheet) of [n, V] or [B, T, V]."""
    if logits.dim() == 2:
        return 0, logits.stride(0), max(1, logits.shape[0])
    return logits.stride(0), logits.stride(1), max(1, logits.shape[1])


def is_aligned(logits: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    return logits.data_ptr() % 16 == 0 and all(x * logits.element_size() % 16 == 0 for x in logits.stride()[:-1])


Numbers = tuple[Tensor, int, Tensor | None, Tensor]


def numbers(temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor) -> Numbers:
    """The head's numbers as the kernels read them: on the device, never by value."""
    return temperature, temperature.stride(0) if temperature.dim() else 0, softcap, logit_scale


def statistics(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    entropy: bool,
    further: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, log_sum, logp, entropy), each [n] fp32; entropy is zeros unless asked for.

    `further` receives the likeliest entries [n] int64, of several the lowest, and sums of p^2 [n] fp32.

    logits [n, V] or [B, T, V], target [n] int64, temperature 0-d or [n], softcap and logit_scale 0-d, on one device.
    """
    n, V = target.shape[0], logits.shape[-1]
    out = tuple(torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(4))
    if n:
        statistics_kernel[(n,)](
            logits, *rows_of(logits), V, target, bias, *numbers(temperature, softcap, logit_scale), *out,
            *((None, None) if further is None else further),
            BLOCK=BLOCK, BIASED=bias is not None, ALIGNED=is_aligned(logits), CAPPED=softcap is not None,
            ENTROPY=entropy, FURTHER=further is not None, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    if not entropy:
        out[3].zero_()
    return out


def gradient(
    logits: Tensor,
    out: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],
    d_logp: Tensor,
    d_entropy: Tensor | None,
) -> Tensor:
    """Writes d loss / d raw logits into `out`, of the logits' shape: the logits themselves, `narrower(logits)`, or
    memory of its own. The statistics and coefficients are contiguous fp32 [n]."""
    n, V = target.shape[0], logits.shape[-1]
    sheet, row, per_sheet = rows_of(logits)
    if n:
        gradient_kernel[(n,)](
            logits, sheet, row, out, *rows_of(out)[:2], per_sheet, V, target, bias,
            *numbers(temperature, softcap, logit_scale), *statistics, d_logp, d_entropy,
            BLOCK=GRADIENT_BLOCK, BIASED=bias is not None, ALIGNED=is_aligned(logits) and is_aligned(out),
            CAPPED=softcap is not None, ENTROPY=d_entropy is not None,
            OVER=out.data_ptr() == logits.data_ptr() and out.dtype != logits.dtype,
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def narrower(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the gradient [n, V] in a dtype that is no wider: the logits, or the front of each row's memory.

    On AMD a narrower one gets memory of its own: there a barrier waits for no load (`s_barrier` without a wait for
    vector memory is what Triton makes of it), so a thread could write what another has yet to read.
    """
    if logits.dtype == dtype:
        return logits
    if torch.version.hip is not None:
        return torch.empty(logits.shape, dtype=dtype, device=logits.device)
    return logits.view(dtype)[:, : logits.shape[1]]
