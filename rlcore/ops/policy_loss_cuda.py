"""The policy loss in CUDA C++ (csrc/cuda/policy_loss.cu), for `rl.backend("cuda")`: loss, gradients and all metrics of
a batch in one launch, two where rows of a sequence or a segment share something. Nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms.objective import Objective
from rlcore.algorithms.policy_loss import FIELDS, METRICS, Evaluated, metric_names, ratio_level
from rlcore.layout import TokenBatch, flat_offsets
from rlcore.ops import backend
from rlcore.ops.policy_loss_native import Arguments
from rlcore.ops.policy_loss_triton import arranged

# As csrc/cuda/policy_loss.h counts them.
PLACES = {name: place for place, name in enumerate(METRICS)}


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
    assert batch.totals is not None
    module, n, at, stream = backend.cuda(), logp.numel(), Arguments(), backend.cuda_stream(logp)
    names = metric_names(batch, objective, entropy is not None)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=logp.device)  # noqa: E731
    loss, metrics, scratch = new(), new(len(names)), new(module.policy_loss_scratch(n))
    d_logp, d_entropy = new(n if needs[0] else 0), new(n if needs[1] else 0)
    by_unit = objective.ratio in ("sequence", "segment")
    fields = [
        at.address(logp), at.address(entropy), *(at.address(getattr(batch, name)) for name in FIELDS),
        at.address(batch.mask, torch.bool), at.address(batch.kl_mask, torch.bool), at.address(coefficient),
    ]  # fmt: skip
    common = (
        (at.address(batch.totals.tokens), at.address(batch.totals.sequences)),
        (
            "unit" if by_unit else objective.ratio, objective.surrogate,
            "" if objective.kl is None else objective.kl.estimator, objective.aggregate,
            objective.has_dual_clip, objective.has_correction, objective.needs_entropy,
        ),
        [float(x) for x in objective.numbers],  # on the CPU, always: nothing to wait for
        n,
    )  # fmt: skip

    def share(rows: Rows, mean: bool, through: bool, own: bool) -> list[int]:
        """One launch; addresses of the rows' mean log-ratio, of the derivative by it and of their coefficient."""
        found = [at.address(new(n)) if wanted else 0 for wanted in (mean, through, own)]
        places = [at.address(x, torch.int64) for x in rows]
        module.policy_units(fields, *common, (*places, rows.borders.shape[0] - 1), found, stream)
        return found

    mean = through = 0
    by_sequence = coefficient is None and objective.aggregate == "seq_mean_token_mean"
    if n and by_sequence and objective.ratio != "sequence":
        *_, fields[-1] = share(Rows(flat_offsets(batch)), False, False, True)
        by_sequence = False
    if n and by_unit:
        if objective.ratio == "segment" and units is None:
            units = ratio_level(batch.flat(), objective)
        rows = Rows(flat_offsets(batch)) if units is None else Rows(*arranged(units))
        # The ratio of cispo is a constant.
        mean, through, own = share(rows, True, needs[0] and objective.surrogate != "cispo", by_sequence)
        fields[-1] = own or fields[-1]
    outputs = [d_logp.data_ptr() if needs[0] else 0, d_entropy.data_ptr() if needs[1] else 0,
               *(x.data_ptr() for x in (scratch, loss, metrics))]  # fmt: skip
    chosen = sum(1 << PLACES[name] for name in names)
    module.policy_loss(fields, *common, (mean, through), outputs, chosen, stream)
    return Evaluated(loss, metrics, d_logp, d_entropy)


class Rows(NamedTuple):
    """Rows by unit: borders [units + 1], rows in that order [N] (None: as they lie), how many units there are [1]."""

    borders: Tensor
    order: Tensor | None = None
    known: Tensor | None = None
