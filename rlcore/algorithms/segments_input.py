"""What the functions of `segments` take: checks of arguments, the rows of a ragged axis, ids and dtypes.

Statistics and scans run in float64 (float32 where the device has no float64) and are rounded once at the end, so that
the order in which rows are added, and with it packing, padding and splitting, does not show in float32 results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.layout import check_offsets, check_zero_one, sequence_id

INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def result_dtype(*xs: Tensor) -> torch.dtype:
    """float64 if any input is float64, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which sums are accumulated."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def check_tensor(name: str, x: object, like: Tensor | None = None, of: str = "") -> None:
    """x is a real tensor, of the shape and on the device of `like` (the argument called `of`)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}")
    if x.is_complex():
        raise TypeError(f"{name}: expected real numbers; got {x.dtype}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)} like {of}; got {tuple(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like {of}; got {x.device}")


def check_floating(name: str, x: object) -> None:
    check_tensor(name, x)
    if not x.is_floating_point():  # type: ignore[attr-defined]
        raise TypeError(f"{name}: expected a floating dtype; got {x.dtype}")  # type: ignore[attr-defined]


def values_can_be_read(x: Tensor) -> bool:
    """Whether looking at x costs nothing: it lies on the CPU and nothing is being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_ids(name: str, ids: Tensor, like: Tensor, of: str) -> None:
    check_tensor(name, ids, like, of)
    if ids.dtype not in INTEGER:
        raise TypeError(f"{name}: expected integer ids; got {ids.dtype}")


def flat_mask(mask: Tensor | None, like: Tensor, of: str) -> Tensor | None:
    """The mask as bool [N], contiguous, or None; bool is read where it lies: a copy takes a third of a scan's time."""
    if mask is None:
        return None
    check_tensor("mask", mask, like, of)
    if mask.dtype == torch.bool:
        return mask.reshape(-1).contiguous()
    check_zero_one("mask", mask)
    return mask.reshape(-1) != 0


def flat_offsets_of(x: Tensor, offsets: Tensor, name: str) -> Tensor:
    check_tensor("offsets", offsets)
    if x.dim() != 1:
        raise ValueError(f"offsets: expected with {name} of shape [N]; got {name} of shape {tuple(x.shape)}")
    if offsets.device != x.device:
        raise ValueError(f"offsets: expected on {x.device} like {name}; got {offsets.device}")
    check_offsets(offsets, x.shape[0])
    return offsets


class Segments(NamedTuple):
    """The rows of x [N] (float, 0 where masked), their segment ids, and the number of segments.

    Masked rows have the id `size`: results hold one more entry, which is dropped.
    """

    x: Tensor
    ids: Tensor
    size: int

    def reduce_sum(self, x: Tensor) -> Tensor:
        return wide(x).new_zeros(self.size + 1).index_add(0, self.ids, wide(x))[: self.size]

    def sizes(self) -> Tensor:
        return self.reduce_sum(torch.ones_like(self.x))

    def spread_out(self, per_segment: Tensor) -> Tensor:
        """Each segment's value on its rows, 0 on masked rows."""
        return torch.cat((per_segment, per_segment.new_zeros(1)))[self.ids]


def segments_of(
    x: Tensor, ids: Tensor | None, offsets: Tensor | None, num_segments: int | None, mask: Tensor | None
) -> Segments:
    """Segments by integer ids (same shape as x), by offsets (x [N]), or the rows of a padded x [B, T]."""
    check_floating("x", x)
    if ids is not None and offsets is not None:
        raise ValueError("ids: expected ids or offsets; got both")
    keep = flat_mask(mask, x, "x")
    if ids is not None:
        check_ids("ids", ids, x, "x (offsets are passed by keyword)")
        rows = ids.reshape(-1).to(torch.int64)
        count = count_segments(rows, keep, num_segments)
    elif num_segments is not None:
        raise ValueError(f"num_segments: expected only with ids; got {num_segments} without")
    elif offsets is not None:
        rows, count = sequence_id(flat_offsets_of(x, offsets, "x"), x.shape[0]), offsets.shape[0] - 1
    elif x.dim() == 2:
        count = x.shape[0]
        rows = torch.arange(count, device=x.device).unsqueeze(1).expand(x.shape).reshape(-1)
    else:
        raise ValueError(f"offsets: needed, or ids, with x of shape {tuple(x.shape)}; without either x is [B, T]")
    flat = x.reshape(-1)
    if keep is not None:
        flat, rows = flat.masked_fill(~keep, 0), rows.masked_fill(~keep, count)
    return Segments(flat, rows, count)


def count_segments(ids: Tensor, keep: Tensor | None, num_segments: int | None) -> int:
    """num_segments, checked against the ids where they can be read; without it the largest id + 1 (CPU only)."""
    if num_segments is None and not values_can_be_read(ids):
        raise ValueError("num_segments: needed on a GPU and under torch.compile (it can not be read off the ids there)")
    if num_segments is not None and (isinstance(num_segments, bool) or num_segments < 0):
        raise ValueError(f"num_segments: expected a number of segments >= 0; got {num_segments!r}")
    if values_can_be_read(ids):
        live = ids if keep is None else ids[keep]
        low, high = (int(live.min()), int(live.max())) if live.numel() else (0, -1)
        if num_segments is None:
            num_segments = high + 1
        if low < 0 or high >= num_segments:
            raise ValueError(f"ids: expected ids from 0 to num_segments - 1 = {num_segments - 1}; got {low} to {high}")
    assert num_segments is not None
    return num_segments


def dense_ids(ids: Tensor) -> Tensor:
    """Ids renumbered 0, 1, ... in rising order, [N]; there are at most N, so no count has to be read back."""
    ordered, order = ids.sort(stable=True)
    rank = torch.cat((order.new_zeros(1), (ordered[1:] != ordered[:-1]).cumsum(0)))[: order.shape[0]]
    return torch.zeros_like(order).scatter(0, order, rank)


class Rows(NamedTuple):
    """The time axis of N flat rows: sequence of each row, whether it ends its sequence, whether it counts."""

    like: Tensor
    of: str
    sequence: Tensor
    last: Tensor
    keep: Tensor | None
    size: int

    def load(self, name: str, x: Tensor) -> Tensor:
        """x [N] for computing, 0 where masked."""
        check_tensor(name, x, self.like, self.of)
        return self.fill(wide(x.reshape(-1)), 0.0)

    def coefficient(self, name: str, c: float | Tensor) -> Tensor:
        """A float, 0-d tensor or per-row tensor as [N], 1 where masked (a masked row passes everything on)."""
        if isinstance(c, Tensor) and c.dim() > 0:
            check_tensor(name, c, self.like, f"{self.of} (rl.per_token turns one per sequence into one per token)")
            c = c.reshape(-1)
        elif isinstance(c, Tensor):
            check_tensor(name, c)
        elif isinstance(c, bool) or not isinstance(c, (int, float)):
            raise TypeError(f"{name}: expected a float or a tensor; got {type(c).__name__}")
        if isinstance(c, Tensor):
            c = wide(c)
        ones = wide(torch.ones_like(self.sequence))
        return self.fill(ones * c, 1.0)

    def bootstrap(self, b: Tensor | None) -> Tensor | None:
        """The value after the end of its sequence, for each row, [N]."""
        if b is None:
            return None
        check_tensor("bootstrap", b)
        if b.shape != (self.size,):
            raise ValueError(f"bootstrap: expected shape ({self.size},), one per sequence; got {tuple(b.shape)}")
        if b.device != self.like.device:
            raise ValueError(f"bootstrap: expected on {self.like.device} like {self.of}; got {b.device}")
        return wide(b)[self.sequence]

    def following(self, x: Tensor, after_end: Tensor | None) -> Tensor:
        """x at the next unmasked row of the sequence; `after_end` (0 if None) where there is none."""
        n = x.shape[0]
        row = torch.arange(n, device=x.device)
        if self.keep is not None:
            row = row.masked_fill(~self.keep, n).flip(0).cummin(0).values.flip(0)
        row = torch.cat((row[1:], row.new_full((1,), n)))[:n]
        here = row.clamp(max=max(n - 1, 0))
        inside = (row < n) & (self.sequence[here] == self.sequence)
        return torch.where(inside, x[here], torch.zeros_like(x) if after_end is None else after_end)

    def fill(self, x: Tensor, number: float) -> Tensor:
        return x if self.keep is None else x.masked_fill(~self.keep, number)

    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.fill(x, 0.0).to(dtype).reshape(self.like.shape)


def rows_of(name: str, x: Tensor, offsets: Tensor | None, mask: Tensor | None) -> Rows:
    """The rows of x: packed [N] with offsets [S+1], or padded [B, T]."""
    check_tensor(name, x)
    if offsets is not None:
        count = flat_offsets_of(x, offsets, name).shape[0] - 1
        sequence = sequence_id(offsets, x.shape[0])
    elif x.dim() == 2:
        count = x.shape[0]
        sequence = torch.arange(count, device=x.device).unsqueeze(1).expand(x.shape).reshape(-1)
    else:
        raise ValueError(f"offsets: needed with {name} of shape {tuple(x.shape)}; without, {name} is padded [B, T]")
    last = torch.cat((sequence[1:] != sequence[:-1], sequence.new_ones(1, dtype=torch.bool)))[: sequence.shape[0]]
    return Rows(x, name, sequence, last, flat_mask(mask, x, name), count)
