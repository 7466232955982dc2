"""The segments family in C++, eagerly on the CPU where nothing asks for a gradient.

Everything else is for the callers: each function here says None, or `runs` says False, and they take the differentiable
form, which also raises for arguments that do not fit.
"""

from __future__ import annotations

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
)
from rlcore.ops import backend

# Rows from which it pays to ask whether ids are in rising order: then they are as good as offsets.
SORTED_FROM = 1 << 14
NAMES = {torch.float32: "float32", torch.float64: "float64"}


def runs(*tensors: object) -> bool:
    """Whether the C++ code takes these arguments: on the CPU, eagerly, and no tensor asks for a gradient."""
    if torch.compiler.is_compiling() or backend.requested() not in (None, "native") or backend.native() is None:
        return False
    needs = torch.is_grad_enabled()
    return all(x.device.type == "cpu" and not (needs and x.requires_grad) for x in tensors if isinstance(x, Tensor))


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class Rows(NamedTuple):
    """Flat values and their segments, by offsets or by ids; tensors are contiguous."""

    x: Tensor
    offsets: Tensor | None
    ids: Tensor | None
    mask: Tensor | None
    size: int

    def layout(self) -> tuple[int, int, int, int, int]:
        return address(self.offsets), address(self.ids), address(self.mask), self.x.shape[0], self.size

    def reduce(self, what: str, ddof: int = 1) -> Tensor:
        """ "sum", "mean", "std", "min" or "max" of each segment."""
        out = torch.empty(self.size, dtype=self.x.dtype)
        backend.native().segment_reduce(  # type: ignore[union-attr]
            what, address(self.x), *self.layout(), ddof, address(out), NAMES[out.dtype], torch.get_num_threads()
        )
        return out

    def sizes(self) -> Tensor:
        out = torch.empty(self.size, dtype=torch.int64)
        backend.native().segment_count(*self.layout(), address(out), torch.get_num_threads())  # type: ignore[union-attr]
        return out

    def rank(self) -> Tensor:
        out = torch.empty(self.x.shape[0], dtype=torch.int64)
        backend.native().segment_rank(  # type: ignore[union-attr]
            address(self.x), *self.layout(), address(out), NAMES[self.x.dtype], torch.get_num_threads()
        )
        return out

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        values, rows = torch.empty(self.size, k, dtype=self.x.dtype), torch.empty(self.size, k, dtype=torch.int64)
        backend.native().segment_topk(  # type: ignore[union-attr]
            address(self.x), *self.layout(), k, address(values), address(rows), NAMES[self.x.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        return values, rows


def rows_of(
    x: Tensor, ids: Tensor | None, offsets: Tensor | None, num_segments: int | None, mask: Tensor | None
) -> Rows | None:
    """The arguments of a reduction; None where the C++ code does not take them."""
    if not runs(x, ids, offsets, mask):
        return None
    check_floating("x", x)
    keep = flat_mask(mask, x, "x")
    rows = None
    if ids is not None and offsets is None:
        check_ids("ids", ids, x, "x (offsets are passed by keyword)")
        rows = ids.reshape(-1).to(torch.int64).contiguous()
        count = count_segments(rows, keep, num_segments)
        if keep is None and rows.shape[0] >= SORTED_FROM and bool((rows[1:] >= rows[:-1]).all()):
            # The same rows in the same order by one thread each: the same bits, from several threads.
            offsets, rows = torch.searchsorted(rows, torch.arange(count + 1)), None
    elif ids is not None or num_segments is not None:
        return None
    elif offsets is not None:
        offsets = flat_offsets_of(x, offsets, "x").contiguous()
        count = offsets.shape[0] - 1
    elif x.dim() == 2:
        count = x.shape[0]
        offsets = torch.arange(count + 1) * x.shape[1]
    else:
        return None
    flat = x.reshape(-1).to(result_dtype(x)).contiguous()
    return Rows(flat, offsets, rows, keep, count)


def group_advantage(
    reward: Tensor, group: Tensor | None, center: str, scale: str, ddof: int, eps: float, weight: Tensor | None,
    mask: Tensor | None, spread: str,
) -> Tensor:  # fmt: skip
    """`rlcore.algorithms.segments.group_advantage` in one call."""
    ids, w, keep = advantage_arguments(reward, group, center, scale, weight, mask, spread)
    r = reward.reshape(-1).to(torch.float64).contiguous()
    out = torch.empty_like(r)
    backend.native().group_advantage(  # type: ignore[union-attr]
        address(r), address(ids), address(w), address(keep), r.shape[0], center, scale, spread == "residual",
        float(ddof), float(eps), address(out),
    )  # fmt: skip
    return out.to(result_dtype(reward)).reshape(reward.shape)


class Time(NamedTuple):
    """The time axis of some [N] or [B, T] tensors: where sequences lie, which rows count, what follows the ends."""

    xs: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype
    offsets: Tensor
    mask: Tensor | None
    bootstrap: Tensor | None

    def per_row(self, c: float | Tensor) -> tuple[int, float]:
        """A coefficient as the address of one number per row, or 0 and the number."""
        if isinstance(c, Tensor):
            return (address(c), 0.0) if c.dim() > 0 else (0, float(c))
        return 0, float(c)

    def end(self, *out: Tensor) -> tuple[int | str, ...]:
        """The arguments that all scans end with."""
        return (
            address(self.offsets), self.offsets.shape[0] - 1, out[0].numel(), address(self.mask),
            address(self.bootstrap), *map(address, out), NAMES[self.dtype], torch.get_num_threads(),
        )  # fmt: skip

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)

    def scan(self, decay: float | Tensor) -> Tensor:
        y = self.empty()
        backend.native().reverse_scan(address(self.xs[0]), *self.per_row(decay), *self.end(y))  # type: ignore[union-attr]
        return y

    def gae(self, gamma: float | Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        out = self.empty(), self.empty()
        backend.native().gae(  # type: ignore[union-attr]
            *map(address, self.xs), *self.per_row(gamma), *self.per_row(lam), *self.end(*out)
        )
        return out

    def vtrace(self, rho_bar: float, c_bar: float, gamma: float | Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
        out = self.empty(), self.empty()
        backend.native().vtrace(  # type: ignore[union-attr]
            *map(address, self.xs), *self.per_row(gamma), *self.per_row(lam), rho_bar, c_bar, *self.end(*out)
        )
        return out


def native_scans(*xs: object) -> bool:
    """Whether scans of these tensors run in C++: float32 results, or float64 where the backend is asked for by name.

    float64 is there to check with: by itself it keeps the reference's order of additions, to the last bit.
    """
    tensors = [x for x in xs if isinstance(x, Tensor)]
    if backend.requested() is None:
        return all(x.device.type == "cpu" and x.dtype != torch.float64 for x in tensors)
    return backend.requested() == "native"


def axis_of(
    xs: tuple[Tensor, ...],
    offsets: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    coefficients: tuple[float | Tensor, ...],
) -> tuple[Tensor | None, Tensor | None] | None:
    """The offsets (None: padded) and the mask of a scan; None where the fast forms do not take its arguments."""
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.shape == xs[0].shape for x in xs):
        return None
    first, dtype = xs[0], result_dtype(*xs)
    per_row = [c for c in coefficients if isinstance(c, Tensor)]
    fits = (
        all(isinstance(c, (Tensor, int, float)) and not isinstance(c, bool) for c in coefficients)
        and all(c.dim() == 0 or (c.shape == first.shape and fits_into(c, dtype)) for c in per_row)
        and (bootstrap is None or (isinstance(bootstrap, Tensor) and fits_into(bootstrap, dtype)))
    )
    if not fits or (offsets is None and first.dim() != 2):
        return None
    if offsets is not None:
        offsets = flat_offsets_of(first, offsets, "reward").contiguous()
    count = first.shape[0] if offsets is None else offsets.shape[0] - 1
    if bootstrap is not None and bootstrap.shape != (count,):
        return None
    return offsets, flat_mask(mask, first, "reward")


def time_of(
    xs: tuple[Tensor, ...],
    offsets: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    coefficients: tuple[float | Tensor, ...],
) -> tuple[Time, tuple[float | Tensor, ...]] | None:
    """The time axis of `xs` and the coefficients made ready for it; None where the C++ code does not take them."""
    if not runs(*xs, offsets, mask, bootstrap, *coefficients) or not native_scans(*xs):
        return None
    axis = axis_of(xs, offsets, mask, bootstrap, coefficients)
    if axis is None:
        return None
    (offsets, keep), first, dtype = axis, xs[0], result_dtype(*xs)
    if offsets is None:
        offsets = torch.arange(first.shape[0] + 1) * first.shape[1]
    ready = [x.to(dtype).contiguous() for x in xs]
    after = None if bootstrap is None else bootstrap.to(dtype).contiguous()
    time = Time(tuple(ready), first.shape, dtype, offsets, keep, after)
    return time, tuple(c.to(dtype).contiguous() if isinstance(c, Tensor) and c.dim() else c for c in coefficients)


def fits_into(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether no digit is lost in a dtype."""
    return x.is_floating_point() and (dtype == torch.float64 or x.dtype != torch.float64)


def linear_scan(delta: Tensor, decay: Tensor, last: Tensor) -> Tensor:
    """The recurrence over float64 rows [N], cut after rows that are `last`."""
    delta, decay, last = delta.contiguous(), decay.contiguous(), last.contiguous()
    y = torch.empty_like(delta)
    backend.native().linear_scan(  # type: ignore[union-attr]
        address(delta), address(decay), address(last), delta.shape[0], address(y), torch.get_num_threads()
    )
    return y
