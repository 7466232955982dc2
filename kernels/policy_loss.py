"""The clipped-surrogate family: loss, gradients and metrics of a flat batch in two launches.

    loss = sum_i c_i [ w_i rho_i surrogate_i + beta KL_i - alpha H_i ]      as rlcore.algorithms.policy_loss states it

`policy_rows_kernel` takes BLOCK rows per program: each row's term, d loss / d logp, d loss / d entropy, and one row of
partial results per program, in the order of the metrics. `policy_metrics_kernel`, one program, adds these in their
order, in fp64, and writes the loss and all metrics. Where a sequence or a segment shares its ratio, one launch before
them (kernels/policy_loss_units.py) leaves each row its unit's mean log-ratio and mean gradient.

Memory traffic: every field that is there once (4 bytes a row, masks 1), d logp and d entropy once where asked for, and
128 bytes of partial results per BLOCK rows: 21 to 37 bytes a row. A masked row is not loaded, so what it holds can not
matter. Bounds, coefficients and totals are numbers of the launch, not of the code, and so is the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcore.kernels.policy_loss_terms import (
    BOUND,
    behaviour_weight,
    bounded,
    exponentials,
    kl_term,
    read,
    read_or,
    surrogate_term,
    uniform_coefficient,
)

# A field begins anywhere (a chunk is cut at any row), so a thread loads single elements, neighbours side by side. With
# 4 rows a thread the fullest objective takes 138 registers on sm_90, three programs to a processor. With 2 of them
# ptxas aims at 64 registers and spills 8 bytes of some objectives; so does 1024 rows with 8 warps. Not measured.
BLOCK = 512
NUM_WARPS = 4
# Programs whose partial results are read at once, 4 KiB per 32 programs; 16 warps keep 16 numbers each.
MERGED = 256
MERGE_WARPS = 16
# Room for the metrics of one program, a power of two.
ROOM = tl.constexpr(32)


# ---- partial results


@triton.jit
def largest(x, keep, without):
    """The largest kept x, NaN if there is one among them, `without` if there is none at all."""
    known = tl.max(tl.where(keep & (x == x), x, without), 0)
    return tl.where(tl.max((keep & (x != x)).to(tl.int32), 0) > 0, float("nan"), known)


@triton.jit
def store_count(ptr, which):
    tl.store(ptr, tl.sum(which.to(tl.int32), 0).to(tl.float32))


@triton.jit
def store_ratio_metrics(
    out, keep, log_ratio, ratio, rest, advantage, floor, ceiling, dual_clip,
    SURROGATE: tl.constexpr, DUAL_CLIP: tl.constexpr,
):  # fmt: skip
    """What the ratio did, from the first metric on: 11 numbers, 12 with a dual clip."""
    below, above = keep & (ratio < floor), keep & (ratio > ceiling)
    if SURROGATE == "ppo":
        below, above = below & (advantage < 0.0), above & (advantage > 0.0)
    elif SURROGATE == "reinforce":
        below, above = tl.zeros_like(keep), tl.zeros_like(keep)
    store_count(out + 0, keep)
    tl.store(out + 1, tl.sum(tl.where(keep, ratio, 0.0), 0))
    tl.store(out + 2, largest(-ratio, keep, float("-inf")))
    tl.store(out + 3, largest(ratio, keep, float("-inf")))
    store_count(out + 4, below)
    store_count(out + 5, above)
    store_count(out + 6, below | above)
    tl.store(out + 7, -tl.sum(log_ratio, 0))
    tl.store(out + 8, tl.sum(rest, 0))
    store_count(out + 9, keep & (advantage == 0.0))
    tl.store(out + 10, tl.sum(advantage, 0))
    if DUAL_CLIP:
        store_count(out + 11, keep & (advantage < 0.0) & (ratio > dual_clip))


@triton.jit
def store_rollout_metrics(out, keep, difference, rest, weight, over, CORRECTION: tl.constexpr):
    """How far the sampler was: 6 numbers, 7 with a correction; the fifth from here is made of others at the end."""
    weight = tl.where(keep, weight, 0.0)
    tl.store(out + 0, -tl.sum(difference, 0))
    tl.store(out + 1, tl.sum(rest, 0))
    tl.store(out + 2, largest(tl.abs(difference), keep, 0.0))
    tl.store(out + 3, tl.sum(weight, 0))
    tl.store(out + 4, tl.sum(weight * weight, 0))
    tl.store(out + 5, 0.0)
    if CORRECTION:
        store_count(out + 6, keep & over)


# ---- the two launches


def policy_rows_kernel(
    logp_ptr,  # [N], like all fields: floats of any width, contiguous, None where the batch has none
    entropy_ptr,
    advantage_ptr,
    old_logp_ptr,
    ref_logp_ptr,
    rollout_logp_ptr,
    weight_ptr,
    clip_low_ptr,
    clip_high_ptr,
    mask_ptr,  # [N] bool
    kl_mask_ptr,  # [N] bool
    coefficient_ptr,  # [N] of each row in the loss; None: one number for all
    mean_ptr,  # [N] RATIO "unit": the mean log-ratio of the row's unit, not yet bounded
    through_ptr,  # [N] RATIO "unit": the mean over its unit of the derivatives by that mean; None: no gradient
    tokens_ptr,  # totals of the minibatch
    sequences_ptr,
    d_logp_ptr,  # [N] float32; None: not asked for
    d_entropy_ptr,  # [N] float32; None: not asked for
    partials_ptr,  # [programs, ROOM] float32
    n,
    clip_low,
    clip_high,
    dual_clip,
    cap,
    kl_coefficient,
    entropy_coefficient,
    length,
    RATIO: tl.constexpr,
    SURROGATE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    AGGREGATE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    CORRECTION: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = row < n
    keep = inside
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
    logp = read(logp_ptr, row, keep)
    old_logp = read_or(old_logp_ptr, row, keep, 0.0)
    if old_logp_ptr is None:
        old_logp = logp
    advantage = read(advantage_ptr, row, keep)
    if coefficient_ptr is not None:
        coefficient = read(coefficient_ptr, row, keep)
    else:
        coefficient = tl.where(keep, uniform_coefficient(tokens_ptr, sequences_ptr, length, AGGREGATE), 0.0)

    if RATIO == "unit":
        log_ratio = read(mean_ptr, row, keep)
    elif RATIO == "token":
        log_ratio = logp - old_logp
    else:
        log_ratio = logp - logp
    moves = tl.abs(log_ratio) <= BOUND
    log_ratio = bounded(log_ratio)
    ratio, _, rest = exponentials(log_ratio)
    floor = 1.0 - read_or(clip_low_ptr, row, keep, clip_low)
    ceiling = 1.0 + read_or(clip_high_ptr, row, keep, clip_high)
    loss, by_log_ratio, by_logp = surrogate_term(
        logp, ratio, advantage, floor, ceiling, dual_clip, RATIO, SURROGATE, DUAL_CLIP
    )
    out = partials_ptr + program * ROOM
    store_ratio_metrics(
        out, keep, log_ratio, ratio, rest, advantage, floor, ceiling, dual_clip, SURROGATE, DUAL_CLIP
    )
    place = out + (12 if DUAL_CLIP else 11)

    factor = coefficient
    difference = tl.zeros_like(logp)
    if rollout_logp_ptr is not None:
        difference = old_logp - read(rollout_logp_ptr, row, keep)
    weight, over, rollout_k3 = behaviour_weight(difference, cap, CORRECTION)
    if CORRECTION:
        loss *= weight
        factor *= weight
    if weight_ptr is not None:
        own_weight = read(weight_ptr, row, keep)
        loss *= own_weight
        factor *= own_weight
    tl.store(place, tl.sum(coefficient * loss, 0))
    place += 1
    d_logp = factor * by_logp
    if RATIO == "unit":
        if through_ptr is not None:
            d_logp += read(through_ptr, row, keep)
    else:
        d_logp += tl.where(moves, factor * by_log_ratio, 0.0)

    if ref_logp_ptr is not None:
        # Rows outside the KL mask have a difference of 0, whatever the reference holds there.
        chosen = keep
        if kl_mask_ptr is not None:
            chosen = chosen & (tl.load(kl_mask_ptr + row, mask=keep, other=0) != 0)
        x = tl.where(chosen, logp - read(ref_logp_ptr, row, chosen), 0.0)
        value, slope, ref_k1, ref_k3 = kl_term(x, ESTIMATOR)
        if ESTIMATOR != "":
            selected = kl_coefficient * tl.where(chosen, coefficient, 0.0)
            tl.store(place, tl.sum(selected * value, 0))
            place += 1
            d_logp += selected * slope
    if d_logp_ptr is not None:
        tl.store(d_logp_ptr + row, tl.where(keep, d_logp, 0.0), mask=inside)
    if d_entropy_ptr is not None:
        tl.store(d_entropy_ptr + row, -entropy_coefficient * coefficient, mask=inside)

    entropy = read_or(entropy_ptr, row, keep, 0.0)
    if ENTROPY:
        tl.store(place, -tl.sum(entropy_coefficient * coefficient * entropy, 0))
        place += 1
    tl.store(place, tl.sum(logp, 0))
    place += 1
    if entropy_ptr is not None:
        tl.store(place, tl.sum(entropy, 0))
        place += 1
    if ref_logp_ptr is not None:
        tl.store(place, tl.sum(ref_k1, 0))
        tl.store(place + 1, tl.sum(ref_k3, 0))
        place += 2
    if rollout_logp_ptr is not None:
        store_rollout_metrics(place, keep, difference, rollout_k3, weight, over, CORRECTION)


# One compilation per structure and dtypes: neither where a field begins nor how many rows there are makes another.
FIELDS = ("logp", "entropy", "advantage", "old_logp", "ref_logp", "rollout_logp", "weight", "clip_low", "clip_high",
          "mask", "kl_mask", "coefficient", "mean", "through")  # fmt: skip
OTHERS = ("tokens", "sequences", "d_logp", "d_entropy", "partials")
policy_rows_kernel = triton.jit(
    policy_rows_kernel, do_not_specialize=["n"],
    do_not_specialize_on_alignment=[f"{name}_ptr" for name in (*FIELDS, *OTHERS)],
)  # fmt: skip


@triton.jit
def has(bits: tl.constexpr, place):
    """Which places a set has, given as the bits of a number."""
    return ((bits >> place) & 1) != 0


@triton.jit
def at(values, place, wanted: tl.constexpr):
    return tl.sum(tl.where(place == wanted, values, 0.0), 0)


@triton.jit(do_not_specialize=["programs"])
def policy_metrics_kernel(
    partials_ptr,  # [programs, ROOM] float32
    tokens_ptr,
    loss_ptr,  # [] float32
    metrics_ptr,  # [COUNT] float32
    programs,
    COUNT: tl.constexpr,
    MEANS: tl.constexpr,  # bits of the metrics that are means over the minibatch's tokens
    LARGEST: tl.constexpr,  # bits of those that are the largest of the partial results
    SMALLEST: tl.constexpr,  # bits of those of which the partial results hold the largest of the negatives
    TERMS: tl.constexpr,  # bits of those that add up to the loss
    WEIGHTS: tl.constexpr,  # place of the sum of weights, their squares and the effective sample size follow; -1: none
    BLOCK: tl.constexpr,
):
    """One program: adds the partial results in their order, in fp64, and makes metrics of them."""
    place = tl.arange(0, ROOM)
    written = place < COUNT - 1
    total = tl.zeros([BLOCK, ROOM], dtype=tl.float64)
    most = tl.full([BLOCK, ROOM], float("-inf"), dtype=tl.float32)
    broken = tl.zeros([BLOCK, ROOM], dtype=tl.int32)
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK).to(tl.int64)
        there = (program < programs)[:, None] & written[None, :]
        x = tl.load(partials_ptr + program[:, None] * ROOM + place[None, :], mask=there, other=0.0)
        total += x.to(tl.float64)
        broken |= (x != x).to(tl.int32)
        most = tl.maximum(most, tl.where(there & (x == x), x, float("-inf")))
    tokens = tl.maximum(tl.load(tokens_ptr).to(tl.float32), 1.0).to(tl.float64)
    value = tl.sum(total, 0)
    value = tl.where(has(MEANS, place), value / tokens, value)
    extreme = tl.where(tl.max(broken, 0) > 0, float("nan"), tl.max(most, 0)).to(tl.float64)
    value = tl.where(has(LARGEST, place), extreme, value)
    value = tl.where(has(SMALLEST, place), -extreme, value)
    if WEIGHTS >= 0:
        weight, squares = at(value, place, WEIGHTS), at(value, place, 0) * at(value, place, WEIGHTS + 1)
        share = tl.where(squares > 0, weight * weight / squares, 1.0)
        value = tl.where(place == WEIGHTS + 2, share, value)
    loss = tl.sum(tl.where(has(TERMS, place), value, 0.0), 0)
    value = tl.where(place == COUNT - 1, loss, value)
    tl.store(metrics_ptr + place, value.to(tl.float32), mask=place < COUNT)
    tl.store(loss_ptr, loss.to(tl.float32))


SUMS = ("tokens", "weight_sum", "weight_sq_sum", "ess", "loss")
TERMS = ("policy_loss", "kl_loss", "entropy_loss")


def policy_loss(
    fields: dict[str, Tensor | None],
    totals: tuple[Tensor, Tensor],
    numbers: Sequence[float],
    structure: tuple[str, str, str, str, bool, bool, bool],
    names: tuple[str, ...],
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics in the order of `names`, d logp, d entropy): float32, the gradients empty where not needed.

    `fields` by name (FIELDS), [N], contiguous; `totals` are the minibatch's tokens and sequences; `numbers` are
    clip_low, clip_high, dual_clip, cap, kl, entropy, length; `structure` is RATIO ("none", "token", "unit"), SURROGATE,
    ESTIMATOR ("" for none), AGGREGATE, DUAL_CLIP, CORRECTION, ENTROPY.
    """
    logp = fields["logp"]
    assert logp is not None
    n, new = logp.shape[0], lambda *shape: torch.empty(shape, dtype=torch.float32, device=logp.device)
    programs = max(1, triton.cdiv(n, BLOCK))
    loss, metrics, partials = new(), new(len(names)), new(programs, ROOM.value)
    d_logp, d_entropy = new(n if needs[0] else 0), new(n if needs[1] else 0)
    policy_rows_kernel[(programs,)](
        *(fields.get(name) for name in FIELDS), *totals, d_logp if needs[0] else None, d_entropy if needs[1] else None,
        partials, n, *numbers, *structure, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    bits = lambda chosen: sum(1 << i for i, name in enumerate(names) if chosen(name))  # noqa: E731
    policy_metrics_kernel[(1,)](
        partials, totals[0], loss, metrics, programs,
        COUNT=len(names),
        MEANS=bits(lambda name: name not in (*SUMS, *TERMS)),
        LARGEST=bits(lambda name: name.endswith("_max")),
        SMALLEST=bits(lambda name: name.endswith("_min")),
        TERMS=bits(lambda name: name in TERMS),
        WEIGHTS=names.index("weight_sum") if "weight_sum" in names else -1,
        BLOCK=MERGED,
        num_warps=MERGE_WARPS,
    )  # fmt: skip
    return loss, metrics, d_logp, d_entropy
