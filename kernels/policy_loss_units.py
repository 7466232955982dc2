"""What the rows of a unit (a sequence, a segment of one) share in the policy loss, one launch before its own.

    tokens_u = unmasked rows of u,      mean_u = sum_i (logp_i - old_logp_i) / tokens_u,
    through_u = sum_i d loss / d mean_u by row i / tokens_u,      c_u = 1 / (tokens_u * sequences)

A program walks its units from end to end, up to three times, and leaves each number on all rows of its unit: then the
main pass can take rows anywhere. Rows are those of sequences by their borders, or, where units interleave, a
permutation that puts the rows of each unit side by side. Memory traffic: logp and old_logp, the fields of the policy
term where a gradient is wanted (from the second level cache, if a unit fits), and 4 to 12 bytes written a row. A unit
is the work of one program: its sums have one order, and a few very long sequences leave much of a GPU idle.
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
    read,
    read_or,
    surrogate_term,
    uniform_coefficient,
)

# Rows per step of a walk, 4 for each of 128 threads, which then need 64 registers. Responses have hundreds to thousands
# of tokens: a larger step leaves more threads idle at their ends (and 8 warps of 4 rows did not fit their registers).
BLOCK = 512
NUM_WARPS = 4
# Programs at most: several for each processor of a large GPU; where there are more units, each takes several.
PROGRAMS = 4096


@triton.jit
def rows_of(place, end, order_ptr, mask_ptr):
    """The rows at places of the units' order, whether they lie in the unit, and whether they count."""
    inside = place < end
    row = place
    if order_ptr is not None:
        row = tl.load(order_ptr + place, mask=inside, other=0)
    keep = inside
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
    return row, inside, keep


@triton.jit
def mean_log_ratio(begin, end, logp_ptr, old_logp_ptr, mask_ptr, order_ptr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """(unmasked rows, at least 1; the mean of their log-ratios, 0 without MEAN)"""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        row, _, keep = rows_of(first + lane, end, order_ptr, mask_ptr)
        count += keep.to(tl.int32)
        if MEAN and old_logp_ptr is not None:
            total += read(logp_ptr, row, keep) - read(old_logp_ptr, row, keep)
    tokens = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    return tokens, tl.sum(total, 0) / tokens


def policy_units_kernel(
    logp_ptr,  # [N], like all fields; see policy_loss_kernel
    advantage_ptr,
    old_logp_ptr,
    rollout_logp_ptr,
    weight_ptr,
    clip_low_ptr,
    clip_high_ptr,
    mask_ptr,
    coefficient_ptr,
    borders_ptr,  # [units + 1] int64, places in the units' order
    order_ptr,  # [N] int64: rows in the units' order; None: as they lie
    count_ptr,  # [1] int64: how many of the units there are; None: all
    tokens_ptr,
    sequences_ptr,
    mean_ptr,  # [N] float32, not yet bounded; None: not asked for
    through_ptr,  # [N] float32; None: no gradient
    own_ptr,  # [N] float32: c_u; None: rows have a coefficient, or all the same
    units,
    clip_low,
    clip_high,
    dual_clip,
    cap,
    length,
    SURROGATE: tl.constexpr,
    AGGREGATE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK).to(tl.int64)
    if count_ptr is not None:
        units = tl.load(count_ptr)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        begin, end = tl.load(borders_ptr + unit), tl.load(borders_ptr + unit + 1)
        tokens, mean = mean_log_ratio(
            begin, end, logp_ptr, old_logp_ptr, mask_ptr, order_ptr, mean_ptr is not None, BLOCK
        )
        if own_ptr is not None:
            share = 1.0 / (tokens * tl.maximum(tl.load(sequences_ptr).to(tl.float32), 1.0))
        elif coefficient_ptr is None:
            share = uniform_coefficient(tokens_ptr, sequences_ptr, length, AGGREGATE)
        through = tl.zeros([BLOCK], dtype=tl.float32)
        if through_ptr is not None:
            for first in range(begin, end, BLOCK):
                row, _, keep = rows_of(first + lane, end, order_ptr, mask_ptr)
                ratio, _, _ = exponentials(bounded(tl.zeros([BLOCK], dtype=tl.float32) + mean))
                floor = 1.0 - read_or(clip_low_ptr, row, keep, clip_low)
                ceiling = 1.0 + read_or(clip_high_ptr, row, keep, clip_high)
                advantage = read(advantage_ptr, row, keep)
                # The term's own logp matters to none of the surrogates whose ratio has a gradient.
                _, slope, _ = surrogate_term(
                    ratio, ratio, advantage, floor, ceiling, dual_clip, "unit", SURROGATE, DUAL_CLIP
                )
                if CORRECTION:
                    at_old = read(logp_ptr if old_logp_ptr is None else old_logp_ptr, row, keep)
                    weight, _, _ = behaviour_weight(at_old - read(rollout_logp_ptr, row, keep), cap, True)
                    slope *= weight
                if weight_ptr is not None:
                    slope *= read(weight_ptr, row, keep)
                if coefficient_ptr is not None:
                    slope *= read(coefficient_ptr, row, keep)
                else:
                    slope *= share
                through += tl.where(keep, slope, 0.0)
        # A bounded mean moves nothing.
        through_mean = tl.where(tl.abs(mean) <= BOUND, tl.sum(through, 0) / tokens, 0.0)
        for first in range(begin, end, BLOCK):
            row, inside, _ = rows_of(first + lane, end, order_ptr, None)
            if mean_ptr is not None:
                tl.store(mean_ptr + row, tl.zeros([BLOCK], dtype=tl.float32) + mean, mask=inside)
            if through_ptr is not None:
                tl.store(through_ptr + row, tl.zeros([BLOCK], dtype=tl.float32) + through_mean, mask=inside)
            if own_ptr is not None:
                tl.store(own_ptr + row, tl.zeros([BLOCK], dtype=tl.float32) + share, mask=inside)


FIELDS = ("logp", "advantage", "old_logp", "rollout_logp", "weight", "clip_low", "clip_high", "mask", "coefficient")
OTHERS = ("borders", "order", "count", "tokens", "sequences", "mean", "through", "own")
policy_units_kernel = triton.jit(
    policy_units_kernel, do_not_specialize=["units"],
    do_not_specialize_on_alignment=[f"{name}_ptr" for name in (*FIELDS, *OTHERS)],
)  # fmt: skip


def unit_terms(
    fields: dict[str, Tensor | None],
    rows: tuple[Tensor, Tensor | None, Tensor | None],
    totals: tuple[Tensor, Tensor],
    numbers: Sequence[float],
    structure: tuple[str, str, str, str, bool, bool, bool],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(mean log-ratio, mean derivative by it, coefficient of a sequence's mean), [N] float32 each, None if not wanted.

    `rows` are the units' borders [units + 1] int64, the rows in their order [N] int64 or None, and how many of them
    there are, [1] int64 or None; other arguments as in `policy_loss.policy_loss`.
    """
    logp, units = fields["logp"], rows[0].shape[0] - 1
    assert logp is not None
    mean, through, own = (torch.empty_like(logp, dtype=torch.float32) if x else None for x in wanted)
    _, surrogate, _, aggregate, dual_clip, correction, _ = structure
    policy_units_kernel[(min(units, PROGRAMS),)](
        *(fields.get(name) for name in FIELDS), *rows, *totals, mean, through, own, units, *numbers[:4], numbers[6],
        surrogate, aggregate, dual_clip, correction, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return mean, through, own
