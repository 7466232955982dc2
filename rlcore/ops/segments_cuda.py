"""Scans and advantages in CUDA C++ (csrc/cuda/segments.cu) for `rl.backend("cuda")`, where nothing needs a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms.segments import advantage_arguments
from rlcore.algorithms.segments_input import result_dtype
from rlcore.ops import backend
from rlcore.ops.segments_native import NAMES, address, axis_of

Coefficient = float | Tensor


def runs(*tensors: object) -> bool:
    """Whether the kernels take these arguments: eagerly, all on their device, and no tensor asks for a gradient."""
    if torch.compiler.is_compiling():
        return False
    needs = torch.is_grad_enabled()
    return all(backend.runs_cuda(x) and not (needs and x.requires_grad) for x in tensors if isinstance(x, Tensor))


def group_advantage(
    reward: Tensor, group: Tensor | None, center: str, scale: str, ddof: int, eps: float, weight: Tensor | None,
    mask: Tensor | None, spread: str,
) -> Tensor | None:  # fmt: skip
    """`rlcore.algorithms.segments.group_advantage` in one launch; None where there are too many rewards for it."""
    if not runs(reward, group, weight, mask) or reward.numel() > backend.cuda().MOST_REWARDS:
        return None
    ids, w, keep = advantage_arguments(reward, group, center, scale, weight, mask, spread)
    r = reward.reshape(-1).to(torch.float64).contiguous()

    def launch(x: Tensor, center: str, scale: str, of_residual: bool) -> Tensor:
        out = torch.empty_like(r)
        with torch.cuda.device_of(x):
            backend.cuda().group_advantage(
                address(x), address(ids), address(w), address(keep), x.shape[0], center, scale, of_residual,
                float(ddof), float(eps), address(out), backend.cuda_stream(x),
            )  # fmt: skip
        return out

    if spread == "residual" and scale == "batch" and center in ("group", "leave_one_out"):
        # The deviation of all residuals waits for the centres of all groups.
        out = launch(launch(r, center, "none", False), "none", "batch", False)
    else:
        out = launch(r, center, scale, spread == "residual")
    return out.to(result_dtype(reward)).reshape(reward.shape)


class Time(NamedTuple):
    """The time axis of some [N] or [B, T] tensors, as in `segments_native`."""

    xs: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype
    offsets: Tensor
    mask: Tensor | None
    bootstrap: Tensor | None

    def coefficient(self, c: Coefficient) -> tuple[int, int, float]:
        if isinstance(c, Tensor):
            return (address(c), c.dim() and 1, 0.0) if c.dim() or c.is_cuda else (0, 0, float(c))
        return 0, 0, float(c)

    def launch(self, kind: str, coefficients: tuple[Coefficient, ...], outputs: int, bounds: tuple[float, float]):  # type: ignore[no-untyped-def]
        x = self.xs[0]
        out = tuple(torch.empty(self.shape, dtype=self.dtype, device=x.device) for _ in range(outputs))
        with torch.cuda.device_of(x):
            backend.cuda().scan(
                kind, [*map(address, self.xs)], [*map(self.coefficient, coefficients)], [*map(address, out)], bounds,
                x.numel(), address(self.offsets), self.offsets.shape[0] - 1, address(self.mask),
                address(self.bootstrap), NAMES[self.dtype], backend.cuda_stream(x),
            )  # fmt: skip
        return out

    def scan(self, decay: Coefficient) -> Tensor:
        return self.launch("scan", (decay,), 1, (1.0, 1.0))[0]

    def gae(self, gamma: Coefficient, lam: Coefficient) -> tuple[Tensor, Tensor]:
        return self.launch("gae", (gamma, lam), 2, (1.0, 1.0))

    def vtrace(
        self, rho_bar: float, c_bar: float, gamma: Coefficient, lam: Coefficient
    ) -> tuple[Tensor, Tensor]:
        return self.launch("vtrace", (gamma, lam), 2, (rho_bar, c_bar))


def time_of(
    xs: tuple[Tensor, ...],
    offsets: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    coefficients: tuple[Coefficient, ...],
) -> tuple[Time, tuple[Coefficient, ...]] | None:
    """The time axis of `xs` and the coefficients made ready for it; None where the kernels do not take them."""
    per_row = [c for c in coefficients if isinstance(c, Tensor) and c.dim()]
    if not runs(*xs, offsets, mask, bootstrap, *per_row):
        return None
    axis = axis_of(xs, offsets, mask, bootstrap, coefficients)
    if axis is None:
        return None
    (offsets, keep), first, dtype = axis, xs[0], result_dtype(*xs)
    if offsets is None:
        offsets = torch.arange(first.shape[0] + 1, device=first.device) * first.shape[1]
    ready = tuple(x.to(dtype).contiguous() for x in xs)
    after = None if bootstrap is None else bootstrap.to(dtype).contiguous()
    time = Time(ready, first.shape, dtype, offsets, keep, after)
    return time, tuple(c.to(dtype).contiguous() if isinstance(c, Tensor) else c for c in coefficients)
