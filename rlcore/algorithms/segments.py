"""Advantages: reductions over segments, normalization in chosen scopes, and reverse scans over ragged sequences.

A segment is a sequence (`offsets`, or a row of a padded [B, T]) or any set of rows with one integer id (group, turn,
step). Masked rows count nowhere, whatever they hold. Every deviation is taken from the mean, in float64: a mean of
squares minus a squared mean loses all digits where a group's rewards are alike (advantages of -2075 were seen).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms.segments_input import (
    check_ids,
    check_tensor,
    dense_ids,
    flat_mask,
    result_dtype,
    segments_of,
    values_can_be_read,
    wide,
)
from rlcore.algorithms.segments_scan import Advantages, discounted_return, gae, linear_scan, reverse_scan, vtrace

__all__ = [
    "Advantages",
    "TopK",
    "discounted_return",
    "gae",
    "group_advantage",
    "group_metrics",
    "linear_scan",
    "reverse_scan",
    "segment_count",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_rank",
    "segment_std",
    "segment_sum",
    "segment_topk",
    "vtrace",
    "whiten",
]

CENTERS = ("none", "group", "leave_one_out", "batch")
SCALES = ("none", "group", "batch")
SPREADS = ("reward", "residual")


class TopK(NamedTuple):
    """Largest values of each segment, [S, k] descending, and the flat rows they came from (-1: fewer than k rows)."""

    values: Tensor
    rows: Tensor


def segment_sum(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Sum of each segment: y[s] = sum of x[i] over its unmasked rows; an empty segment gives 0.

    Segments are given in one of three ways: `ids`, integers of x's shape (then y has num_segments entries; without it
    largest id + 1, which only works on CPU and outside torch.compile); `offsets` [S+1] for x [N]; neither, for the rows
    of x [B, T]. `mask` (bool or 0/1) has x's shape. Returns [S], float64 for float64 input and float32 for float32,
    bfloat16 and float16; sums are taken in float64. Differentiable. Raises TypeError or ValueError naming the argument;
    ids outside 0 .. num_segments-1 raise on CPU. Source: own.
    """
    s = segments_of(x, ids, offsets, num_segments, mask)
    return s.reduce_sum(s.x).to(result_dtype(x))


def segment_count(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Unmasked rows of each segment, [S] int64. Arguments and errors as in `segment_sum`; x gives the shape alone."""
    s = segments_of(x, ids, offsets, num_segments, mask)
    ones = torch.ones_like(s.ids)
    return ones.new_zeros(s.size + 1).index_add(0, s.ids, ones)[: s.size]


def segment_mean(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean of each segment's unmasked rows; an empty segment gives 0. Otherwise as `segment_sum`."""
    s = segments_of(x, ids, offsets, num_segments, mask)
    return (s.reduce_sum(s.x) / s.sizes().clamp(min=1)).to(result_dtype(x))


def segment_std(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
    ddof: int = 1,
) -> Tensor:
    """Standard deviation of each segment, two passes: sqrt(sum (x - mean)^2 / (n - ddof)).

    A segment with n <= ddof unmasked rows gives 0. Where it is 0 so is the gradient. Otherwise as `segment_sum`.
    """
    s = segments_of(x, ids, offsets, num_segments, mask)
    n = s.sizes()
    mean = s.reduce_sum(s.x) / n.clamp(min=1)
    squares = s.reduce_sum((wide(s.x) - s.spread_out(mean)) ** 2)
    return safe_sqrt(squares / (n - ddof).clamp(min=1)).masked_fill(n <= ddof, 0.0).to(result_dtype(x))


def segment_min(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Smallest value of each segment; an empty segment gives inf. Equal minima share the gradient. As `segment_sum`."""
    s = segments_of(x, ids, offsets, num_segments, mask)
    x = s.x.to(result_dtype(x))
    return x.new_full((s.size + 1,), torch.inf).scatter_reduce(0, s.ids, x, "amin")[: s.size]


def segment_max(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Largest value of each segment; an empty segment gives -inf. Equal maxima share the gradient. As `segment_sum`."""
    s = segments_of(x, ids, offsets, num_segments, mask)
    x = s.x.to(result_dtype(x))
    return x.new_full((s.size + 1,), -torch.inf).scatter_reduce(0, s.ids, x, "amax")[: s.size]


def segment_rank(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Place of each row in its segment, largest value first: 0, 1, ...; masked rows -1. int64 in x's shape.

    Equal values keep the order of their rows. `segment_rank(x) < k` selects the k largest, k fixed or different for
    each row (a share of its sequence's length, say). Arguments and errors as in `segment_sum`.
    """
    s = segments_of(x, ids, offsets, num_segments, mask)
    return ranks(s.x, s.ids, s.size).masked_fill(s.ids == s.size, -1).reshape(x.shape)


def segment_topk(
    x: Tensor,
    k: int,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> TopK:
    """The k largest values of each segment, descending, and their flat row numbers: (values, rows), [S, k] each.

    Where a segment has fewer than k unmasked rows the rest is -inf with row -1. Equal values keep the order of their
    rows. Differentiable in x through `values`. Other arguments and errors as in `segment_sum`.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an int >= 1; got {k!r}")
    s = segments_of(x, ids, offsets, num_segments, mask)
    n = s.x.shape[0]
    rank = ranks(s.x, s.ids, s.size)
    chosen = (rank < k) & (s.ids < s.size)
    slot = torch.where(chosen, s.ids * k + rank, torch.full_like(rank, s.size * k))
    row = torch.full((s.size * k + 1,), n, device=x.device).scatter(0, slot, torch.arange(n, device=x.device))
    row = row[:-1].reshape(s.size, k)
    values = s.x.to(result_dtype(x))
    return TopK(torch.cat((values, values.new_full((1,), -torch.inf)))[row], row.masked_fill(row == n, -1))


def ranks(x: Tensor, ids: Tensor, count: int) -> Tensor:
    """Place of each row among the rows of its id, by falling value; ids are 0 .. count. [N] int64"""
    by_value = x.detach().argsort(descending=True, stable=True)
    order = by_value[ids[by_value].argsort(stable=True)]
    ones = torch.ones_like(ids)
    sizes = ones.new_zeros(count + 1).index_add(0, ids, ones)
    place = torch.arange(ids.shape[0], device=x.device) - (sizes.cumsum(0) - sizes)[ids[order]]
    return torch.zeros_like(ids).scatter(0, order, place)


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0."""
    return x.masked_fill(x <= 0, 1.0).sqrt().masked_fill(x <= 0, 0.0)


class Scope(NamedTuple):
    """Weighted statistics of the rows that share an id; every result is spread back over the rows, [N]."""

    ids: Tensor
    size: int
    weight: Tensor

    def total(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.size).index_add(0, self.ids, x)[self.ids]

    def mean(self, x: Tensor) -> Tensor:
        weight = self.total(self.weight)
        return self.total(self.weight * x) / weight.masked_fill(weight <= 0, 1.0)

    def std(self, x: Tensor, ddof: int) -> Tensor:
        """1 where it is not defined (total weight <= ddof), so that dividing by it changes nothing."""
        free = self.total(self.weight) - ddof
        variance = self.total(self.weight * (x - self.mean(x)) ** 2) / free.masked_fill(free <= 0, 1.0)
        return safe_sqrt(variance).masked_fill(free <= 0, 1.0)


def group_advantage(
    reward: Tensor,
    group: Tensor | None = None,
    center: str = "group",
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    spread: str = "reward",
) -> Tensor:
    """Rewards against a baseline, on a scale: A[s] = (reward[s] - b[s]) / (sigma[s] + eps).

    b, by `center`:  "group"          sum_j w[j] reward[j] / sum_j w[j] over the group of s
                     "leave_one_out"  the same over the group without s; a group of one has A = 0
                     "batch"          the same over all;    "none"  0
    sigma, by `scale`:  "group", "batch"  sqrt(sum_j w[j] (reward[j] - mean)^2 / (sum_j w[j] - ddof)), its own mean;
                     "none": no division at all. spread="residual" takes reward - b in place of reward in it.
    A group of one is its own mean, so its advantage is 0 if centred on the group. Where sigma is not defined
    (sum w <= ddof) it is 1. A scope of equal rewards has sigma 0: centred elsewhere, its advantages grow with 1 / eps.

    GRPO is the default; Dr. GRPO scale="none"; RLOO center="leave_one_out", scale="none"; OPO that with center="group"
    and weight = response lengths; Lite PPO center="group", scale="batch" (spread="reward": the std of the raw rewards
    about the mean of the batch); REINFORCE++ with baseline scale="none", then `whiten` over the tokens.

    reward has any shape ([S], or [G, n]), floats or integers; group holds integer ids of that shape, any values in any
    order, needed by the scopes "group" and "leave_one_out"; weight (>= 0) counts a reward w times in every sum; masked
    rewards (unscored, NaN) count nowhere and have A = 0. Returns reward's shape, float64 for float64 input, else
    float32; statistics are two-pass in float64. Differentiable. Raises TypeError or ValueError naming the argument.
    Source: Shao et al. 2024 (DeepSeekMath, GRPO), Ahmadian et al. 2024 (RLOO), Hao et al. 2025 (OPO), Liu et al. 2025
    (Understanding R1-Zero, Dr. GRPO; Tricks or Traps, Lite PPO).
    """
    ids, given, keep = advantage_arguments(reward, group, center, scale, weight, mask, spread)
    r = wide(reward.reshape(-1))
    w = torch.ones_like(r) if given is None else given
    if keep is not None:
        r, w = r.masked_fill(~keep, 0.0), w.masked_fill(~keep, 0.0)
    scopes = {"batch": Scope(torch.zeros_like(r, dtype=torch.int64), 1, w)}
    if ids is not None:
        scopes["group"] = Scope(dense_ids(ids), r.shape[0], w)

    if center == "none":
        residual = r
    else:
        scope = scopes["batch" if center == "batch" else "group"]
        others = scope.total(w) - (w if center == "leave_one_out" else 0.0)
        # r[s] - (the mean of the others) is the deviation from the mean of all times total / (total - w[s]).
        factor = scope.total(w) / others.masked_fill(others <= 0, 1.0)
        residual = ((r - scope.mean(r)) * factor).masked_fill(others <= 0, 0.0)
    advantage = residual
    if scale != "none":
        advantage = residual / (scopes[scale].std(r if spread == "reward" else residual, ddof) + eps)
    if keep is not None:
        advantage = advantage.masked_fill(~keep, 0.0)
    return advantage.to(result_dtype(reward)).reshape(reward.shape)


def advantage_arguments(
    reward: Tensor, group: Tensor | None, center: str, scale: str, weight: Tensor | None, mask: Tensor | None,
    spread: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(ids int64 where a scope needs groups, weights float64, mask bool), [N] and contiguous, None where not given.

    Arguments and errors as in `group_advantage`.
    """
    check_choice("center", center, CENTERS)
    check_choice("scale", scale, SCALES)
    check_choice("spread", spread, SPREADS)
    check_tensor("reward", reward)
    keep = flat_mask(mask, reward, "reward")
    w = None if weight is None else weights(weight, reward, keep).contiguous()
    if "group" not in (center, scale) and center != "leave_one_out":
        return None, w, keep
    if group is None:
        raise ValueError(f"group: needed for center={center!r}, scale={scale!r}; got None")
    check_ids("group", group, reward, "reward")
    return group.reshape(-1).to(torch.int64).contiguous(), w, keep


def weights(weight: Tensor, reward: Tensor, keep: Tensor | None) -> Tensor:
    check_tensor("weight", weight, reward, "reward")
    w = weight.reshape(-1)
    if values_can_be_read(w):
        used = w if keep is None else w[keep]
        if not bool(((used >= 0) & used.isfinite()).all()):
            raise ValueError(f"weight: expected finite weights >= 0; got {used.min().item()} to {used.max().item()}")
    return wide(w)


def check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {given!r}")


def group_metrics(reward: Tensor, group: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """How many groups can teach: counts over unmasked rewards, as 0-d float32 tensors that merge by addition.

    "groups"; "groups_of_one", whose centred advantage is 0; "groups_constant", of two or more equal rewards, whose
    centred advantages are 0. Arguments and errors as in `group_advantage`. Source: own.
    """
    check_tensor("reward", reward)
    check_ids("group", group, reward, "reward")
    keep = flat_mask(mask, reward, "reward")
    r = wide(reward.reshape(-1))
    ids, n = dense_ids(group.reshape(-1)), r.shape[0]
    if keep is not None:
        ids = ids.masked_fill(~keep, n)
    sizes = r.new_zeros(n + 1).index_add(0, ids, torch.ones_like(r))[:n]
    low = r.new_full((n + 1,), torch.inf).scatter_reduce(0, ids, r, "amin")[:n]
    high = r.new_full((n + 1,), -torch.inf).scatter_reduce(0, ids, r, "amax")[:n]
    return {
        "groups": (sizes > 0).sum().float(),
        "groups_of_one": (sizes == 1).sum().float(),
        "groups_constant": ((sizes > 1) & (low == high)).sum().float(),
    }


def whiten(x: Tensor, mask: Tensor | None = None, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """Zero mean, unit variance over all unmasked entries: (x - mean) / sqrt(sum (x - mean)^2 / (n - ddof) + eps).

    x and mask in any one shape; eps is added to the variance, not to its root. Masked entries are 0 and count nowhere.
    n - ddof is taken as at least 1, so a single entry gives 0. Returns x's shape, float64 for float64 input
    and float32 otherwise; two-pass in float64. Differentiable. The statistics are those of what is passed: whiten the
    whole batch before it is split. Source: own; the token whitening of PPO and REINFORCE++ (Hu et al. 2025).
    """
    check_tensor("x", x)
    keep = flat_mask(mask, x, "x")
    flat = wide(x.reshape(-1))
    ones = torch.ones_like(flat)
    if keep is not None:
        flat, ones = flat.masked_fill(~keep, 0.0), ones.masked_fill(~keep, 0.0)
    n = ones.sum()
    deviation = (flat - flat.sum() / n.clamp(min=1)) * ones
    variance = (deviation**2).sum() / (n - ddof).clamp(min=1)
    return (deviation * torch.rsqrt(variance + eps)).to(result_dtype(x)).reshape(x.shape)
