"""The policy loss in C++: loss, gradients and all metrics of a float32 batch on the CPU in one pass.

The pass reads a batch's fields where they lie; nothing is cleaned, repeated or flattened before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.objective import Objective
from rlcore.algorithms.policy_loss import FIELDS, Evaluated, ratio_level
from rlcore.layout import TokenBatch, flat_offsets
from rlcore.ops import backend
from rlcore.ops.policy_loss_launch import Arguments, structure


@torch.no_grad()
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
    module = backend.native()
    assert module is not None and batch.totals is not None
    n = logp.numel()
    at = Arguments()
    loss, metrics = torch.empty(()), torch.empty(module.POLICY_LOSS_METRICS)
    d_logp = torch.empty(n if needs[0] else 0)
    d_entropy = torch.empty(n if needs[1] else 0)
    has_units = objective.ratio in ("sequence", "segment")
    if objective.ratio == "segment" and units is None:
        units = ratio_level(batch.flat(), objective)
    base, count = 0, n
    if units is not None and n:
        base = int(units.min())
        count = int(units.max()) - base + 1
    by_sequence = coefficient is None and objective.aggregate == "seq_mean_token_mean"
    offsets = flat_offsets(batch) if by_sequence or (has_units and units is None) else None
    fields = (
        at.address(logp), at.address(entropy), *(at.address(getattr(batch, name)) for name in FIELDS),
        at.address(batch.mask, torch.bool), at.address(batch.kl_mask, torch.bool), at.address(coefficient),
        d_logp.data_ptr() if needs[0] else 0, d_entropy.data_ptr() if needs[1] else 0, at.address(units, torch.int64),
    )  # fmt: skip
    written = module.policy_loss(
        fields,
        [at.address(x, torch.float64) for x in objective.numbers],
        (at.address(batch.totals.tokens), at.address(batch.totals.sequences)),
        n,
        at.address(offsets, torch.int64),
        0 if offsets is None else offsets.shape[0] - 1,
        *structure(objective),
        base,
        count,
        loss.data_ptr(),
        metrics.data_ptr(),
        torch.get_num_threads(),
    )
    return Evaluated(loss, metrics[:written], d_logp, d_entropy)
