"""The segments family in Triton, eagerly, where nothing asks for a gradient. Nothing waits for the GPU.

Everything else is for the callers, as in `segments_native`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms.segments import advantage_arguments
from rlcore.algorithms.segments_input import (
    check_floating,
    check_ids,
    count_segments,
    flat_mask,
    flat_offsets_of,
    result_dtype,
    wide,
)
from rlcore.ops import backend
from rlcore.ops.segments_native import axis_of


def runs(*tensors: object) -> bool:
    """Whether the kernels take these arguments: eagerly, and no tensor asks for a gradient."""
    if torch.compiler.is_compiling():
        return False
    given = [x for x in tensors if isinstance(x, Tensor)]
    needs = torch.is_grad_enabled()
    return (
        bool(given)
        and backend.runs_triton(given[0], backend.requested())
        and all(x.dim() == 0 or x.device == given[0].device for x in given)
        and not any(needs and x.requires_grad for x in given)
    )


class Rows(NamedTuple):
    """Flat values and their segments: `offsets` on a flat axis whose rows are the entries `order` of x; contiguous."""

    x: Tensor
    offsets: Tensor
    order: Tensor | None
    mask: Tensor | None

    def reduce(self, what: str, ddof: int = 1) -> Tensor:
        """ "sum", "mean", "std", "min", "max" or "count" of each segment."""
        from rlcore.kernels.segments import segment_reduce  # imports triton: only where it is used

        with torch.cuda.device_of(self.x):
            return segment_reduce(what, *self, ddof=ddof)

    def sizes(self) -> Tensor:
        return self.reduce("count")

    def rank(self) -> Tensor | None:
        """None for float64, whose values leave no room for the row in a key of 64 bits."""
        from rlcore.kernels.segments_rank import segment_rank

        with torch.cuda.device_of(self.x):
            return None if self.x.dtype == torch.float64 else segment_rank(*self)

    def topk(self, k: int) -> tuple[Tensor, Tensor] | None:
        from rlcore.kernels.segments_rank import segment_topk

        with torch.cuda.device_of(self.x):
            return None if self.x.dtype == torch.float64 else segment_topk(self.x, k, *self[1:])


def rows_of(
    x: Tensor, ids: Tensor | None, offsets: Tensor | None, num_segments: int | None, mask: Tensor | None
) -> Rows | None:
    """The arguments of a reduction; None where the kernels do not take them."""
    if not runs(x, ids, offsets, mask):
        return None
    check_floating("x", x)
    keep, order = flat_mask(mask, x, "x"), None
    if ids is not None and offsets is None:
        check_ids("ids", ids, x, "x (offsets are passed by keyword)")
        flat = ids.reshape(-1).to(torch.int64)
        count = count_segments(flat, keep, num_segments)
        if keep is not None:
            flat = flat.masked_fill(~keep, count)  # behind all segments
        ordered, order = flat.sort(stable=True)
        offsets, keep = torch.searchsorted(ordered, torch.arange(count + 1, device=x.device)), None
    elif ids is not None or num_segments is not None:
        return None
    elif offsets is not None:
        offsets = flat_offsets_of(x, offsets, "x").contiguous()
    elif x.dim() == 2:
        offsets = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
    else:
        return None
    return Rows(x.reshape(-1).contiguous(), offsets, order, keep)


@backend.on_device
def group_advantage(
    reward: Tensor, group: Tensor | None, center: str, scale: str, ddof: int, eps: float, weight: Tensor | None,
    mask: Tensor | None, spread: str,
) -> Tensor:  # fmt: skip
    """`rlcore.algorithms.segments.group_advantage`."""
    from rlcore.kernels import segments_advantage as kernels

    ids, w, keep = advantage_arguments(reward, group, center, scale, weight, mask, spread)
    r = reward.reshape(-1).contiguous()
    return kernels.group_advantage(
        r if r.is_floating_point() else wide(r), ids, center, scale, spread == "residual", float(ddof), float(eps), w,
        keep, result_dtype(reward),
    ).reshape(reward.shape)  # fmt: skip


# ---- reverse scans


class Time(NamedTuple):
    """The time axis of some [N] or [B, T] tensors: where sequences lie, which rows count, what follows the ends."""

    xs: tuple[Tensor, ...]
    sequences: int
    offsets: Tensor | None
    mask: Tensor | None
    bootstrap: Tensor | None

    def run(
        self, kind: str, gamma: float | Tensor, lam: float | Tensor = 1.0, log_rho_bar: float = 0.0,
        log_c_bar: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from rlcore.kernels.segments_scan import reverse_scan  # imports triton: only where it is used

        with torch.cuda.device_of(self.xs[0]):
            return reverse_scan(kind, *self, gamma, lam, log_rho_bar, log_c_bar)

    def scan(self, decay: float | Tensor) -> Tensor:
        return self.run("return", decay)[0]

    def gae(self, gamma: float | Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        return self.run("gae", gamma, lam)

    def vtrace(self, rho_bar: float, c_bar: float, gamma: float | Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        return self.run("vtrace", gamma, lam, math.log(rho_bar), math.log(c_bar))


def time_of(
    xs: tuple[Tensor, ...],
    offsets: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    coefficients: tuple[float | Tensor, ...],
) -> tuple[Time, tuple[float | Tensor, ...]] | None:
    """The time axis of `xs` and the coefficients made ready for it; None where the kernels do not take them."""
    given = [x for x in (*xs, offsets, mask, bootstrap, *coefficients) if isinstance(x, Tensor)]
    if not runs(*given) or any(x.dim() and x.dtype == torch.float64 for x in given):
        return None
    axis = axis_of(xs, offsets, mask, bootstrap, coefficients)
    if axis is None:
        return None
    ready = tuple(x.contiguous() for x in xs)
    count = xs[0].shape[0] if axis[0] is None else axis[0].shape[0] - 1
    time = Time(ready, count, *axis, None if bootstrap is None else bootstrap.contiguous())
    return time, tuple(c.contiguous() if isinstance(c, Tensor) else c for c in coefficients)
