"""Rewards against a baseline, on a scale, from the statistics of their scopes (`segment_reduce`, kind "scope"):

    residual[i] = (x[i] - mean) * W / (W - w[i] if leave-one-out else W),    A[i] = residual[i] / (sigma + eps)

Element by element, in float64 as the reference; one launch of one program per BLOCK rewards, which reads a reward, its
weight, mask and scopes once and three numbers of each scope. Statistics of one scope take two launches more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlcore.kernels.segments import positive_or_1, segment_reduce, widened

# A batch has some thousand rewards: few programs, whatever the block.
BLOCK = tl.constexpr(256)
NUM_WARPS = 4


@triton.jit
def scope_of(group_ptr, row, keep, n, BATCH: tl.constexpr):
    """(scope of each row, scopes): there is room for as many groups as rewards, so that nobody has to count them."""
    if BATCH:
        scope, scopes = row * 0, 1
    else:
        scope, scopes = tl.load(group_ptr + row, mask=keep, other=0), n.to(tl.int64)
    return scope, scopes


def advantage_kernel(
    x_ptr,  # [n] floats
    weight_ptr,  # [n] floats, or None for 1
    mask_ptr,  # [n] bool, or None
    group_ptr,  # [n] int64, groups as 0, 1, ...; or None
    center_ptr,  # [3, scopes] float64
    scale_ptr,  # [3, scopes] float64, or None
    out_ptr,  # [n]
    n,
    eps,
    CENTER: tl.constexpr,  # as in group_advantage
    SCALE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    keep = inside
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
    y = widened(tl.load(x_ptr + row, mask=keep, other=0.0))
    if CENTER != "none":
        scope, scopes = scope_of(group_ptr, row, keep, n, CENTER == "batch")
        total = tl.load(center_ptr + scope, mask=keep, other=0.0)
        others = total
        if CENTER == "leave_one_out":
            weight = keep.to(tl.float64)
            if weight_ptr is not None:
                weight = widened(tl.load(weight_ptr + row, mask=keep, other=0.0))
            others = total - weight
        # The mean of the others is as far from a reward as the mean of all, times total / others.
        away = (y - tl.load(center_ptr + scopes + scope, mask=keep, other=0.0)) * (total / positive_or_1(others))
        y = tl.where(others <= 0, 0.0, away)
    if SCALE != "none":
        scope, scopes = scope_of(group_ptr, row, keep, n, SCALE == "batch")
        y = y / (tl.load(scale_ptr + 2 * scopes + scope, mask=keep, other=0.0) + eps)
    tl.store(out_ptr + row, tl.where(keep, y, 0.0), mask=inside)


POINTERS = [f"{name}_ptr" for name in ("x", "weight", "mask", "group", "center", "scale", "out")]
advantage_kernel = triton.jit(advantage_kernel, do_not_specialize=["n"], do_not_specialize_on_alignment=POINTERS)


def group_advantage(
    x: Tensor,
    group: Tensor | None,
    center: str,
    scale: str,
    residual_spread: bool,
    ddof: float,
    eps: float,
    weight: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`rlcore.algorithms.segments.group_advantage` of x [n], floats; weight like x; mask bool; group [n] int64, needed
    by the scopes "group" and "leave_one_out". All contiguous; [n] of `dtype`. Waits for nothing: groups are told apart
    by a sort, and there are at most n."""
    n = x.shape[0]
    index = order = None
    ends = {"batch": torch.arange(2, device=x.device) * n}
    if group is not None:
        ordered, order = group.sort(stable=True)
        dense = torch.cat((order.new_zeros(1), (ordered[1:] != ordered[:-1]).cumsum(0)))[:n]
        index = torch.zeros_like(order).scatter(0, order, dense)
        ends["group"] = torch.searchsorted(dense, torch.arange(n + 1, device=x.device))

    def statistics(x: Tensor, scope: str) -> Tensor:
        by_group = scope == "group"
        return segment_reduce("scope", x, ends[scope], order if by_group else None, mask, weight, ddof)

    def launch(x: Tensor, center: str, scale: str, dtype: torch.dtype) -> Tensor:
        found = {}
        for scope in {"group" if center == "leave_one_out" else center, scale} - {"none"}:
            found[scope] = statistics(x, scope)
        out = torch.empty(n, dtype=dtype, device=x.device)
        advantage_kernel[(triton.cdiv(n, BLOCK.value),)](
            x, weight, mask, index, found.get("group" if center == "leave_one_out" else center), found.get(scale), out,
            n, eps, CENTER=center, SCALE=scale, num_warps=NUM_WARPS,
        )  # fmt: skip
        return out

    if n == 0:
        return torch.empty(0, dtype=dtype, device=x.device)
    if residual_spread and center != "none" and scale != "none":
        return launch(launch(x, center, "none", torch.float64), "none", scale, dtype)
    return launch(x, center, scale, dtype)
