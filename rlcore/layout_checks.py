"""What a batch must be: shapes and dtypes always, values only where reading them costs no device sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlcore.layout import TokenBatch

PER_TOKEN = ("target", "mask", "old_logp", "ref_logp", "rollout_logp", "segment", "kl_mask", "value", "old_value",
             "returns")  # fmt: skip
PER_TOKEN_OR_SEQUENCE = ("advantage", "weight", "clip_low", "clip_high")
PER_SEQUENCE = ("group",)
FLOATING = ("old_logp", "ref_logp", "rollout_logp", "value", "old_value", "returns", *PER_TOKEN_OR_SEQUENCE)
TENSORS = ("target", "offsets", "mask", "advantage", "old_logp", "ref_logp", "rollout_logp", "group", "segment",
           "weight", "clip_low", "clip_high", "kl_mask", "value", "old_value", "returns")  # fmt: skip


def check_batch(batch: TokenBatch) -> None:
    """Shapes and dtypes always; values only where reading them costs no device sync."""
    target, offsets = batch.target, batch.offsets
    for name in TENSORS:
        x = getattr(batch, name)
        if not isinstance(x, Tensor) and (x is not None or name == "target"):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: expected int64 token ids; got {target.dtype}")
    if target.dim() not in (1, 2):
        raise ValueError(f"target: expected shape [N] or [B, T]; got {tuple(target.shape)}")
    if target.dim() == 2 and offsets is not None:
        raise ValueError("offsets: a padded [B, T] batch has none; give offsets only with target of shape [N]")
    if target.dim() == 1 and offsets is None:
        raise ValueError("offsets: needed with target of shape [N] (S+1 row borders); for a padded batch pass [B, T]")
    if target.numel() == 0:
        raise ValueError(f"target: expected at least one token; got shape {tuple(target.shape)}")
    if offsets is not None:
        if offsets.device != target.device:
            raise ValueError(f"offsets: expected on {target.device} like target; got {offsets.device}")
        check_offsets(offsets, target.numel())
    for name in TENSORS:
        x = getattr(batch, name)
        if x is not None and name not in ("target", "offsets"):
            check_field(batch, name, x)


def check_totals(batch: TokenBatch, kind: type) -> None:
    totals = batch.totals
    if totals is None:
        return
    if not isinstance(totals, kind):
        raise TypeError(f"totals: expected rl.Totals(tokens, sequences, groups); got {type(totals).__name__}")
    for name, x in zip(("tokens", "sequences", "groups"), totals, strict=True):
        if not isinstance(x, Tensor) or x.dim() != 0:
            raise TypeError(f"totals.{name}: expected a 0-d tensor; got {x!r}")
        if x.device != batch.device:
            raise ValueError(f"totals.{name}: expected on {batch.device} like target; got {x.device}")


def check_offsets(offsets: Tensor, N: int) -> None:
    """Offsets are int64 [S+1], begin at 0, never decrease and end at N."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 2:
        got = f"{offsets.dtype} of shape {tuple(offsets.shape)}"
        raise ValueError(f"offsets: expected int64 of shape [S+1] with S >= 1; got {got}")
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if offsets[0] != 0 or offsets[-1] != N or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets: expected to rise from 0 to N={N}; got {offsets.tolist()[:8]} .. {int(offsets[-1])}")


def check_field(batch: TokenBatch, name: str, x: Tensor) -> None:
    token_shape, S = tuple(batch.shape), batch.S
    if x.device != batch.device:
        raise ValueError(f"{name}: expected on {batch.device} like target; got {x.device}")
    if name in PER_SEQUENCE:
        expected = f"({S},), one per sequence"
        fits = tuple(x.shape) == (S,)
    elif name in PER_TOKEN:
        expected = f"{token_shape} like target"
        fits = tuple(x.shape) == token_shape
    else:
        expected = f"{token_shape} (per token) or ({S},) (per sequence)"
        fits = tuple(x.shape) in (token_shape, (S,))
    if not fits:
        raise ValueError(f"{name}: expected shape {expected}; got {tuple(x.shape)}")
    if name in FLOATING and not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype; got {x.dtype}")
    if name in ("group", "segment") and x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected integer ids; got {x.dtype}")
    if name in ("mask", "kl_mask") and x.dtype != torch.bool:
        check_zero_one(name, x)
    ambiguous = name in PER_TOKEN_OR_SEQUENCE and not batch.padded and S == batch.N and not hasattr(x, "is_per_token")
    # The one check that reads values on a GPU as well: a batch is built outside the step, and such a batch is rare.
    if ambiguous and x.device.type != "meta" and bool((batch.lengths() != 1).any()):
        raise ValueError(
            f"{name}: shape ({S},) fits both tokens and sequences, and not every sequence has one token; "
            "say which: rl.per_token(x, offsets) turns per-sequence values into per-token ones"
        )


def check_zero_one(name: str, x: Tensor) -> None:
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(f"{name}: expected bool or 0/1; got other values in a {x.dtype} tensor")
