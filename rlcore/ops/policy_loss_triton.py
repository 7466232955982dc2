"""The policy loss in Triton: loss, gradients and all metrics of a batch in one launch, two for shared ratios.

The kernels read a batch's fields where they lie, in any floating dtype; nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.objective import Objective
from rlcore.algorithms.policy_loss import FIELDS, Evaluated, metric_names, ratio_level
from rlcore.layout import TokenBatch, flat_offsets
from rlcore.ops import backend


def flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


@torch.no_grad()
@backend.on_device
def evaluate(
    logp: Tensor,
    entropy: Tensor | None,
    batch: TokenBatch,
    objective: Objective,
    needs: tuple[bool, bool],
    coefficient: Tensor | None = None,
    units: Tensor | None = None,
) -> Evaluated:
    """logp and entropy [N] or in the batch's shape; `needs`: whether d logp and d entropy are wanted.

    A chunk comes with its rows' `coefficient` and ratio `units` (ids, where the objective has units); a whole batch
    without: they follow from its offsets and segments.
    """
    from rlcore.kernels import policy_loss as kernels  # imports triton: only where it is used

    assert batch.totals is not None
    totals = (batch.totals.tokens, batch.totals.sequences)
    numbers = [float(x) for x in objective.numbers]  # on the CPU, always: nothing to wait for
    has_units = objective.ratio in ("sequence", "segment")
    structure = (
        "unit" if has_units else objective.ratio, objective.surrogate,
        "" if objective.kl is None else objective.kl.estimator, objective.aggregate,
        objective.has_dual_clip, objective.has_correction, objective.needs_entropy,
    )  # fmt: skip
    fields = {name: flat(getattr(batch, name)) for name in (*FIELDS, "mask", "kl_mask")}
    fields |= {"logp": flat(logp), "entropy": flat(entropy), "coefficient": flat(coefficient)}
    if logp.numel():
        fields |= unit_fields(fields, batch, objective, totals, numbers, structure, needs[0], units)
    names = metric_names(batch, objective, entropy is not None)
    return Evaluated(*kernels.policy_loss(fields, totals, numbers, structure, names, needs))


def unit_fields(
    fields: dict[str, Tensor | None], batch: TokenBatch, objective: Objective, totals: tuple[Tensor, Tensor],
    numbers: list[float], structure: tuple[str, str, str, str, bool, bool, bool], gradient: bool, units: Tensor | None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """The fields of rows that share something: mean log-ratios, gradients through them, shares of a sequence's mean."""
    from rlcore.kernels.policy_loss_units import unit_terms

    found: dict[str, Tensor | None] = {}
    by_sequence = fields["coefficient"] is None and objective.aggregate == "seq_mean_token_mean"
    given = (totals, numbers, structure)
    if by_sequence and objective.ratio != "sequence":
        borders = flat_offsets(batch).contiguous()
        *_, found["coefficient"] = unit_terms(
            fields, borders, None, None, *given, mean=False, through=False, own=True
        )  # fmt: skip
    if objective.ratio not in ("sequence", "segment"):
        return found
    gradient = gradient and objective.surrogate != "cispo"  # whose ratio is a constant
    if objective.ratio == "segment" and units is None:
        units = ratio_level(batch.flat(), objective)
    arrangement = (flat_offsets(batch).contiguous(), None, None) if units is None else arranged(units)
    own = by_sequence and objective.ratio == "sequence"
    mean, through, share = unit_terms(fields | found, *arrangement, *given, mean=True, through=gradient, own=own)
    found |= {"mean": mean, "through": through}
    return found | {"coefficient": share} if own else found


def arranged(units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows put side by side by their unit: borders [N+1] of the units there, rows in that order, how many units.

    units are ids [N] without gaps, from any number on. There are at most N, so no count has to be read back.
    """
    ids, order = units.sort(stable=True)
    borders = torch.searchsorted(ids, ids[0] + torch.arange(ids.shape[0] + 1, device=ids.device))
    return borders, order, ids[-1:] - ids[0] + 1
