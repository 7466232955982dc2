"""The metrics of the policy loss: what a row adds to each, what a program leaves, what the last one makes of that."""

from __future__ import annotations

import triton
import triton.language as tl

from rlcore.algorithms.policy_loss_metrics import METRICS

# Room for the partial results of one program, a power of two.
ROOM = tl.constexpr(32)


def places(*names: str) -> tl.constexpr:
    """As bits of a number."""
    return tl.constexpr(sum(1 << METRICS.index(name) for name in names))


SMALLEST = places("ratio_min")
LARGEST = places("ratio_max", "rollout_logp_difference_max")
TERMS = places("policy_loss", "kl_loss", "entropy_loss")
SUMS = places("tokens", "policy_loss", "kl_loss", "entropy_loss", "weight_sum", "weight_sq_sum", "loss")
SHARE = places("ess")
TOKENS, RATIO_MIN, RATIO_MAX, DIFFERENCE_MAX, WEIGHT_SUM, WEIGHT_SQUARES, ESS, LOSS = (
    tl.constexpr(METRICS.index(name))
    for name in ("tokens", "ratio_min", "ratio_max", "rollout_logp_difference_max", "weight_sum", "weight_sq_sum",
                 "ess", "loss")
)  # fmt: skip


@triton.jit
def has(bits: tl.constexpr, place):
    """Which places a set has, given as the bits of a number."""
    return (((tl.zeros_like(place) + bits) >> place) & 1) != 0


@triton.jit
def at(values, place, wanted: tl.constexpr):
    return tl.sum(tl.where(place == wanted, values, 0.0), 0)


@triton.jit
def largest(x):
    """Along the first axis; NaN if there is one."""
    known = tl.max(tl.where(x == x, x, float("-inf")), 0)
    return tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), known)


# ---- partial results


@triton.jit
def larger(x, y):
    """NaN if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_ratio(
    run, keep, log_ratio, ratio, rest, advantage, floor, ceiling, dual_clip,
    SURROGATE: tl.constexpr, DUAL_CLIP: tl.constexpr,
):  # fmt: skip
    """What the ratio did: the first 12 metrics."""
    tokens, total, low, high, clip_low, clip_high, clip, k1, k3, idle, advantages, dual = run
    below, above = keep & (ratio < floor), keep & (ratio > ceiling)
    if SURROGATE == "ppo":
        below, above = below & (advantage < 0.0), above & (advantage > 0.0)
    if SURROGATE != "reinforce":
        clip_low += below.to(tl.float32)
        clip_high += above.to(tl.float32)
        clip += (below | above).to(tl.float32)
    if DUAL_CLIP:
        dual += (keep & (advantage < 0.0) & (ratio > dual_clip)).to(tl.float32)
    tokens += keep.to(tl.float32)
    total += tl.where(keep, ratio, 0.0)
    low = larger(low, tl.where(keep, -ratio, float("-inf")))
    high = larger(high, tl.where(keep, ratio, float("-inf")))
    idle += (keep & (advantage == 0.0)).to(tl.float32)
    return (tokens, total, low, high, clip_low, clip_high, clip, k1 - log_ratio, k3 + rest, idle,
            advantages + advantage, dual)  # fmt: skip


@triton.jit
def add_rollout(run, keep, difference, rest, weight, over, CORRECTION: tl.constexpr):
    """How far the sampler was: 7 metrics, of which the sixth is made of others at the end."""
    k1, k3, most, total, squares, share, corrected = run
    weight = tl.where(keep, weight, 0.0)
    if CORRECTION:
        corrected += (keep & over).to(tl.float32)
    most = larger(most, tl.abs(difference))
    return k1 - difference, k3 + rest, most, total + weight, squares + weight * weight, share, corrected


@triton.jit
def joined(tiles):
    """Half as many, each of two, the second from the second half."""
    half: tl.constexpr = len(tiles) // 2
    pairs = ()
    for i in tl.static_range(half):
        pairs = pairs + (tl.join(tiles[i], tiles[i + half]),)
    return pairs


@triton.jit
def store_partials(out, run, CHOSEN: tl.constexpr, TILE: tl.constexpr):
    """The row of partial results of what a program's tile holds, in their places.

    All metrics are reduced at once: each alone would take four barriers.
    """
    place = tl.arange(0, ROOM)
    sums = ()
    for k in tl.static_range(ROOM):
        if k < LOSS and (((SMALLEST | LARGEST) >> k) & 1) == 0:
            sums = sums + (run[k],)
        else:
            sums = sums + (tl.zeros([TILE], dtype=tl.float32),)
    value = tl.sum(tl.reshape(joined(joined(joined(joined(joined(sums)))))[0], (TILE, ROOM)), 0)
    extremes = (run[RATIO_MIN], run[RATIO_MAX], run[DIFFERENCE_MAX], run[DIFFERENCE_MAX])
    most = largest(tl.reshape(joined(joined(extremes))[0], (TILE, 4)))
    which = tl.arange(0, 4)
    value = tl.where(place == RATIO_MIN, at(most, which, 0), value)
    value = tl.where(place == RATIO_MAX, at(most, which, 1), value)
    value = tl.where(place == DIFFERENCE_MAX, at(most, which, 2), value)
    for k in tl.static_range(LOSS):
        if ((CHOSEN >> k) & 1) != 0:
            tl.store(out + k, at(value, place, k))


# ---- what the last program makes of it


@triton.jit
def merge(partials_ptr, tokens_ptr, loss_ptr, metrics_ptr, programs, CHOSEN: tl.constexpr, MERGED: tl.constexpr):
    """Adds the partial results in their order, in fp64, and makes metrics of them."""
    place = tl.arange(0, ROOM)
    total = tl.zeros([MERGED, ROOM], dtype=tl.float64)
    most = tl.full([MERGED, ROOM], float("-inf"), dtype=tl.float32)
    for start in range(0, programs, MERGED):
        program = start + tl.arange(0, MERGED).to(tl.int64)
        there = (program < programs)[:, None] & (has(CHOSEN, place) & (place < LOSS))[None, :]
        # Past the first level cache, which does not see what other processors write.
        row = partials_ptr + program[:, None] * ROOM
        x = tl.load(row + place[None, :], mask=there, other=0.0, cache_modifier=".cg")
        total += x.to(tl.float64)
        most = larger(most, tl.where(there, x, float("-inf")))
    value = tl.sum(total, 0)
    tokens = tl.maximum(tl.load(tokens_ptr).to(tl.float32), 1.0).to(tl.float64)
    value = tl.where(has(SUMS, place), value, value / tokens)
    extreme = largest(most).to(tl.float64)
    value = tl.where(has(LARGEST, place), extreme, value)
    value = tl.where(has(SMALLEST, place), -extreme, value)
    if (SHARE & CHOSEN) != 0:
        weight, squares = at(value, place, WEIGHT_SUM), at(value, place, TOKENS) * at(value, place, WEIGHT_SQUARES)
        value = tl.where(place == ESS, tl.where(squares > 0, weight * weight / squares, 1.0), value)
    loss = tl.sum(tl.where(has(TERMS, place), value, 0.0), 0)
    value = tl.where(place == LOSS, loss, value)
    chosen = has(CHOSEN, place)
    tl.store(metrics_ptr + tl.cumsum(chosen.to(tl.int32), 0) - 1, value.to(tl.float32), mask=chosen)
    tl.store(loss_ptr, loss.to(tl.float32))
