"""The reverse scans of the segments family in Triton, eagerly, where nothing asks for a gradient: one launch each.

Everything else is for the callers, as in `segments_native`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.ops import backend
from rlcore.ops.segments_native import axis_of


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

        return reverse_scan(kind, *self, gamma, lam, log_rho_bar, log_c_bar)

    def scan(self, decay: float | Tensor) -> Tensor:
        return self.run("return", decay)[0]

    def gae(self, gamma: float | Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        return self.run("gae", gamma, lam)

    def vtrace(self, rho_bar: float, c_bar: float, gamma: float | Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        return self.run("vtrace", gamma, lam, math.log(rho_bar), math.log(c_bar))


def runs(*tensors: object) -> bool:
    """Whether the kernels take these arguments: eagerly, float32 or narrower, and no tensor asks for a gradient."""
    if torch.compiler.is_compiling():
        return False
    given = [x for x in tensors if isinstance(x, Tensor)]
    first, needs = given[0], torch.is_grad_enabled()
    fits = (x.dim() == 0 or (x.device == first.device and x.dtype != torch.float64) for x in given)
    return (
        backend.runs_triton(first, backend.requested())
        and all(fits)
        and not any(needs and x.requires_grad for x in given)
    )


def time_of(
    xs: tuple[Tensor, ...],
    offsets: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    coefficients: tuple[float | Tensor, ...],
) -> tuple[Time, tuple[float | Tensor, ...]] | None:
    """The time axis of `xs` and the coefficients made ready for it; None where the kernels do not take them."""
    if not isinstance(xs[0], Tensor) or not runs(*xs, offsets, mask, bootstrap, *coefficients):
        return None
    axis = axis_of(xs, offsets, mask, bootstrap, coefficients)
    if axis is None:
        return None
    ready = tuple(x.contiguous() for x in xs)
    count = xs[0].shape[0] if axis[0] is None else axis[0].shape[0] - 1
    time = Time(ready, count, *axis, None if bootstrap is None else bootstrap.contiguous())
    return time, tuple(c.contiguous() if isinstance(c, Tensor) else c for c in coefficients)
