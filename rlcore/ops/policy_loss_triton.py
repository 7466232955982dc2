"""The policy loss in Triton: loss, gradients and all metrics of a batch in one launch, two for shared ratios.

The kernels read a batch's fields where they lie, in any floating dtype; nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.objective import Objective
from rlcore.algorithms.policy_loss import FIELDS, Evaluated
from rlcore.algorithms.policy_loss_metrics import metric_names
from rlcore.layout import TokenBatch
from rlcore.ops import backend
from rlcore.ops.policy_loss_launch import structure, unit_launches


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
    without: they follow from its offsets and segments. N is not 0.
    """
    from rlcore.kernels import policy_loss as kernels  # imports triton: only where it is used
    from rlcore.kernels.policy_loss_units import unit_terms

    assert batch.totals is not None
    totals = (batch.totals.tokens, batch.totals.sequences)
    numbers = [float(x) for x in objective.numbers]  # on the CPU, always: nothing to wait for
    fields = {name: flat(getattr(batch, name)) for name in (*FIELDS, "mask", "kl_mask")}
    fields |= {"logp": flat(logp), "entropy": flat(entropy), "coefficient": flat(coefficient)}
    given = (totals, numbers, structure(objective))
    for rows, wanted in unit_launches(batch, objective, needs[0], coefficient, units):
        found = zip(("mean", "through", "coefficient"), unit_terms(fields, rows, *given, wanted), strict=True)
        fields |= {name: x for name, x in found if x is not None}
    names = metric_names(batch, objective, entropy is not None)
    return Evaluated(*kernels.policy_loss(fields, *given, names, needs))
