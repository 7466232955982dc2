"""The clipped-surrogate family: loss, gradients and metrics of a flat batch in one launch.

    loss = sum_i c_i [ w_i rho_i surrogate_i + beta KL_i - alpha H_i ]      as rlcore.algorithms.policy_loss states it

`policy_loss_kernel`: a program walks tiles of rows, writes d loss / d logp and d loss / d entropy, and adds what the
rows contribute to each metric, place by place of the tile. At its end it sums these over the tile into one row of
partial results, and counts itself. The program that finds all others counted adds all rows of partial results in
their order, in fp64, and writes the loss and all metrics. Which program that is depends on the machine; what it
computes does not. Where a sequence or a segment shares its ratio, one launch before this one
(kernels/policy_loss_units.py) leaves each row its unit's mean log-ratio and mean gradient.

Memory traffic: every field that is there once (4 bytes a row, masks 1), d logp and d entropy once where asked for, and
128 bytes of partial results per program: 21 to 37 bytes a row. A masked row is not loaded, so what it holds can not
matter. Bounds, coefficients and totals are numbers of the launch, not of the code, and so is the number of rows.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcore.kernels.policy_loss_metrics import ROOM, add_ratio, add_rollout, merge, places, store_partials
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

# A field begins anywhere (a chunk is cut at any row), so a thread loads single elements, side by side: 2 rows of a tile
# on NVIDIA, 1 on AMD. The fullest objectives take up to 108 registers on sm_90, 128 on sm_80 and sm_100: four programs
# to a processor, 1024 rows under way. With 4 rows a thread one took 187, two programs. Not measured.
TILE = 256
NUM_WARPS = 4
# Programs wanted of many rows: 132 processors hold all at once, and one program can add what they leave.
PROGRAMS = 512
# Tiles of a program at most, whose sums are float.
MOST_TILES = 64
# Programs whose partial results are read at once: 16 numbers a thread.
MERGED = 64


def policy_loss_kernel(
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
    counters_ptr,  # int32, of which one is 0 and this launch's own; the last program leaves it at 0
    loss_ptr,  # [] float32
    metrics_ptr,  # [of CHOSEN] float32
    turn,  # which counter
    n,
    tiles,  # of a program
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
    CHOSEN: tl.constexpr,  # bits of the metrics that are wanted
    TILE: tl.constexpr,
    MERGED: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * tiles * TILE + tl.arange(0, TILE)
    uniform = 0.0
    if coefficient_ptr is None:
        uniform = uniform_coefficient(tokens_ptr, sequences_ptr, length, AGGREGATE)
    zero = tl.zeros([TILE], dtype=tl.float32)
    least = tl.full([TILE], float("-inf"), dtype=tl.float32)
    by_ratio = (zero, zero, least, least, zero, zero, zero, zero, zero, zero, zero, zero)
    policy, kl, bonus, logps, entropies, ref_k1s, ref_k3s = zero, zero, zero, zero, zero, zero, zero
    by_rollout = (zero, zero, zero, zero, zero, zero, zero)
    for tile in range(tiles):
        row = first + tile * TILE
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
            coefficient = tl.where(keep, uniform, 0.0)

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
        by_ratio = add_ratio(
            by_ratio, keep, log_ratio, ratio, rest, advantage, floor, ceiling, dual_clip, SURROGATE, DUAL_CLIP
        )
        loss, by_log_ratio, by_logp = surrogate_term(
            logp, ratio, advantage, floor, ceiling, dual_clip, RATIO, SURROGATE, DUAL_CLIP
        )
        factor = coefficient
        if rollout_logp_ptr is not None:
            difference = old_logp - read(rollout_logp_ptr, row, keep)
            weight, over, rollout_k3 = behaviour_weight(difference, cap, CORRECTION)
            by_rollout = add_rollout(by_rollout, keep, difference, rollout_k3, weight, over, CORRECTION)
            if CORRECTION:
                factor *= weight
        if weight_ptr is not None:
            factor *= read(weight_ptr, row, keep)
        policy += factor * loss
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
            ref_k1s += ref_k1
            ref_k3s += ref_k3
            if ESTIMATOR != "":
                selected = kl_coefficient * tl.where(chosen, coefficient, 0.0)
                kl += selected * value
                d_logp += selected * slope
        logps += logp
        if entropy_ptr is not None:
            entropy = read(entropy_ptr, row, keep)
            entropies += entropy
            if ENTROPY:
                bonus -= entropy_coefficient * coefficient * entropy
        if d_logp_ptr is not None:
            tl.store(d_logp_ptr + row, tl.where(keep, d_logp, 0.0), mask=inside)
        if d_entropy_ptr is not None:
            tl.store(d_entropy_ptr + row, -entropy_coefficient * coefficient, mask=inside)

    out = partials_ptr + tl.program_id(0).to(tl.int64) * ROOM
    store_partials(
        out, by_ratio + (policy, kl, bonus, logps, entropies, ref_k1s, ref_k3s) + by_rollout, CHOSEN, TILE
    )
    # The one atomic, since a count can not be had without. It is of integers, and no result has it in it. It orders:
    # what any thread has stored before the barrier is seen by the program that finds all others counted.
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + turn, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(counters_ptr + turn, 0)
        merge(partials_ptr, tokens_ptr, loss_ptr, metrics_ptr, tl.num_programs(0), CHOSEN, MERGED)


# One compilation per structure and dtypes: neither where a field begins nor how many rows there are makes another.
FIELDS = ("logp", "entropy", "advantage", "old_logp", "ref_logp", "rollout_logp", "weight", "clip_low", "clip_high",
          "mask", "kl_mask", "coefficient", "mean", "through")  # fmt: skip
OTHERS = ("tokens", "sequences", "d_logp", "d_entropy", "partials", "counters", "loss", "metrics")
policy_loss_kernel = triton.jit(
    policy_loss_kernel, do_not_specialize=["turn", "n", "tiles"],
    do_not_specialize_on_alignment=[f"{name}_ptr" for name in (*FIELDS, *OTHERS)],
)  # fmt: skip

# Launches take turns with the counters of their device. Two that meet at one are TURNS launches apart, and disturb each
# other only if both run at the same moment: the first for as long as all those between them take to be made.
TURNS = 1 << 14
turns = itertools.count()
counters: dict[torch.device, Tensor] = {}
counters_made = threading.Lock()


def counter_of(device: torch.device) -> tuple[Tensor, int]:
    """Counters, and which of them is 0 and no other launch's for as long as this one runs.

    A CUDA graph runs again and again, whatever other launches have the turn it was captured with: it brings its own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device), 0
    with counters_made:
        if device not in counters:
            # torch.compile's CUDA graphs have what their thread allocates overwritten one day: another thread does it.
            with ThreadPoolExecutor(1) as other:
                counters[device] = other.submit(make_counters, device).result()
        return counters[device], next(turns) % TURNS


def make_counters(device: torch.device) -> Tensor:
    zeros = torch.zeros(TURNS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # once: launches on any stream find zeros
    return zeros


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
    tiles = min(triton.cdiv(n, TILE * PROGRAMS), MOST_TILES)
    programs = triton.cdiv(n, TILE * tiles)
    loss, metrics, partials = new(), new(len(names)), new(programs, ROOM.value)
    d_logp, d_entropy = new(n if needs[0] else 0), new(n if needs[1] else 0)
    shared, turn = counter_of(logp.device)
    policy_loss_kernel[(programs,)](
        *(fields.get(name) for name in FIELDS), *totals, d_logp if needs[0] else None, d_entropy if needs[1] else None,
        partials, shared, loss, metrics, turn, n, tiles, *numbers, *structure, places(*names).value,
        TILE=TILE, MERGED=MERGED, num_warps=NUM_WARPS,
    )  # fmt: skip
    return loss, metrics, d_logp, d_entropy
