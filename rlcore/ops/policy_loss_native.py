"""The policy loss in C++: loss, gradients and all metrics of a float32 batch on the CPU in one pass.

The pass reads a batch's fields where they lie; nothing is cleaned, repeated or flattened before it. Custom objectives,
float64 and other devices stay with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms.objective import Objective, lookup
from rlcore.algorithms.policy_loss import Metrics, PreparedBatch, chunk_loss, metric_names, prepare_chunks, ratio_level
from rlcore.algorithms.vocab_head import autograd_enabled
from rlcore.layout import TokenBatch, flat_offsets
from rlcore.ops import backend

FIELDS = ("advantage", "old_logp", "ref_logp", "rollout_logp", "weight", "clip_low", "clip_high")


class Evaluated(NamedTuple):
    """A loss with its metrics [K] and gradients ([N] each, empty where not asked for)."""

    loss: Tensor
    metrics: Tensor
    d_logp: Tensor
    d_entropy: Tensor


def is_native(logp: Tensor, entropy: Tensor | None, objective: Objective) -> bool:
    """Whether the C++ pass computes this objective of these scores (traced: the op, which can do without)."""
    return (
        objective.custom_loss is None
        and logp.device.type == "cpu"
        and logp.dtype != torch.float64
        and (entropy is None or entropy.dtype != torch.float64)
        and backend.requested() in (None, "native")
        and (torch.compiler.is_compiling() or backend.native() is not None)
    )


class Arguments:
    """Addresses for the C++ pass, and the tensors behind them kept alive."""

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
        "unit" if has_units else objective.ratio,
        objective.surrogate,
        "" if objective.kl is None else objective.kl.estimator,
        objective.aggregate,
        objective.has_dual_clip,
        objective.has_correction,
        objective.needs_entropy,
        base,
        count,
        loss.data_ptr(),
        metrics.data_ptr(),
        torch.get_num_threads(),
    )
    return Evaluated(loss, metrics[:written], d_logp, d_entropy)


def native_chunk(
    logp: Tensor, entropy: Tensor | None, prepared: PreparedBatch, start: int, stop: int, objective: Objective,
    gradients: bool = True,
) -> tuple[Tensor, Metrics, Tensor | None, Tensor | None]:  # fmt: skip
    """`chunk_loss` on rows [start, stop) with its gradients: (loss, metrics, d loss/d logp, d loss/d entropy).

    logp and entropy [stop - start] float32 on the CPU, for objectives and backends that `is_native` allows. Gradients
    are None where not asked for, that of the entropy also where the objective has no entropy term.
    """
    # Not batch.chunk: that makes the offsets of the chunk as well, which its rows' coefficients stand for here.
    rows = prepared.batch
    fields = {name: x[start:stop] for name in (*FIELDS, "mask", "kl_mask") if (x := getattr(rows, name)) is not None}
    part = rows.derived(target=rows.target[start:stop], **fields)
    units = None if prepared.level is None else prepared.level[start:stop]
    needs = (gradients, gradients and objective.needs_entropy)
    out = evaluate(logp, entropy, part, objective, needs, prepared.coefficient[start:stop], units)
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
    run = evaluate if backend.native() is not None else evaluate_reference
    out = run(logp, entropy, rows, structure, (needs[0], needs[1]))
    return out.loss, out.metrics.clone(), out.d_logp, out.d_entropy


def evaluate_reference(
    logp: Tensor, entropy: Tensor | None, batch: TokenBatch, objective: Objective, needs: tuple[bool, bool]
) -> Evaluated:
    """`evaluate` without the C++ pass: the reference and its gradients."""
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
