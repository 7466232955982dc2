"""The raw policy loss: which implementation evaluates a batch or a chunk of it, and the custom op around that.

An implementation takes a batch's fields where they lie and returns the loss, all metrics and the gradients at once:
C++ (`policy_loss_native`) on the CPU, Triton (`policy_loss_triton`) on CUDA, or where that is asked for CUDA C++
(`policy_loss_cuda`). Custom objectives and float64 are for the reference alone, and so is everything where none of
these is live.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from rlcore.algorithms.objective import Objective, lookup
from rlcore.algorithms.policy_loss import FIELDS, Evaluated, PreparedBatch, chunk_loss, prepare_chunks
from rlcore.algorithms.policy_loss_metrics import Metrics, metric_names
from rlcore.algorithms.vocab_head import autograd_enabled
from rlcore.layout import TokenBatch
from rlcore.ops import backend, policy_loss_cuda, policy_loss_native, policy_loss_triton


def is_raw(logp: Tensor, entropy: Tensor | None, objective: Objective) -> bool:
    """Whether an objective of these scores may leave the reference at all (traced: whether it is an op)."""
    return (
        objective.custom_loss is None
        and logp.dtype != torch.float64
        and (entropy is None or entropy.dtype != torch.float64)
        and backend.requested() != "reference"
    )


def implementation(logp: Tensor, entropy: Tensor | None, objective: Objective) -> ModuleType | None:
    """The module whose `evaluate` computes this objective of these scores; None for the reference, as of no scores."""
    if not logp.numel() or not is_raw(logp, entropy, objective):
        return None
    if backend.runs_triton(logp, backend.requested()):
        return policy_loss_triton
    if backend.runs_cuda(logp):
        return policy_loss_cuda
    on_cpu = logp.device.type == "cpu" and backend.requested() in (None, "native")
    return policy_loss_native if on_cpu and backend.native() is not None else None


def evaluate_chunk(
    logp: Tensor, entropy: Tensor | None, prepared: PreparedBatch, start: int, stop: int, objective: Objective,
    gradients: bool = True,
) -> tuple[Tensor, Metrics, Tensor | None, Tensor | None] | None:  # fmt: skip
    """`chunk_loss` on rows [start, stop) with its gradients: (loss, metrics, d loss/d logp, d loss/d entropy).

    logp and entropy are [stop - start]. Gradients are None where not asked for, that of the entropy also where the
    objective has no entropy term. Returns None where there is no implementation but the reference, or no row.
    """
    module = implementation(logp, entropy, objective)
    if module is None:
        return None
    # Not batch.chunk: that makes the offsets of the chunk as well, which its rows' coefficients stand for here.
    rows = prepared.batch
    fields = {name: x[start:stop] for name in (*FIELDS, "mask", "kl_mask") if (x := getattr(rows, name)) is not None}
    part = rows.derived(target=rows.target[start:stop], **fields)
    units = None if prepared.level is None else prepared.level[start:stop]
    needs = (gradients, gradients and objective.needs_entropy)
    out = module.evaluate(logp, entropy, part, objective, needs, prepared.coefficient[start:stop], units)
    metrics = dict(zip(metric_names(part, objective, entropy is not None), out.metrics.unbind(), strict=True))
    return out.loss, metrics, out.d_logp if needs[0] else None, out.d_entropy if needs[1] else None


@torch.library.custom_op("rlcore::policy_loss", mutates_args=())
def policy_loss(
    logp: Tensor,
    entropy: Tensor | None,
    objective: str,
    numbers: Sequence[Tensor],
    batch: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw pass: (loss, metrics [K], d_logp [N], d_entropy [N]); gradients empty where `needs` is False.

    `objective` is the key under which the objective's structure is registered, `numbers` are its numbers, `batch` is
    `TokenBatch.tensors()`; the metrics are in the order of `metric_names`.
    """
    rows, structure = TokenBatch.from_tensors(list(batch)), lookup(objective, numbers)
    module = implementation(logp, entropy, structure)
    run = evaluate_reference if module is None else module.evaluate
    out = run(logp, entropy, rows, structure, (needs[0], needs[1]))
    return out.loss, out.metrics.clone(), out.d_logp, out.d_entropy


def evaluate_reference(
    logp: Tensor, entropy: Tensor | None, batch: TokenBatch, objective: Objective, needs: tuple[bool, bool]
) -> Evaluated:
    """`evaluate` by the reference and its gradients."""
    with autograd_enabled():
        x, h = logp.detach().requires_grad_(), None if entropy is None else entropy.detach().requires_grad_()
        prepared = prepare_chunks(batch, objective, x.dtype)
        loss, metrics = chunk_loss(x, h, prepared, 0, x.shape[0], objective)
        wanted = [leaf for leaf, needed in ((x, needs[0]), (h, needs[1])) if needed and leaf is not None]
        gradients = iter(torch.autograd.grad(loss, wanted) if wanted else ())
    d_logp, d_entropy = (next(gradients) if needed else x.new_empty(0) for needed in needs)
    return Evaluated(loss.detach(), torch.stack(list(metrics.values())).detach(), d_logp, d_entropy)


@policy_loss.register_fake
def _(
    logp: Tensor,
    entropy: Tensor | None,
    objective: str,
    numbers: Sequence[Tensor],
    batch: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    structure = lookup(objective, numbers)
    names = metric_names(TokenBatch.from_tensors(list(batch)), structure, entropy is not None)
    n = logp.numel()
    sizes = (n if needs[0] else 0, n if needs[1] else 0)
    return (logp.new_empty(()), logp.new_empty(len(names)), *(logp.new_empty(size) for size in sizes))  # type: ignore[return-value]
