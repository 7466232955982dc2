"""The vocabulary head: log-probs and entropies without logits in memory, or straight to a policy loss.

    a = logit_scale * (h W^T + b)        z = softcap * tanh(a / softcap) / temperature   (no softcap: a / temperature)

`hidden` is [N, H] or [B, T, H] and row i predicts target[i]; nothing shifts. hidden, weight and bias are float32,
bfloat16, float16 or float64 of one dtype, or what autocast makes of them. Statistics, log-probs and losses are float32
(float64 for float64 inputs); d weight accumulates in that dtype and is rounded to the weight's at the end.
Masked rows are dropped, whatever they hold; so are rows without a gradient before the gradient GEMMs (on CPU; on a
GPU, where their number is not known without a sync, they are zero). An out-of-range label raises on CPU and gives NaN
on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head as algorithm
from rlcore.algorithms.objective import Objective
from rlcore.algorithms.policy_loss import check_fields
from rlcore.algorithms.policy_loss_metrics import metric_names
from rlcore.algorithms.vocab_head import LogProbs
from rlcore.algorithms.vocab_head_inputs import (
    Number,
    as_number,
    autocast_dtype,
    check_overwritable,
    check_scores,
    flat_head,
    statistics_dtype,
)
from rlcore.layout import TokenBatch
from rlcore.ops import backend
from rlcore.ops.policy_loss import distinct, policy_loss, wants_gradient
from rlcore.ops.vocab_head_autograd import FrozenLogprob, LinearLogprob, LinearPolicyLoss, Logprob

__all__ = ["LogProbs", "linear_logprob", "linear_policy_loss", "logprob"]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    entropy: bool = False,
    mask: Tensor | None = None,
    chunk_bytes: int | None = None,
    statistics: bool = False,
) -> LogProbs:
    """Log-prob of `target` under the head, and the entropy if asked for: LogProbs(logp, entropy, ...), differentiable.

    logp_i = z_i[y_i] - lse(z_i), H_i = -sum_v p_iv log p_iv, in the shape of `target` ([N] or [B, T]), 0 where masked.
    weight [V, H], bias [V], `temperature` a number or one per row, `mask` bool or 0/1. Gradients flow to hidden, weight
    and bias. 2NHV FLOPs forward; backward 6NHV by recompute, or none where the head is frozen and logp alone is
    asked for: then the forward pass is 4NHV. `statistics` adds what no gradient flows through: top1, the likeliest
    token (of several the lowest id), its log-prob top1_logp, and sum_sq = sum_v p_v^2. `chunk_bytes` bounds the float32
    logits that exist at once (by default 51 MiB on a CPU, 2.45 GiB on a GPU; one row at least). Raises TypeError and
    ValueError that name the argument; a double backward raises RuntimeError (use the reference backend). Own.
    """
    invariant = backend.is_batch_invariant(hidden)
    if backend.requested() == "reference":
        return algorithm.linear_logprob(
            hidden, weight, target, bias, temperature, softcap, logit_scale, entropy, mask,
            statistics,
        )  # fmt: skip
    head = flat_head(hidden, weight, target, bias, mask, temperature, softcap, logit_scale, chunk_bytes)
    dtype, requested = autocast_dtype(hidden), backend.requested() or ""
    frozen = not any(wants_gradient(x) for x in (weight, bias))
    if frozen and not entropy and not statistics and not invariant and wants_gradient(hidden):
        logp = FrozenLogprob.apply(*head, dtype, chunk_bytes, requested)
        return LogProbs(logp.reshape(target.shape), None)
    found = LinearLogprob.apply(*head, entropy, dtype, chunk_bytes, invariant, statistics, requested)
    return shaped(found, target, entropy)


def shaped(found: tuple[Tensor | None, ...], target: Tensor, entropy: bool) -> LogProbs:
    """Flat results in the target's shape."""
    logp, H, *more = (None if x is None else x.reshape(target.shape) for x in found)
    assert logp is not None
    return LogProbs(logp, H if entropy else None, *more)


def logprob(
    logits: Tensor,
    target: Tensor,
    temperature: Number = 1.0,
    entropy: bool = False,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    statistics: bool = False,
) -> LogProbs:
    """The same from logits [N, V] or [B, T, V] that exist already: z = logits / temperature.

    Low-precision logits are upcast block by block; no float32 copy of all of them is made. Raises as `linear_logprob`.

    `inplace_backward` writes the gradient over the logits, which saves a tensor of their size; backward runs once. Only
    for logits that nothing needs afterwards: torch raises where another op has saved them for a later backward pass
    (they have a new version), and a second run raises RuntimeError. ValueError for logits that are, or are a view of,
    a leaf that requires grad, and for rows that overlap in memory. No effect inside torch.compile, which plans its own
    memory, and with the reference backend.
    """
    if inplace_backward:
        check_overwritable(logits)
    if backend.requested() == "reference":
        return algorithm.logprob(logits, target, temperature, entropy, mask, statistics)
    check_scores(logits, target, mask, temperature)
    by_row = as_number(temperature, statistics_dtype(logits), logits.device)
    keep = None if mask is None else (mask != 0).reshape(-1)
    in_place = bool(inplace_backward) and not torch.compiler.is_compiling()
    by_row = by_row if by_row.dim() == 0 else by_row.reshape(-1)
    requested = backend.requested() or ""
    found = Logprob.apply(logits, target.reshape(-1), keep, by_row, entropy, in_place, statistics, requested)
    return shaped(found, target, entropy)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    objective: Objective,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of the head's log-probs and entropies, folded into the head's walk over chunks of tokens: 6NHV.

    hidden is [N, H] or [B, T, H] like batch.target; bias, temperature, softcap, logit_scale and chunk_bytes as in
    `linear_logprob`.
    Returns the 0-d loss (float32, or float64 for float64 inputs), differentiable in hidden, weight and bias, and the
    metrics of `policy_loss`, entropy included. The gradients are made in the forward pass, where anything requires
    them, and scaled by the incoming gradient: backward runs once; a second run or a double backward raises
    RuntimeError (use the reference backend). An objective of batch scope costs one more forward walk. Own.
    """
    if hidden.shape[:-1] != batch.shape:
        expected = f"{(*batch.shape, 'H')}, that of batch.target and the hidden size"
        raise ValueError(f"hidden: expected shape {expected}; got {tuple(hidden.shape)}")
    numbers = (temperature, softcap, logit_scale)
    if backend.is_batch_invariant(hidden):
        out = linear_logprob(hidden, weight, batch.target, bias, *numbers, True, batch.mask, chunk_bytes)
        return policy_loss(out.logp, batch, objective, out.entropy)
    if backend.requested() == "reference":
        return algorithm.linear_policy_loss(hidden, weight, batch, objective, bias, *numbers)
    flat, _, _, _, _, *scale = flat_head(hidden, weight, batch.target, bias, batch.mask, *numbers, chunk_bytes)
    if objective.scope == "batch" and not batch.prepared:
        with torch.no_grad():
            out = linear_logprob(hidden, weight, batch.target, bias, *numbers, True, batch.mask, chunk_bytes)
        batch = objective.prepare(out.logp, out.entropy, batch)
    check_fields(batch, objective)
    needs = (wants_gradient(hidden), wants_gradient(weight), wants_gradient(bias))
    tensors, places = distinct([*objective.numbers, *batch.tensors()])
    loss, values = LinearPolicyLoss.apply(
        flat, weight, bias, *scale, autocast_dtype(hidden), chunk_bytes, needs, backend.requested() or "",
        objective.key, batch.prepared, len(objective.numbers), places, *tensors,
    )  # fmt: skip
    names = metric_names(batch, objective, entropy=True)
    return loss, dict(zip(names, values.unbind(), strict=True))
