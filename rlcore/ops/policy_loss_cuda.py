"""The policy loss in CUDA C++ (csrc/cuda/policy_loss.cu), for `rl.backend("cuda")`: loss, gradients and all metrics of
a batch in one launch, two where rows of a sequence or a segment share something. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.objective import Objective
from rlcore.algorithms.policy_loss import FIELDS, Evaluated
from rlcore.algorithms.policy_loss_metrics import METRICS, metric_names
from rlcore.layout import TokenBatch
from rlcore.ops import backend
from rlcore.ops.policy_loss_launch import Arguments, structure, unit_launches

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
    without: they follow from its offsets and segments. N is not 0.
    """
    assert batch.totals is not None
    module, n, at, stream = backend.cuda(), logp.numel(), Arguments(), backend.cuda_stream(logp)
    names = metric_names(batch, objective, entropy is not None)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=logp.device)  # noqa: E731
    loss, metrics, scratch = new(), new(len(names)), new(module.policy_loss_scratch(n))
    d_logp, d_entropy = new(n if needs[0] else 0), new(n if needs[1] else 0)
    fields = [
        at.address(logp), at.address(entropy), *(at.address(getattr(batch, name)) for name in FIELDS),
        at.address(batch.mask, torch.bool), at.address(batch.kl_mask, torch.bool), at.address(coefficient),
    ]  # fmt: skip
    totals = (at.address(batch.totals.tokens), at.address(batch.totals.sequences))
    numbers = [float(x) for x in objective.numbers]  # on the CPU, always: nothing to wait for
    common, mean, through = (totals, structure(objective), numbers, n), 0, 0
    for rows, wanted in unit_launches(batch, objective, needs[0], coefficient, units):
        places = [at.address(x, torch.int64) for x in rows]
        mean, through, own = found = [at.address(new(n)) if x else 0 for x in wanted]
        module.policy_units(fields, *common, (*places, rows.borders.shape[0] - 1), found, stream)
        fields[-1] = own or fields[-1]
    outputs = [d_logp.data_ptr() if needs[0] else 0, d_entropy.data_ptr() if needs[1] else 0,
               *(x.data_ptr() for x in (scratch, loss, metrics))]  # fmt: skip
    chosen = sum(1 << PLACES[name] for name in names)
    module.policy_loss(fields, *common, (mean, through), outputs, chosen, stream)
    return Evaluated(loss, metrics, d_logp, d_entropy)
