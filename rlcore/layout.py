"""The token layout: one flat axis of predictions for packed and padded batches, and the minibatch's denominators.

Tokens live on one flat axis of N rows. `offsets` (int64, S+1) says that sequence s owns rows offsets[s]:offsets[s+1];
a padded [B, T] tensor is the uniform case (0, T, 2T, ...). A row is a prediction: hidden[i] is the state that predicts
target[i], logp[i] is the log-probability of target[i]. Nothing inside the library shifts; `shift` makes such rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcore.layout_checks import (
    PER_SEQUENCE,
    PER_TOKEN,
    PER_TOKEN_OR_SEQUENCE,
    TENSORS,
    check_batch,
    check_offsets,
    check_totals,
    check_zero_one,
)


class Totals(NamedTuple):
    """The denominators of a minibatch: 0-d float32 tensors on the batch's device.

    Micro-batches carry the totals of the minibatch they were cut from, so their losses sum to the minibatch's loss.
    Where DDP or FSDP averages gradients over R ranks, pass the counts of all ranks divided by R.
    """

    tokens: Tensor
    sequences: Tensor
    groups: Tensor


class OwnTotals(Totals):
    """Totals that a batch counted itself: `dataclasses.replace` counts them anew, given or inherited ones stay."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """One minibatch (or micro-batch) of predictions and everything the objectives read about them.

    Shapes: per token [N] with `offsets` [S+1], or [B, T] without. `advantage`, `weight`, `clip_low` and `clip_high`
    are per token or per sequence ([S], stored per token); `group` is [S]. `mask` (bool or 0/1) says which rows count:
    what a masked row holds (NaN, label -100) never matters. `segment` ids tell turns or steps apart inside a sequence.
    `kl_mask` selects the tokens of the KL term. `totals` are the denominators; left out, they are this batch's own. All
    sequences count in `totals.sequences`, also fully masked ones, unless `count_empty=False`. A weight of 0 changes no
    denominator.

    Raises TypeError or ValueError that name the field, what was expected and what came. On CPU the values of offsets
    and masks are checked, on GPU only shapes and dtypes.
    """

    target: Tensor
    offsets: Tensor | None = None
    mask: Tensor | None = None
    advantage: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    rollout_logp: Tensor | None = None
    group: Tensor | None = None
    segment: Tensor | None = None
    weight: Tensor | None = None
    clip_low: Tensor | None = None
    clip_high: Tensor | None = None
    kl_mask: Tensor | None = None
    value: Tensor | None = None
    old_value: Tensor | None = None
    returns: Tensor | None = None
    totals: Totals | None = None
    count_empty: bool = True
    # Set by `split`, `take` and `Objective.prepare`, never by hand.
    rows: slice | None = field(default=None, repr=False)
    sequences: slice | None = field(default=None, repr=False)
    whole: bool = field(default=True, repr=False)
    prepared: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        check_batch(self)
        check_totals(self, Totals)
        for name in ("mask", "kl_mask"):
            given = getattr(self, name)
            if given is not None and given.dtype != torch.bool:
                object.__setattr__(self, name, given != 0)
        for name in PER_TOKEN_OR_SEQUENCE:
            given = getattr(self, name)
            if given is not None and given.shape != self.shape:
                object.__setattr__(self, name, given[self.sequence_id()].reshape(self.shape))
        if self.totals is None or isinstance(self.totals, OwnTotals):
            object.__setattr__(self, "totals", count_totals(self))

    def derived(self, **changes: Any) -> TokenBatch:
        """A copy with other fields, unchecked and with the same totals: for parts and views of a checked batch.

        Your own changes go through `dataclasses.replace`, which checks them and counts the totals anew unless they
        were given or belong to the minibatch that this is a part of.
        """
        new = object.__new__(TokenBatch)
        for name, value in {**self.__dict__, **changes}.items():
            object.__setattr__(new, name, value)
        return new

    @property
    def padded(self) -> bool:
        return self.target.dim() == 2

    @property
    def shape(self) -> torch.Size:
        return self.target.shape

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def N(self) -> int:
        return self.target.numel()

    @property
    def S(self) -> int:
        return self.target.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def is_micro(self) -> bool:
        """Whether this is a part of a minibatch, cut off by `split` or `take`."""
        return not self.whole

    def lengths(self) -> Tensor:
        """Rows per sequence, masked ones included, [S] int64."""
        if self.offsets is None:
            return torch.full((self.S,), self.shape[1], dtype=torch.int64, device=self.device)
        return self.offsets.diff()

    def sequence_id(self) -> Tensor:
        """The sequence of every row, [N] int64."""
        return sequence_id(flat_offsets(self), self.N)

    def flat(self) -> TokenBatch:
        """The same batch with every per-token field as [N] and `offsets` set; a padded batch is not copied."""
        if not self.padded:
            return self
        per_row = {}
        for name in (*PER_TOKEN, *PER_TOKEN_OR_SEQUENCE):
            x = getattr(self, name)
            if x is not None:
                per_row[name] = x.reshape(-1)
        return self.derived(offsets=flat_offsets(self), **per_row)

    def split(self, max_tokens: int, by: str = "sequence") -> list[TokenBatch]:
        """Cut at sequence (or group) borders into micro-batches of at most `max_tokens` rows that keep the totals.

        A sequence (group) longer than that is a micro-batch of its own. `by="group"` keeps rows of one group id
        together; groups must be contiguous. Each part says where it came from: `.rows` in the flat rows of this batch,
        `.sequences` in its sequences. The losses of the parts sum to the loss of the whole.
        """
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise ValueError(f"max_tokens: expected a positive int; got {max_tokens!r}")
        if by not in ("sequence", "group"):
            raise ValueError(f'by: expected "sequence" or "group"; got {by!r}')
        starts = flat_offsets(self).tolist()
        units = list(range(self.S + 1)) if by == "sequence" else group_borders(self)
        cuts = [0]
        for unit, following in zip(units[:-1], units[1:], strict=True):
            full = starts[following] - starts[cuts[-1]] > max_tokens
            # Empty sequences stay with a neighbour: no micro-batch is without rows.
            if full and starts[following] > starts[unit] > starts[cuts[-1]]:
                cuts.append(unit)
        cuts.append(self.S)
        return [self._part(a, b, starts) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if b > a]

    def _part(self, a: int, b: int, starts: list[int]) -> TokenBatch:
        parts: dict[str, Any] = {}
        for name in TENSORS:
            x = getattr(self, name)
            if x is None:
                continue
            if name == "offsets":
                parts[name] = x[a : b + 1] - x[a]
            elif self.padded or name in PER_SEQUENCE:
                parts[name] = x[a:b]
            else:
                parts[name] = x[starts[a] : starts[b]]
        base_row = self.rows.start if self.rows is not None else 0
        base_sequence = self.sequences.start if self.sequences is not None else 0
        assert self.totals is not None
        return self.derived(
            **marked(parts),
            rows=slice(base_row + starts[a], base_row + starts[b]),
            sequences=slice(base_sequence + a, base_sequence + b),
            whole=self.whole and b - a == self.S,
            totals=Totals(*self.totals),
        )

    def take(self, sequences: Sequence[int] | Tensor) -> TokenBatch:
        """The given sequences [K], in that order, as a micro-batch that keeps the totals, whatever lies between them.

        Where several hold every sequence once (`rl.pack_groups`), their losses sum to that of the whole.
        `.rows` and `.sequences` are None. Raises ValueError or TypeError for indices out of range and repeated ones.
        """
        index = self._checked_index(sequences)
        rows = index
        parts: dict[str, Any] = {}
        if self.offsets is not None:
            rows, parts["offsets"] = rows_of(self.offsets, index)
        for name in TENSORS:
            x = getattr(self, name)
            if x is not None and name != "offsets":
                parts[name] = x[index if name in PER_SEQUENCE else rows]
        assert self.totals is not None
        whole = self.whole and len(index) == self.S
        return self.derived(**marked(parts), rows=None, sequences=None, whole=whole, totals=Totals(*self.totals))

    def _checked_index(self, sequences: Sequence[int] | Tensor) -> Tensor:
        try:
            index = torch.as_tensor(sequences)
        except (RuntimeError, TypeError, ValueError):
            raise TypeError(f"sequences: expected indices [K] of sequences; got {sequences!r}") from None
        if index.numel() == 0:
            raise ValueError("sequences: expected at least one index; got none")
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"sequences: expected indices [K] of sequences; got shape {tuple(index.shape)} of {index.dtype}"
            )
        if index.device.type == "cpu":
            found = index.tolist()
            if min(found) < 0 or max(found) >= self.S or len(set(found)) < len(found):
                raise ValueError(f"sequences: expected different indices below S={self.S}; got {found}")
        return index.to(self.device)

    def chunk(self, start: int, stop: int) -> TokenBatch:
        """Rows [start, stop) of a flat batch as views; sequences keep their ids, offsets are clamped to the chunk."""
        parts = {}
        for name in (*PER_TOKEN, *PER_TOKEN_OR_SEQUENCE):
            x = getattr(self, name)
            if x is not None:
                parts[name] = x[start:stop]
        return self.derived(offsets=flat_offsets(self).clamp(start, stop) - start, **parts)

    def tensors(self) -> list[Tensor | None]:
        """The tensor fields in the order of `layout.TENSORS`, then the totals: what a custom op takes."""
        assert self.totals is not None
        return [getattr(self, name) for name in TENSORS] + list(self.totals)

    @classmethod
    def from_tensors(cls, tensors: list[Tensor | None], prepared: bool = False) -> TokenBatch:
        """The batch whose `tensors()` these are, unchecked."""
        blank = object.__new__(cls)
        fresh = {f.name: None if f.default is MISSING else f.default for f in fields(cls)}
        given = dict(zip(TENSORS, tensors, strict=False))
        totals = Totals(*tensors[len(TENSORS) :])  # type: ignore[arg-type]
        for name, value in {**fresh, **given, "totals": totals, "prepared": prepared}.items():
            object.__setattr__(blank, name, value)
        return blank

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        moved = {name: x.to(device) for name in TENSORS if (x := getattr(self, name)) is not None}
        assert self.totals is not None
        return self.derived(**marked(moved), totals=type(self.totals)(*(x.to(device) for x in self.totals)))


def flat_offsets(batch: TokenBatch) -> Tensor:
    """The offsets of a batch's sequences on the flat axis, [S+1] int64."""
    if batch.offsets is not None:
        return batch.offsets
    return torch.arange(batch.shape[0] + 1, device=batch.device) * batch.shape[1]


def sequence_id(offsets: Tensor, N: int) -> Tensor:
    """The sequence of every row, [N] int64, from offsets [S+1]."""
    ids = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(ids, offsets.diff(), output_size=N)


def rows_of(offsets: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the given sequences [K], one after the other, and the offsets [K + 1] among these rows."""
    lengths = offsets.diff()[sequences]
    chosen = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    shift = torch.repeat_interleave(offsets[sequences] - chosen[:-1], lengths)
    return torch.arange(int(chosen[-1]), device=shift.device) + shift, chosen


def per_token(x: Tensor, offsets: Tensor | TokenBatch) -> Tensor:
    """Repeat a value per sequence over its tokens: y[i] = x[s] for offsets[s] <= i < offsets[s+1].

    x is [S], `offsets` is [S+1] (result [N]) or a TokenBatch (result in its shape, without a device sync). The result
    is marked as per token, which TokenBatch reads where S == N. Raises TypeError or ValueError that name the argument.
    """
    S = offsets.S if isinstance(offsets, TokenBatch) else offsets.shape[0] - 1
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor; got {type(x).__name__}")
    if x.shape != (S,):
        raise ValueError(f"x: expected shape ({S},), one value per sequence; got {tuple(x.shape)}")
    if isinstance(offsets, TokenBatch):
        y = x[offsets.sequence_id()].reshape(offsets.shape)
    else:
        if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
            check_offsets(offsets, int(offsets[-1]))
        y = torch.repeat_interleave(x, offsets.diff())
    y.is_per_token = True  # type: ignore[attr-defined]
    return y


def marked(parts: dict[str, Any]) -> dict[str, Any]:
    """The fields, those that could be per sequence marked as per token, as `per_token` does: `replace` checks again."""
    for name in PER_TOKEN_OR_SEQUENCE:
        if name in parts:
            parts[name].is_per_token = True
    return parts


def shift(input_ids: Tensor, mask: Tensor | None = None, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Turn token ids into aligned rows: row i predicts token i+1 of its sequence.

    input_ids is [B, T], or [N] with `offsets` [S+1]; mask (same shape, bool or 0/1) says which *tokens* carry loss.
    Returns (target, mask) of the same shape: target[i] = input_ids[i+1], mask[i] = mask[i+1], and the last row of each
    sequence, which predicts nothing, is masked and has target 0. The model's hidden states are used unshifted.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids: expected a torch.Tensor; got {type(input_ids).__name__}")
    if input_ids.dim() not in (1, 2) or input_ids.numel() == 0:
        raise ValueError(f"input_ids: expected [B, T] or [N] with a token in it; got shape {tuple(input_ids.shape)}")
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise ValueError(f"mask: expected shape {tuple(input_ids.shape)} like input_ids; got {tuple(mask.shape)}")
        check_zero_one("mask", mask)
    if (offsets is None) != (input_ids.dim() == 2):
        raise ValueError("offsets: needed for packed input_ids [N], and only there; a padded batch [B, T] has none")
    target = torch.zeros_like(input_ids)
    target[..., :-1] = input_ids[..., 1:]
    shifted = torch.zeros_like(input_ids, dtype=torch.bool)
    shifted[..., :-1] = True if mask is None else mask[..., 1:] != 0
    if offsets is not None:
        check_offsets(offsets, input_ids.shape[0])
        # The row before each border is the last of a sequence. Leading empty sequences have a border at 0: it is moved
        # to the end, whose row before is a last one anyway.
        ends = torch.where(offsets[1:] == 0, input_ids.shape[0], offsets[1:])
        is_last = torch.zeros_like(shifted).index_fill_(0, ends - 1, True)
        target = target.masked_fill(is_last, 0)
        shifted = shifted & ~is_last
    return target, shifted


def count_totals(batch: TokenBatch) -> OwnTotals:
    """The denominators of one batch by itself, without a host sync."""

    def number(n: int) -> Tensor:
        return torch.full((), n, dtype=torch.float32, device=batch.device)

    tokens = number(batch.N) if batch.mask is None else batch.mask.sum().float()
    sequences = number(batch.S) if batch.count_empty else (tokens_per_sequence(batch) > 0).sum().float()
    groups = sequences
    if batch.group is not None:
        ordered = batch.group.sort().values
        groups = (ordered.diff() != 0).sum().float() + (1 if batch.S else 0)
    return OwnTotals(tokens, sequences, groups)


def tokens_per_sequence(batch: TokenBatch) -> Tensor:
    """Unmasked tokens per sequence, [S] float32."""
    if batch.mask is None:
        return batch.lengths().float()
    if batch.padded:
        return batch.mask.sum(1).float()
    counts = torch.zeros(batch.S, device=batch.device)
    return counts.index_add_(0, batch.sequence_id(), batch.mask.float())


def group_borders(batch: TokenBatch) -> list[int]:
    """Sequence indices where a group begins, and S; groups must be contiguous."""
    if batch.group is None:
        raise ValueError('group: needed to cut at group borders (by="group"); got None')
    ids = batch.group.tolist()
    begins = [s for s in range(batch.S) if s == 0 or ids[s] != ids[s - 1]]
    if len({ids[s] for s in begins}) != len(begins):
        raise ValueError("group: sequences of one group must be contiguous to cut at group borders; sort them by group")
    return [*begins, batch.S]
