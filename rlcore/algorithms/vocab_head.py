"""The vocabulary head: hidden states x lm_head -> log-prob and entropy per token, or straight to a policy loss.

    a = logit_scale * (h W^T + b)        z = softcap * tanh(a / softcap) / temperature   (no softcap: a / temperature)
    logp_i = z_i[y_i] - lse(z_i)         H_i = -sum_v p_iv log p_iv

Three forms, whose matrix work is counted in FLOPs for N tokens, hidden size H, vocabulary V:

    linear_logprob   plain autograd: the reference. Twice differentiable; holds the logits.
    folded           6NHV: per chunk of tokens GEMM -> statistics -> the objective's d loss / d logp, d loss / d entropy
                     -> d logits in place -> two GEMMs. No logits in memory, no recompute.
    frozen_head      4NHV: without a gradient for the head, d logp_i / d h_i = sum_v (1[v = y_i] - p_iv) dz/da_iv w_v is
                     known in the forward pass.

Row i of `hidden` predicts target[i]; nothing shifts. Masked rows never meet arithmetic, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_chunks as chunks
from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_products as products
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.objective import Objective
from rlcore.algorithms.policy_loss import PreparedBatch, check_two_chunks, chunk_loss, policy_loss, prepare_chunks
from rlcore.algorithms.vocab_head_inputs import (
    Number,
    as_in_linear,
    check_head,
    check_scores,
    per_row,
    scale_of,
    statistics_dtype,
)
from rlcore.algorithms.vocab_head_passes import LOG_ZERO, TORCH, Coefficients, RowPasses, Scale, to_fit
from rlcore.algorithms.vocab_head_products import HeadGradients, Rows
from rlcore.layout import TokenBatch
from rlcore.metrics import merge_metrics


class LogProbs(NamedTuple):
    """Per token, in the target's shape, float32 (float64 for float64 inputs); 0 on masked rows."""

    logp: Tensor
    entropy: Tensor | None  # None unless asked for
    # With `statistics`, and without a gradient: the likeliest token (of several the lowest id) in int64, its log-prob,
    # and sum_v p_v^2.
    top1: Tensor | None = None
    top1_logp: Tensor | None = None
    sum_sq: Tensor | None = None


# ------------------------------------------------------------------------------------------------ the formula


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
) -> Tensor:
    """z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature, [..., H] x [V, H] -> [..., V].

    float32, or float64 for float64 inputs: low-precision inputs are upcast before the product. `temperature` is a
    number or one per row [...]. Own; softcap as in Gemma 2 (2408.00118).
    """
    hidden, weight, bias = as_in_linear(hidden, weight, bias)
    dtype = statistics_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        z = hidden.to(dtype) @ weight.to(dtype).t()
        if bias is not None:
            z = z + bias.to(dtype)
        z = z * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return z / per_row(temperature, z)


def logprob(
    logits: Tensor,
    target: Tensor,
    temperature: Number = 1.0,
    entropy: bool = False,
    mask: Tensor | None = None,
    statistics: bool = False,
) -> LogProbs:
    """logp = log_softmax(z / temperature)[target] and the entropy, from logits [..., V] that exist; plain autograd.

    `statistics` adds the likeliest token, its log-prob and sum_v p_v^2, without a gradient.
    """
    check_scores(logits, target, mask, temperature)
    V = logits.shape[-1]
    z = logits if logits.dtype == torch.float64 else logits.float()
    kept = torch.ones_like(target, dtype=torch.bool) if mask is None else mask != 0
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        selection.check_target(target.reshape(-1), V, kept.reshape(-1))
    z = torch.where(kept[..., None], z / per_row(temperature, z), 0)
    label, valid = reference.valid_labels(torch.where(kept, target, 0).long(), V)
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, label[..., None]).squeeze(-1)
    logp = torch.where(kept, torch.where(valid, logp, torch.nan), 0)
    out = LogProbs(logp, None)
    if entropy:
        H = -(log_p.exp() * log_p.clamp(min=LOG_ZERO)).sum(-1)
        out = out._replace(entropy=torch.where(kept, H, 0))
    if not statistics:
        return out
    fixed = z.detach()
    found = (fixed.argmax(-1), log_p.detach().amax(-1), fixed.softmax(-1).square().sum(-1))
    return LogProbs(out.logp, out.entropy, *(torch.where(kept, x, 0) for x in found))


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
    statistics: bool = False,
) -> LogProbs:
    """Log-probs of `target` [N] or [B, T] (and entropies) under the head, in plain autograd: the reference."""
    check_head(hidden, weight, target, bias, mask, temperature, softcap, logit_scale)
    if mask is not None:
        hidden = torch.where((mask != 0)[..., None], hidden, 0)
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = torch.where(mask != 0, temperature, 1)
    z = logits(hidden, weight, bias, temperature, softcap, logit_scale)
    return logprob(z, target, 1.0, entropy, mask, statistics)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    objective: Objective,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """policy_loss(linear_logprob(...)) in plain autograd: what the folded form must equal."""
    out = linear_logprob(hidden, weight, batch.target, bias, temperature, softcap, logit_scale, True, batch.mask)
    return policy_loss(out.logp, batch, objective, out.entropy)


# ------------------------------------------------------------------------------------------------ frozen head


@torch.no_grad()
def frozen_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    mask: Tensor | None = None,
) -> tuple[LogProbs, Tensor]:
    """Log-probs and d logp / d hidden, 4NHV: d hidden of any loss is then d loss / d logp times that row.

    hidden [N, H], target [N]. The gradient row is sum_v (1[v = y] - p_v) dz_v/da_v w_v. Own.
    """
    check_head(hidden, weight, target, bias, mask, temperature, softcap, logit_scale)
    scale = scale_of(hidden, temperature, softcap, logit_scale)._replace(bias=bias)
    keep = None if mask is None else mask != 0
    head = (hidden, weight, target.long(), keep, scale)
    stats, slope = chunks.forward_chunks(*head, entropy=False, gradient=True)
    return LogProbs(stats.logp, None), slope


# ------------------------------------------------------------------------------------------------ folded


class Folded(NamedTuple):
    """A folded loss: the 0-d loss, its metrics, and its gradients (empty where not needed) in the statistics' dtype."""

    loss: Tensor
    metrics: dict[str, Tensor]
    d_hidden: Tensor  # [N, H]
    d_weight: list[Tensor]  # [V, H], in one piece or in slices of the vocabulary
    d_bias: Tensor  # [V]


class Piece(NamedTuple):
    """Rows [start, stop) that the objective sees at once, and those of them that enter the GEMM."""

    start: int
    stop: int
    rows: Rows


@torch.no_grad()
def folded(
    hidden: Tensor,
    weight: Tensor,
    batch: TokenBatch,
    objective: Objective,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    needs: tuple[bool, bool, bool] = (True, True, True),
    passes: RowPasses = TORCH,
    chunk_bytes: int | None = None,
) -> Folded:
    """The policy loss and its gradients in one walk over chunks of tokens, 6NHV, no logits in memory.

    hidden [N, H] flat; `batch` [N] or [B, T] of as many rows; `needs` says which of d hidden, d weight and d bias are
    wanted (none: 2NHV). Chunks are cut anywhere for objectives of token scope, at sequence or group borders else; a
    sequence (group) longer than a chunk is walked twice (8NHV for it), so the memory bound holds: `chunk_bytes` of
    logits, by default `selection.CHUNK_BYTES`. Own.
    """
    scale = scale_of(hidden, temperature, softcap, logit_scale)._replace(bias=bias)
    dtype, N, V = scale.logit_scale.dtype, hidden.shape[0], weight.shape[0]
    if objective.scope == "batch" and not batch.prepared:
        whole = batch.flat()
        head = (hidden, weight, whole.target.long(), whole.mask, scale)
        stats, _ = chunks.forward_chunks(*head, entropy=True, passes=passes, chunk_bytes=chunk_bytes)
        batch = objective.prepare(stats.logp.reshape(batch.shape), stats.entropy.reshape(batch.shape), batch)
    prepared = prepare_chunks(batch, objective, dtype)
    mask = prepared.batch.mask
    rows = selection.kept_rows(mask, N)
    target, scale = chunks.neutral(mask, prepared.batch.target.long(), scale)
    selection.check_target(target, V, rows)
    gradients = HeadGradients(hidden, weight, needs, dtype)
    buffer = chunks.chunk_buffer(hidden, weight, rows, dtype, chunk_bytes, d_hidden=needs[0])
    walk = Walk(hidden, weight, target, mask, scale, prepared, objective, gradients, buffer, passes)
    bound = buffer.shape[0]
    losses, metrics = [], []
    for piece in pieces(rows, N, bound, prepared.borders(objective.scope), hidden.device):
        step = fold_piece if selection.count(piece.rows) <= bound else fold_long_piece
        loss, found = step(walk, piece)
        losses.append(loss)
        metrics.append(found)
    loss = torch.stack(losses).sum()
    if objective.debug:
        head = (hidden, weight, target, mask, scale)
        stats, _ = chunks.forward_chunks(*head, entropy=True, buffer=buffer, passes=passes)
        check_two_chunks(loss, stats.logp, stats.entropy, prepared, objective)
    return Folded(loss, merge_metrics(metrics), gradients.hidden, gradients.weight, gradients.bias)


class Walk(NamedTuple):
    """What every piece of a folded walk shares."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    mask: Tensor | None
    scale: Scale
    prepared: PreparedBatch
    objective: Objective
    gradients: HeadGradients
    buffer: Tensor  # fp32 logits of one chunk
    passes: RowPasses


def fold_piece(walk: Walk, piece: Piece) -> tuple[Tensor, dict[str, Tensor]]:
    """One chunk: GEMM -> statistics -> objective -> d logits in place -> two GEMMs."""
    rows = piece.rows
    h = selection.take_hidden(walk.hidden, rows, walk.mask, products.product_dtype(walk.weight, walk.buffer.dtype))
    z = products.project(h, walk.weight, walk.buffer[: selection.count(rows)])
    target, scale = walk.target[rows], walk.scale.of(rows)
    stats = walk.passes.statistics(z, target, scale, True)
    logp, entropy = spread(stats.logp, piece), spread(stats.entropy, piece)
    loss, metrics, d = differentiate(logp, entropy, walk, piece)
    if any(walk.gradients.needs):
        d, factor = to_fit(d.of(within(piece)), stats, scale, h.dtype)
        d_logits, keep = walk.passes.gradient(z, target, stats, d, scale, raw=False, drop=True, dtype=h.dtype)
        left = selection.keep_within(rows, keep)
        walk.gradients.add(left, h[keep], walk.weight, d_logits, factor)
    return loss, metrics


def fold_long_piece(walk: Walk, piece: Piece) -> tuple[Tensor, dict[str, Tensor]]:
    """A sequence or group longer than a chunk: statistics of all its chunks, the objective, then recompute."""
    head = (walk.hidden, walk.weight, walk.target, walk.mask, walk.scale)
    stats, _ = chunks.forward_chunks(*head, entropy=True, rows=piece.rows, buffer=walk.buffer, passes=walk.passes)
    span = slice(piece.start, piece.stop)
    loss, metrics, d = differentiate(stats.logp[span].clone(), stats.entropy[span].clone(), walk, piece)
    if any(walk.gradients.needs):
        on_all_rows = Coefficients(*(None if x is None else pad(x, piece, walk.hidden.shape[0]) for x in d))  # type: ignore[arg-type]
        chunks.backward_chunks(
            *head, stats, on_all_rows, walk.gradients, rows=piece.rows, buffer=walk.buffer, passes=walk.passes
        )
    return loss, metrics


def differentiate(
    logp: Tensor, entropy: Tensor, walk: Walk, piece: Piece
) -> tuple[Tensor, dict[str, Tensor], Coefficients]:
    """The objective on rows [start, stop): its loss and metrics, d loss / d logp and d loss / d entropy."""
    args = (walk.prepared, piece.start, piece.stop, walk.objective)
    if walk.passes.objective is not None:
        found = walk.passes.objective(logp, entropy, *args, any(walk.gradients.needs))
        if found is not None:
            loss, metrics, d_logp, d_entropy = found
            return loss, metrics, Coefficients(torch.zeros_like(logp) if d_logp is None else d_logp, d_entropy)
    if not any(walk.gradients.needs):
        loss, metrics = chunk_loss(logp, entropy, *args)
        return loss.detach(), metrics, Coefficients(torch.zeros_like(logp), None)
    with autograd_enabled():
        logp, entropy = logp.requires_grad_(), entropy.requires_grad_()
        loss, metrics = chunk_loss(logp, entropy, *args)
        d_logp = d_entropy = None
        if loss.requires_grad:
            d_logp, d_entropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    metrics = {name: value.detach() for name, value in metrics.items()}
    return loss.detach(), metrics, Coefficients(torch.zeros_like(logp) if d_logp is None else d_logp, d_entropy)


@contextmanager
def autograd_enabled() -> Iterator[None]:
    """Record operations even inside a custom op, below whose autograd key torch records nothing."""
    autograd_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    for key in ("AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        autograd_keys = autograd_keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - autograd_keys), torch.enable_grad():
        yield


def pieces(rows: Rows, N: int, bound: int, borders: list[int] | None, device: torch.device) -> Iterator[Piece]:
    """Cut [0, N) into pieces that hold at most `bound` rows for the GEMM, at `borders` (None: anywhere)."""
    if borders is None:
        parts = selection.even_chunks(rows, bound, device)
        ends = [part.stop if isinstance(part, slice) else int(part[-1]) + 1 for part in parts]
        ends = [*ends[:-1], N]
    else:
        ends, begin = [], 0
        counts = [before(rows, border) for border in borders]
        for i, border in enumerate(borders[1:], 1):
            if counts[i] - begin > bound and i > 1 and borders[i - 1] > (ends[-1] if ends else 0):
                ends.append(borders[i - 1])
                begin = counts[i - 1]
            if i == len(borders) - 1:
                ends.append(border)
    start = 0
    for stop in ends:
        if isinstance(rows, slice):
            yield Piece(start, stop, slice(start, stop))
        else:
            yield Piece(start, stop, rows[before(rows, start) : before(rows, stop)])
        start = stop


def before(rows: Rows, border: int) -> int:
    """How many of the rows lie before a border."""
    return border if isinstance(rows, slice) else int(torch.searchsorted(rows, border))


def within(piece: Piece) -> Rows:
    """The piece's GEMM rows, counted from its start."""
    if isinstance(piece.rows, slice):
        return slice(piece.rows.start - piece.start, piece.rows.stop - piece.start)
    return piece.rows - piece.start


def spread(x: Tensor, piece: Piece) -> Tensor:
    """Values of the GEMM rows -> values of all rows of the piece, 0 where masked."""
    out = x.new_zeros(piece.stop - piece.start)
    out[within(piece)] = x
    return out


def pad(x: Tensor, piece: Piece, N: int) -> Tensor:
    out = x.new_zeros(N)
    out[piece.start : piece.stop] = x
    return out
