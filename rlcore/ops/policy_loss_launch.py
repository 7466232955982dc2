"""What the passes of the policy loss are called with, whatever they are written in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms.objective import Objective
from rlcore.algorithms.policy_loss import ratio_level
from rlcore.layout import TokenBatch, flat_offsets


def structure(objective: Objective) -> tuple[str, str, str, str, bool, bool, bool]:
    """Ratio ("none", "token", "unit"), surrogate, estimator ("": no KL), aggregate; dual clip, correction, entropy."""
    return (
        "unit" if objective.ratio in ("sequence", "segment") else objective.ratio, objective.surrogate,
        "" if objective.kl is None else objective.kl.estimator, objective.aggregate,
        objective.has_dual_clip, objective.has_correction, objective.needs_entropy,
    )  # fmt: skip


class Arguments:
    """Addresses for passes in C++, and the tensors behind them kept alive."""

    def __init__(self) -> None:
        self.alive: list[Tensor] = []

    def address(self, x: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        """The address of x as a contiguous tensor of a dtype, 0 for None."""
        if x is None:
            return 0
        if x.dtype != dtype:
            x = x.to(dtype)
        if not x.is_contiguous():
            x = x.contiguous()
        self.alive.append(x)
        return x.data_ptr()


# ---- on a GPU, where rows of a sequence or a segment share something: one launch more, or two


class Rows(NamedTuple):
    """Rows by unit: borders [units + 1], rows in that order [N] (None: as they lie), how many units there are [1]."""

    borders: Tensor
    order: Tensor | None = None
    known: Tensor | None = None


class UnitLaunch(NamedTuple):
    """Units, and which of what their rows share is wanted: the mean log-ratio, the derivative by it, c_u."""

    rows: Rows
    wanted: tuple[bool, bool, bool]


def unit_launches(
    batch: TokenBatch, objective: Objective, gradient: bool, coefficient: Tensor | None, units: Tensor | None
) -> list[UnitLaunch]:
    """The launches before the main one, in their order; arguments as in `evaluate`."""
    launches = []
    by_sequence = coefficient is None and objective.aggregate == "seq_mean_token_mean"
    if by_sequence and objective.ratio != "sequence":
        launches.append(UnitLaunch(Rows(flat_offsets(batch).contiguous()), (False, False, True)))
        by_sequence = False
    if objective.ratio in ("sequence", "segment"):
        if objective.ratio == "segment" and units is None:
            units = ratio_level(batch.flat(), objective)
        rows = Rows(flat_offsets(batch).contiguous()) if units is None else arranged(units)
        through = gradient and objective.surrogate != "cispo"  # whose ratio is a constant
        launches.append(UnitLaunch(rows, (True, through, by_sequence)))
    return launches


def arranged(units: Tensor) -> Rows:
    """Rows put side by side by their unit, which is an id [N] without gaps, from any number on.

    There are at most N units, so no count has to be read back.
    """
    ids, order = units.sort(stable=True)
    borders = torch.searchsorted(ids, ids[0] + torch.arange(ids.shape[0] + 1, device=ids.device))
    return Rows(borders, order, ids[-1:] - ids[0] + 1)
