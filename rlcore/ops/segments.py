"""The segments family with its backends: the functions of `rlcore.algorithms.segments`, on the fastest code there is.

Two of them have forms of their own. `segment_sum` over offsets (and `segment_mean` made of it) runs in C++ on the CPU
and in Triton on CUDA. The reverse scan is one custom op, which torch.compile does not look into, so that a new length
never recompiles; its gradient is another reverse scan. Inside `rl.backend("reference")` all are plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlcore.algorithms import segments as reference
from rlcore.algorithms.segments import (
    Advantages,
    TopK,
    group_advantage,
    group_metrics,
    segment_count,
    segment_max,
    segment_min,
    segment_rank,
    segment_std,
    segment_topk,
    whiten,
)
from rlcore.algorithms.segments_input import check_floating, flat_mask, flat_offsets_of, result_dtype
from rlcore.layout import sequence_id
from rlcore.ops import backend

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
def _segment_sum(x: Tensor, offsets: Tensor, mask: Tensor | None, requested: str) -> Tensor:
    """The raw sum of each segment of x [N]: no gradient, no checks. `requested` is the backend, "" for the fastest."""
    dtype = result_dtype(x)
    if requested in ("", "triton") and x.is_cuda and backend.backends()["triton"] == "live":
        from rlcore.kernels.segments import segment_sum_count  # imports triton: only where it is used

        return segment_sum_count(x, offsets, mask)[0]
    if requested in ("", "native") and x.device.type == "cpu" and backend.native() is not None:
        x = x.to(dtype)
        return _native_sum(x if mask is None else x.masked_fill(~mask, 0.0), offsets)
    return reference.segment_sum(x, offsets=offsets, mask=mask)


@_segment_sum.register_fake
def _(x: Tensor, offsets: Tensor, mask: Tensor | None, requested: str) -> Tensor:
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
    if backend.requested() == "reference" or offsets is None or ids is not None or num_segments is not None:
        return reference.segment_mean(x, ids, offsets=offsets, num_segments=num_segments, mask=mask)
    count = offsets.diff() if mask is None else segment_count(x, offsets=offsets, mask=mask)
    return segment_sum(x, offsets=offsets, mask=mask) / count.clamp(min=1)


# ---- reverse scans


@torch.library.custom_op("rlcore::reverse_scan", mutates_args=())
def _reverse_scan(delta: Tensor, decay: Tensor, last: Tensor) -> Tensor:
    """The raw recurrence y[i] = delta[i] + decay[i] * y[i+1], cut after rows that are `last`. [N] each"""
    return reference.linear_scan(delta, decay, last)


@_reverse_scan.register_fake
def _(delta: Tensor, decay: Tensor, last: Tensor) -> Tensor:
    return torch.empty_like(delta, memory_format=torch.contiguous_format)


class _ReverseScan(torch.autograd.Function):
    """The adjoint of the recurrence is the same recurrence in the other direction, so it can be differentiated again.

    g_delta[i] = g[i] + decay[i-1] * g_delta[i-1],    g_decay[i] = g_delta[i] * y[i+1]
    """

    @staticmethod
    def forward(ctx: Any, delta: Tensor, decay: Tensor, last: Tensor) -> Tensor:
        y = _reverse_scan(delta, decay, last)
        ctx.save_for_backward(decay, last, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        decay, last, y = ctx.saved_tensors
        n = decay.shape[0]
        # The row before i in time comes after it in the reversed order, and carries the decay of its own row.
        before = torch.cat((decay.new_zeros(1), decay[:-1]))[:n]
        first = torch.cat((last.new_ones(1), last[:-1]))[:n]
        g = _ReverseScan.apply(grad.flip(0), before.flip(0), first.flip(0)).flip(0)
        if not ctx.needs_input_grad[1]:
            return g, None, None
        after = torch.cat((y[1:], y.new_zeros(1)))[:n].masked_fill(last, 0.0)
        return g, g * after, None


def _scan(delta: Tensor, decay: Tensor, last: Tensor) -> Tensor:
    if backend.requested() == "reference":
        return reference.linear_scan(delta, decay, last)
    return _ReverseScan.apply(delta, decay, last)


def reverse_scan(
    delta: Tensor,
    decay: float | Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    return reference.reverse_scan(delta, decay, offsets, mask, bootstrap, scan=_scan)


def gae(
    reward: Tensor,
    value: Tensor,
    offsets: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Advantages:
    return reference.gae(reward, value, offsets, gamma, lam, mask, bootstrap, scan=_scan)


def discounted_return(
    reward: Tensor,
    offsets: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    return reference.discounted_return(reward, offsets, gamma, mask, bootstrap, scan=_scan)


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
    return reference.vtrace(reward, value, log_ratio, offsets, gamma, lam, rho_bar, c_bar, mask, bootstrap, scan=_scan)


for _function in (segment_sum, segment_mean, reverse_scan, gae, discounted_return, vtrace):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__
