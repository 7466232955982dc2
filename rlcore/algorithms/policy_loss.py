"""The clipped-surrogate family: one objective, evaluated in one order, on a whole minibatch or on a chunk of it.

    log-ratio -> level -> ratio -> surrogate -> off-policy correction -> weights and masks -> KL -> entropy
    -> aggregation

    loss = sum_i c_i [ w_i rho_i surrogate_i + beta KL_i - alpha H_i ],   c_i from the aggregation and the totals

Every term is a sum over rows with the minibatch's denominators in c_i, so the losses of chunks and micro-batches add.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms.objective import Numbers, Objective
from rlcore.algorithms.policy_loss_metrics import Metrics, anchor_metrics, custom_metric, ratio_metrics
from rlcore.algorithms.policy_loss_terms import anchor, importance_ratio, kl_divergence, surrogate, truncated_weight
from rlcore.layout import TokenBatch, group_borders, tokens_per_sequence


def policy_loss(
    logp: Tensor, batch: TokenBatch, objective: Objective, entropy: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """The loss of a (micro-)batch and its metrics, in plain differentiable torch.

    logp and entropy are [N] or [B, T] like `batch.target`; statistics and loss are float32 (float64 for float64).
    Returns the 0-d loss and a dict of 0-d metrics that `merge_metrics` can merge. Raises ValueError where the
    objective needs a field that the batch lacks. Source: PPO (1707.06347), GRPO (2402.03300), GSPO (2507.18071),
    CISPO (2506.13585), DAPO (2503.14476); the aggregation by minibatch totals is our own.
    """
    check_scores(logp, batch, objective, entropy)
    logp = full_precision(logp).reshape(-1)
    entropy = None if entropy is None else full_precision(entropy).reshape(-1)
    if objective.scope == "batch" and not batch.prepared:
        batch = objective.prepare(logp, entropy, batch)
    prepared = prepare_chunks(batch, objective, logp.dtype)
    loss, metrics = chunk_loss(logp, entropy, prepared, 0, prepared.batch.N, objective)
    if objective.debug:
        check_two_chunks(loss, logp, entropy, prepared, objective)
    return loss, metrics


class PreparedBatch(NamedTuple):
    """What chunks of one (micro-)batch share: its flat fields, cleaned under the mask, and the row coefficients."""

    batch: TokenBatch
    coefficient: Tensor  # [N] weight of each row's loss in the minibatch loss, 0 where masked
    per_token: Tensor  # [N] 1 / tokens of the minibatch, 0 where masked: the weight of a row in a metric
    level: Tensor | None  # [N] dense id of the sequence or segment whose ratio the row shares, or None
    numbers: Numbers  # the objective's, on the batch's device

    def borders(self, scope: str) -> list[int] | None:
        """Rows at which chunks may be cut: None for anywhere, else a host list from 0 to N."""
        assert self.batch.offsets is not None
        if scope in ("token", "batch"):
            return None
        starts: list[int] = self.batch.offsets.tolist()
        return starts if scope == "sequence" else [starts[s] for s in group_borders(self.batch)]


def prepare_chunks(batch: TokenBatch, objective: Objective, dtype: torch.dtype = torch.float32) -> PreparedBatch:
    """Do once per (micro-)batch what `chunk_loss` needs from all of it: row coefficients, ids and clean fields."""
    check_fields(batch, objective)
    batch = without_masked_values(batch.flat(), dtype)
    mask = torch.ones(batch.N, dtype=dtype, device=batch.device) if batch.mask is None else batch.mask.to(dtype)
    assert batch.totals is not None
    per_token = mask / batch.totals.tokens.to(dtype).clamp(min=1)
    numbers = objective.values(mask)
    coefficient = aggregation(batch, objective, mask, numbers)
    return PreparedBatch(batch, coefficient, per_token, ratio_level(batch, objective), numbers)


def aggregation(batch: TokenBatch, objective: Objective, mask: Tensor, numbers: Numbers) -> Tensor:
    """The coefficient of every row in the minibatch loss, [N].

    token_mean 1/tokens; seq_mean_token_mean 1/(tokens of the sequence * sequences); seq_mean_token_sum 1/sequences;
    seq_mean_token_sum_norm 1/(sequences * length), the constant of Dr. GRPO (2503.20783).
    """
    assert batch.totals is not None
    tokens = batch.totals.tokens.to(mask.dtype).clamp(min=1)
    sequences = batch.totals.sequences.to(mask.dtype).clamp(min=1)
    if objective.aggregate == "token_mean":
        return mask / tokens
    if objective.aggregate == "seq_mean_token_mean":
        length = tokens_per_sequence(batch).to(mask.dtype).clamp(min=1)
        return mask / (length[batch.sequence_id()] * sequences)
    if objective.aggregate == "seq_mean_token_sum":
        return mask / sequences
    return mask / (sequences * numbers.length)


def ratio_level(batch: TokenBatch, objective: Objective) -> Tensor | None:
    """Dense ids (0, 1, ... below N) of the unit that shares one ratio: a sequence, or a segment of a sequence."""
    if objective.ratio == "sequence":
        sequence = batch.sequence_id()
        begins = torch.ones_like(sequence)
        begins[1:] = (sequence.diff() != 0).long()
        return begins.cumsum(0) - 1
    if objective.ratio == "segment":
        assert batch.segment is not None
        # Two stable sorts order rows by (sequence, segment) without a product of ids that could overflow.
        by_segment = batch.segment.argsort(stable=True)
        order = by_segment[batch.sequence_id()[by_segment].argsort(stable=True)]
        sequence, segment = batch.sequence_id()[order], batch.segment[order]
        begins = torch.ones_like(order)
        begins[1:] = ((sequence.diff() != 0) | (segment.diff() != 0)).long()
        return torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1)
    return None


def chunk_loss(
    logp: Tensor, entropy: Tensor | None, prepared: PreparedBatch, start: int, stop: int, objective: Objective
) -> tuple[Tensor, Metrics]:
    """The part of the minibatch loss that rows [start, stop) contribute; differentiable in logp and entropy.

    logp and entropy are [stop - start]. Rows may be cut anywhere for token scope, at `prepared.borders(scope)` else.
    """
    rows = prepared.batch.chunk(start, stop)
    coefficient, per_token = prepared.coefficient[start:stop], prepared.per_token[start:stop]
    keep = coefficient.new_ones(stop - start, dtype=torch.bool) if rows.mask is None else rows.mask
    logp = torch.where(keep, logp, 0)
    entropy = None if entropy is None else torch.where(keep, entropy, 0)
    if objective.custom_loss is not None:
        return custom_chunk(logp, entropy, rows, coefficient, per_token, keep, objective)

    numbers = prepared.numbers
    log_ratio, ratio = importance_ratio(logp, rows, prepared.level, start, stop, objective)
    low = numbers.clip_low if rows.clip_low is None else rows.clip_low
    high = numbers.clip_high if rows.clip_high is None else rows.clip_high
    assert rows.advantage is not None
    loss = surrogate(logp, ratio, rows.advantage, low, high, numbers, objective)
    if objective.has_correction:
        loss = loss * truncated_weight(logp, rows, numbers)
    if rows.weight is not None:
        loss = loss * rows.weight
    total = (coefficient * loss).sum()

    metrics = ratio_metrics(log_ratio, ratio, rows.advantage, low, high, per_token, keep, numbers, objective)
    metrics["policy_loss"] = total.detach()
    if objective.kl is not None:
        kl = kl_divergence(logp, anchor(logp, rows), objective.kl.estimator)
        selected = coefficient if rows.kl_mask is None else coefficient * rows.kl_mask
        kl_loss = numbers.kl * (selected * kl).sum()
        total = total + kl_loss
        metrics["kl_loss"] = kl_loss.detach()
    if objective.needs_entropy:
        assert entropy is not None
        entropy_loss = -numbers.entropy * (coefficient * entropy).sum()
        total = total + entropy_loss
        metrics["entropy_loss"] = entropy_loss.detach()
    metrics |= anchor_metrics(logp, entropy, rows, per_token, keep, numbers, objective)
    metrics["loss"] = total.detach()
    return total, metrics


def custom_chunk(
    logp: Tensor, entropy: Tensor | None, rows: TokenBatch, coefficient: Tensor, per_token: Tensor, keep: Tensor,
    objective: Objective,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """One chunk of a user's objective: its per-token loss aggregated like any other, its metrics as token means."""
    assert objective.custom_loss is not None
    loss, named = objective.custom_loss(logp, entropy, rows)
    if loss.shape != logp.shape:
        raise ValueError(f"custom objective: expected a loss of shape {tuple(logp.shape)}; got {tuple(loss.shape)}")
    total = (coefficient * torch.where(keep, loss, 0)).sum()
    metrics = {"tokens": keep.sum().to(logp.dtype), "loss": total.detach()}
    for name, value in named.items():
        metrics[name] = custom_metric(name, value.detach(), per_token, keep)
    return total, metrics


def without_masked_values(batch: TokenBatch, dtype: torch.dtype) -> TokenBatch:
    """Constants in the loss's dtype, detached, and 0 wherever the mask is 0: masked NaN never meets arithmetic."""
    clean: dict[str, Any] = {}
    for name in ("advantage", "old_logp", "ref_logp", "rollout_logp", "weight", "clip_low", "clip_high", "value",
                 "old_value", "returns"):  # fmt: skip
        x = getattr(batch, name)
        if x is not None:
            x = x.detach().to(dtype)
            clean[name] = x if batch.mask is None else torch.where(batch.mask, x, 0)
    return batch.derived(**clean)


def full_precision(x: Tensor) -> Tensor:
    """float64 stays, everything narrower is float32: losses are never rounded below that."""
    return x if x.dtype == torch.float64 else x.float()


def check_two_chunks(
    loss: Tensor, logp: Tensor, entropy: Tensor | None, prepared: PreparedBatch, objective: Objective
) -> None:
    """Debug mode: a custom objective must not depend on where its chunks are cut."""
    borders = prepared.borders(objective.scope) or list(range(prepared.batch.N + 1))
    middle = borders[len(borders) // 2]
    with torch.no_grad():
        parts = [
            chunk_loss(logp[a:b], None if entropy is None else entropy[a:b], prepared, a, b, objective)[0]
            for a, b in ((0, middle), (middle, prepared.batch.N))
            if b > a
        ]
    one, two = loss.item(), torch.stack(parts).sum().item()
    if abs(one - two) > 1e-4 * max(1.0, abs(one)):
        raise ValueError(
            f"custom objective: its loss depends on where a batch is cut (one chunk {one:.6g}, two chunks {two:.6g}); "
            'declare scope="sequence", "group" or "batch"'
        )


def check_scores(logp: Tensor, batch: TokenBatch, objective: Objective, entropy: Tensor | None) -> None:
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch: expected an rl.TokenBatch; got {type(batch).__name__}")
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected an rl.Objective; got {type(objective).__name__}")
    for name, x in (("logp", logp), ("entropy", entropy)):
        if x is None and name == "entropy":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype; got {x.dtype}")
        if x.shape != batch.shape:
            raise ValueError(f"{name}: expected shape {tuple(batch.shape)} like batch.target; got {tuple(x.shape)}")
    if objective.needs_entropy and entropy is None:
        raise ValueError("entropy: the objective has an entropy term, but no entropy was given")


def check_fields(batch: TokenBatch, objective: Objective) -> None:
    """Everything that the objective reads must be there; a micro-batch of batch scope must have been prepared."""
    if objective.scope == "batch" and not batch.prepared:
        raise ValueError(
            "batch: the objective has batch scope; call objective.prepare(logp, entropy, batch) on the whole minibatch "
            "before splitting it"
        )
    if objective.custom_loss is not None:
        return
    needed = {"advantage": True, "rollout_logp": objective.has_correction, "ref_logp": objective.kl is not None,
              "segment": objective.ratio == "segment"}  # fmt: skip
    for name, is_needed in needed.items():
        if is_needed and getattr(batch, name) is None:
            raise ValueError(f"batch.{name}: the objective reads it, but the batch has none")


# What the built-in objectives read of a batch, per token.
FIELDS = ("advantage", "old_logp", "ref_logp", "rollout_logp", "weight", "clip_low", "clip_high")


class Evaluated(NamedTuple):
    """A loss with its metrics [K], in the order of `metric_names`, and gradients ([N] each, empty if not asked for)."""

    loss: Tensor
    metrics: Tensor
    d_logp: Tensor
    d_entropy: Tensor
