"""The segments family with its backends: the functions of `rlcore.algorithms.segments`, on the fastest code there is.

Eagerly, where nothing asks for a gradient, each of them is one C++ call on the CPU (`segments_native`) and one to a few
launches on a GPU (`segments_triton`). Where a gradient is asked for, or torch.compile traces, two
have forms of their own: `segment_sum` over offsets (and `segment_mean` made of it) runs in C++ on the CPU and in Triton
on CUDA, and the reverse scan is one custom op in C++ or Triton, whose gradient is another reverse scan. torch.compile
looks into neither, so that a new length never recompiles. The rest is plain torch, as all of them are inside
`rl.backend("reference")`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlcore.algorithms import segments as reference
from rlcore.algorithms.segments import Advantages, TopK, group_metrics, whiten
from rlcore.algorithms.segments_input import check_floating, flat_mask, flat_offsets_of, result_dtype
from rlcore.algorithms.segments_scan import Scan
from rlcore.layout import sequence_id
from rlcore.ops import backend
from rlcore.ops import segments_cuda as cuda
from rlcore.ops import segments_native as native
from rlcore.ops import segments_triton as triton

__all__ = [
    "Advantages",
    "TopK",
    "discounted_return",
    "gae",
    "group_advantage",
    "group_metrics",
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


def _rows_of(*arguments: Any) -> native.Rows | triton.Rows | None:
    """The arguments of a reduction for C++ or Triton; None where they are for the reference."""
    return native.rows_of(*arguments) or triton.rows_of(*arguments)


# ---- segment sums over offsets


def _native_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """x [N] float32 or float64 on the CPU, any stride >= 0; offsets [S+1] checked."""
    module = backend.native()
    assert module is not None
    offsets = offsets.contiguous()
    y = torch.empty(offsets.shape[0] - 1, dtype=x.dtype)
    module.segment_sum(
        x.data_ptr(), x.stride(0), offsets.data_ptr(), y.shape[0], y.data_ptr(), str(x.dtype).removeprefix("torch.")
    )
    return y


@torch.library.custom_op("rlcore::segment_sum", mutates_args=())
@backend.on_device
def _segment_sum(x: Tensor, offsets: Tensor, mask: Tensor | None, requested: str) -> Tensor:
    """The raw sum of each segment of x [N]: no gradient, no checks. `requested` is the backend, "" for the fastest."""
    dtype = result_dtype(x)
    if backend.runs_triton(x, requested):
        from rlcore.kernels.segments import segment_reduce  # imports triton: only where it is used

        return segment_reduce("sum", x, offsets, mask=mask)
    if requested in ("", "native") and x.device.type == "cpu" and backend.native() is not None:
        x = x.to(dtype)
        return _native_sum(x if mask is None else x.masked_fill(~mask, 0.0), offsets)
    return reference.segment_sum(x, offsets=offsets, mask=mask)


@_segment_sum.register_fake
def _(x: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    return x.new_empty((offsets.shape[0] - 1,), dtype=result_dtype(x))


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, mask: Tensor | None, requested: str) -> Tensor:
        ctx.save_for_backward(offsets, mask)
        ctx.rows, ctx.dtype = x.shape[0], x.dtype
        return _segment_sum(x, offsets, mask, requested)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        offsets, mask = ctx.saved_tensors
        rows = grad[sequence_id(offsets, ctx.rows)]
        if mask is not None:
            rows = rows.masked_fill(~mask, 0.0)
        return rows.to(ctx.dtype), None, None, None


def segment_sum(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    if offsets is None and (rows := _rows_of(x, ids, offsets, num_segments, mask)) is not None:
        return rows.reduce("sum")
    if backend.requested() == "reference" or offsets is None or ids is not None or num_segments is not None:
        return reference.segment_sum(x, ids, offsets=offsets, num_segments=num_segments, mask=mask)
    check_floating("x", x)
    flat_offsets_of(x, offsets, "x")
    return _SegmentSum.apply(x, offsets, flat_mask(mask, x, "x"), backend.requested() or "")


def segment_mean(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    if (rows := _rows_of(x, ids, offsets, num_segments, mask)) is not None:
        return rows.reduce("mean")
    if backend.requested() == "reference" or offsets is None or ids is not None or num_segments is not None:
        return reference.segment_mean(x, ids, offsets=offsets, num_segments=num_segments, mask=mask)
    count = offsets.diff() if mask is None else segment_count(x, offsets=offsets, mask=mask)
    return segment_sum(x, offsets=offsets, mask=mask) / count.clamp(min=1)


# ---- other reductions


def segment_std(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
    ddof: int = 1,
) -> Tensor:
    if (rows := _rows_of(x, ids, offsets, num_segments, mask)) is not None:
        return rows.reduce("std", ddof)
    return reference.segment_std(x, ids, offsets=offsets, num_segments=num_segments, mask=mask, ddof=ddof)


def segment_min(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    if (rows := _rows_of(x, ids, offsets, num_segments, mask)) is not None:
        return rows.reduce("min")
    return reference.segment_min(x, ids, offsets=offsets, num_segments=num_segments, mask=mask)


def segment_max(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    if (rows := _rows_of(x, ids, offsets, num_segments, mask)) is not None:
        return rows.reduce("max")
    return reference.segment_max(x, ids, offsets=offsets, num_segments=num_segments, mask=mask)


def segment_count(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    if (rows := _rows_of(x.detach(), ids, offsets, num_segments, mask)) is not None:
        return rows.sizes()
    return reference.segment_count(x, ids, offsets=offsets, num_segments=num_segments, mask=mask)


def segment_rank(
    x: Tensor,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    if (rows := _rows_of(x.detach(), ids, offsets, num_segments, mask)) and (rank := rows.rank()) is not None:
        return rank.reshape(x.shape)
    return reference.segment_rank(x, ids, offsets=offsets, num_segments=num_segments, mask=mask)


def segment_topk(
    x: Tensor,
    k: int,
    ids: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_segments: int | None = None,
    mask: Tensor | None = None,
) -> TopK:
    good = isinstance(k, int) and not isinstance(k, bool) and k >= 1
    if good and (rows := _rows_of(x, ids, offsets, num_segments, mask)) and (found := rows.topk(k)) is not None:
        return TopK(*found)
    return reference.segment_topk(x, k, ids, offsets=offsets, num_segments=num_segments, mask=mask)


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
    if native.runs(reward, group, weight, mask):
        return native.group_advantage(reward, group, center, scale, ddof, eps, weight, mask, spread)
    if triton.runs(reward, group, weight, mask):
        return triton.group_advantage(reward, group, center, scale, ddof, eps, weight, mask, spread)
    if (found := cuda.group_advantage(reward, group, center, scale, ddof, eps, weight, mask, spread)) is not None:
        return found
    return reference.group_advantage(reward, group, center, scale, ddof, eps, weight, mask, spread=spread)


# ---- reverse scans


@torch.library.custom_op("rlcore::reverse_scan", mutates_args=())
@backend.on_device
def _reverse_scan(
    delta: Tensor, decay: Tensor, last: Tensor, in_cpp: bool = False, requested: str = "reference"
) -> Tensor:
    """The raw recurrence y[i] = delta[i] + decay[i] * y[i+1], cut after rows that are `last`. [N] each"""
    if backend.runs_triton(delta, requested):
        from rlcore.kernels.segments_linear import linear_scan

        return linear_scan(delta, decay, last)
    if in_cpp and delta.dtype == decay.dtype == torch.float64 and backend.native() is not None:
        return native.linear_scan(delta, decay, last)
    return reference.linear_scan(delta, decay, last)


@_reverse_scan.register_fake
def _(delta: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(delta, memory_format=torch.contiguous_format)


class _ReverseScan(torch.autograd.Function):
    """The adjoint of the recurrence is the same recurrence in the other direction, so it can be differentiated again.

    g_delta[i] = g[i] + decay[i-1] * g_delta[i-1],    g_decay[i] = g_delta[i] * y[i+1]
    """

    @staticmethod
    def forward(ctx: Any, delta: Tensor, decay: Tensor, last: Tensor, in_cpp: bool, requested: str) -> Tensor:
        y = _reverse_scan(delta, decay, last, in_cpp, requested)
        ctx.save_for_backward(decay, last, y)
        ctx.where = in_cpp, requested
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:  # type: ignore[override]
        decay, last, y = ctx.saved_tensors
        n = decay.shape[0]
        # The row before i in time comes after it in the reversed order, and carries the decay of its own row.
        before = torch.cat((decay.new_zeros(1), decay[:-1]))[:n]
        first = torch.cat((last.new_ones(1), last[:-1]))[:n]
        g = _ReverseScan.apply(grad.flip(0), before.flip(0), first.flip(0), *ctx.where).flip(0)
        if not ctx.needs_input_grad[1]:
            return g, None, None, None, None
        after = torch.cat((y[1:], y.new_zeros(1)))[:n].masked_fill(last, 0.0)
        return g, g * after, None, None, None


def _scan_for(*inputs: Tensor) -> Scan:
    """The differentiable scan for functions of these inputs."""
    if backend.requested() == "reference":
        return reference.linear_scan
    in_cpp = native.native_scans(*inputs)
    requested = backend.requested() or ""
    return lambda delta, decay, last: _ReverseScan.apply(delta, decay, last, in_cpp, requested)


def _time_of(
    xs: tuple[Tensor, ...], *arguments: Any
) -> tuple[native.Time | triton.Time | cuda.Time, tuple[float | Tensor, ...]] | None:
    """The arguments of a scan for one call of C++ or one launch; None where they are for the reference."""
    return native.time_of(xs, *arguments) or triton.time_of(xs, *arguments) or cuda.time_of(xs, *arguments)


def reverse_scan(
    delta: Tensor,
    decay: float | Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    if (ready := _time_of((delta,), offsets, mask, bootstrap, (decay,))) is not None:
        return ready[0].scan(*ready[1])
    return reference.reverse_scan(delta, decay, offsets, mask, bootstrap, scan=_scan_for(delta))


def gae(
    reward: Tensor,
    value: Tensor,
    offsets: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Advantages:
    if (ready := _time_of((reward, value), offsets, mask, bootstrap, (gamma, lam))) is not None:
        return Advantages(*ready[0].gae(*ready[1]))
    return reference.gae(reward, value, offsets, gamma, lam, mask, bootstrap, scan=_scan_for(reward, value))


def discounted_return(
    reward: Tensor,
    offsets: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    if (ready := _time_of((reward,), offsets, mask, bootstrap, (gamma,))) is not None:
        return ready[0].scan(*ready[1])
    return reference.discounted_return(reward, offsets, gamma, mask, bootstrap, scan=_scan_for(reward))


def vtrace(
    reward: Tensor,
    value: Tensor,
    log_ratio: Tensor,
    offsets: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Advantages:
    xs = (reward, value, log_ratio)
    bounded = rho_bar > 0 and c_bar > 0
    if bounded and (ready := _time_of(xs, offsets, mask, bootstrap, (gamma, lam))) is not None:
        return Advantages(*ready[0].vtrace(rho_bar, c_bar, *ready[1]))
    return reference.vtrace(*xs, offsets, gamma, lam, rho_bar, c_bar, mask, bootstrap, scan=_scan_for(*xs))


for _function in (
    segment_sum, segment_mean, segment_std, segment_min, segment_max, segment_count, segment_rank, segment_topk,
    group_advantage, reverse_scan, gae, discounted_return, vtrace,
):  # fmt: skip
    _function.__doc__ = getattr(reference, _function.__name__).__doc__
