"""The terms of one row of the policy loss with their derivatives: what its kernels share. All in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

# exp(20) = 4.9e8: far outside every clip range, and far from the overflow that would turn 0 * inf into NaN gradients.
BOUND = tl.constexpr(20.0)


@triton.jit
def exponentials(x):
    """e^x, e^x - 1 and e^x - 1 - x, each with its digits near 0; for |x| <= 20, relative error below 2^-21.

    e^x = 2^n e^r with |r| <= ln(2) / 2, and e^r = 1 + r + r^2 (1/2 + r/6 + ...). Adding 1.5 * 2^23 rounds to the next
    integer, and leaves it in the last bits.
    """
    shifted = x * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = r * (1.0 / 40320) + (1.0 / 5040)
    p = p * r + (1.0 / 720)
    p = p * r + (1.0 / 120)
    p = p * r + (1.0 / 24)
    p = p * r + (1.0 / 6)
    p = p * r + 0.5
    square = p * r * r
    scale = ((shifted.to(tl.int32, bitcast=True) - (0x4B400000 - 127)) << 23).to(tl.float32, bitcast=True)
    minus = scale * (r + square) + (scale - 1.0)
    return scale * (r + square) + scale, minus, tl.where(n == 0.0, square, minus - x)


@triton.jit
def bounded(x):
    x = tl.where(x < -BOUND, -BOUND, x)
    return tl.where(x > BOUND, BOUND, x)


@triton.jit
def clamped(x, low, high):
    """torch's clamp: NaN in any argument is the result, `high` wins over `low`."""
    x = tl.where((x < low) | (low != low), low, x)
    return tl.where((x > high) | (high != high), high, x)


@triton.jit
def read(ptr, row, keep):
    return tl.load(ptr + row, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def read_or(ptr, row, keep, number):
    """A field, or one number for all rows where there is no field."""
    if ptr is not None:
        x = read(ptr, row, keep)
    else:
        x = tl.zeros_like(row).to(tl.float32) + number
    return x


@triton.jit
def uniform_coefficient(tokens_ptr, sequences_ptr, length, AGGREGATE: tl.constexpr):
    """What every row weighs in the loss, where that is one number."""
    if AGGREGATE == "token_mean":
        denominator = tl.maximum(tl.load(tokens_ptr).to(tl.float32), 1.0)
    else:
        denominator = tl.maximum(tl.load(sequences_ptr).to(tl.float32), 1.0)
    if AGGREGATE == "seq_mean_token_sum_norm":
        denominator = denominator * length
    return 1.0 / denominator


@triton.jit
def behaviour_weight(difference, cap, CORRECTION: tl.constexpr):
    """exp(old_logp - rollout_logp), cut at the cap where it corrects; whether it was cut; e^x - 1 - x."""
    weight, _, rest = exponentials(bounded(difference))
    over = weight > cap
    if CORRECTION:
        weight = tl.where(over, cap, weight)
    return weight, over, rest


@triton.jit
def surrogate_term(
    logp, ratio, advantage, floor, ceiling, dual_clip,
    RATIO: tl.constexpr, SURROGATE: tl.constexpr, DUAL_CLIP: tl.constexpr,
):  # fmt: skip
    """The policy term of a row, and its derivatives by the log-ratio (through the ratio) and by logp itself.

    Where the two sides of a maximum are equal each takes half the gradient, as in torch.
    """
    zero = tl.zeros_like(ratio)
    if SURROGATE == "reinforce":
        if RATIO == "none":
            loss, by_log_ratio, by_logp = -advantage * logp, zero, -advantage
        else:
            loss, by_log_ratio, by_logp = -advantage * ratio, -advantage * ratio, zero
    elif SURROGATE == "cispo":
        slope = -clamped(ratio, floor, ceiling) * advantage
        loss, by_log_ratio, by_logp = slope * logp, zero, slope
    else:
        free = -ratio * advantage
        bound = -clamped(ratio, floor, ceiling) * advantage
        loss = tl.where((free < bound) | (bound != bound), bound, free)
        tie = tl.where(free == bound, 0.5, 1.0)
        share = tl.where(free < bound, 0.0, tie)
        inside = (ratio >= floor) & (ratio <= ceiling)
        share += tl.where(inside, tl.where(free > bound, 0.0, tie), 0.0)
        if DUAL_CLIP:
            most = -dual_clip * advantage
            negative = advantage < 0.0
            kept = tl.where(loss == most, 0.5, tl.where(loss > most, 0.0, 1.0))
            loss = tl.where(negative & (loss > most), most, loss)
            share *= tl.where(negative, kept, 1.0)
        by_log_ratio, by_logp = -advantage * share * ratio, zero
    return loss, by_log_ratio, by_logp


@triton.jit
def kl_term(x, ESTIMATOR: tl.constexpr):
    """Schulman's estimator of the KL from x = log pi - log ref, and its derivative; then k3, whatever was asked for."""
    near = tl.abs(x) <= BOUND
    y = bounded(x)
    _, minus, rest = exponentials(-y)
    if ESTIMATOR == "k1":
        value, slope = y, tl.zeros_like(y) + 1.0
    elif ESTIMATOR == "k2":
        value, slope = y * y * 0.5, y
    else:
        value, slope = rest, -minus
    return value, tl.where(near, slope, 0.0), y, rest
