"""Differentiation of the vocabulary head: autograd functions around its raw passes.

recompute  logits are made again in the backward pass (8NHV in all); any number of backward runs.
frozen     d logp / d hidden is stored by the forward pass (4NHV); any number of backward runs.
folded     the loss's gradients are stored by the forward pass (6NHV) in float32 and scaled in place by the incoming
           gradient, so that a large loss scale meets them before they are rounded to fp16; one backward run.
None can be differentiated twice: the reference backend can. A backward pass runs on the backend of its forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rlcore.algorithms.vocab_head_inputs import cast
from rlcore.ops import vocab_head_raw as raw

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype | None]
USE_REFERENCE = 'use `with rl.backend("reference"):` around the forward pass'


def refuse_double_backward() -> None:
    """Autograd records a backward run only to differentiate it again; refuse at once, never with a missing term."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"rlcore's fused head can not be differentiated twice (create_graph=True); {USE_REFERENCE}")


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def as_given(hidden: Tensor, weight: list[Tensor], bias: Tensor, needs: Sequence[bool], dtypes: Dtypes) -> Gradients:
    """d hidden, d weight and d bias in the inputs' dtypes, None where not needed; `weight` is emptied."""
    return (
        hidden.to(dtypes[0]) if needs[0] else None,
        assembled(weight, dtypes[1]) if needs[1] else None,
        bias.to(dtypes[2]) if needs[2] and dtypes[2] is not None else None,
    )


def assembled(slices: list[Tensor], dtype: torch.dtype) -> Tensor:
    """d weight [V, H] of its slices, each given back as soon as it is copied: two whole ones never exist."""
    if len(slices) == 1:
        return slices[0].to(dtype)
    if torch.compiler.is_compiling():  # compiled code gives back what it has read by itself
        return torch.cat([x.to(dtype) for x in slices])
    whole = slices[0].new_empty((sum(len(x) for x in slices), slices[0].shape[1]), dtype=dtype)
    start = 0
    while slices:
        x = slices.pop(0)
        whole[start : start + len(x)] = x
        start += len(x)
    return whole


Statistics = tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]


def constants(
    ctx: Any, log_sum: Tensor, H: Tensor, more: Sequence[Tensor], entropy: bool, statistics: bool
) -> Statistics:
    """(top1, its log-prob, sum of squares), None unless asked for; marks what takes no gradient, H among it."""
    found = (more[0], 0 - log_sum, more[1]) if statistics else (None, None, None)
    ctx.mark_non_differentiable(*(() if entropy else (H,)), *(x for x in found if x is not None))
    return found


class LinearLogprob(Function):
    """logp, entropy, top1, its log-prob and the sum of squares [N]; gradients of the first two by recompute."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None,
        temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor, entropy: bool, dtype: torch.dtype | None,
        chunk_bytes: int | None, batch_invariant: bool, statistics: bool, requested: str,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.chosen = chunk_bytes, requested
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        head = (cast(hidden, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype), target, mask,
                temperature, softcap, logit_scale)  # fmt: skip
        maximum, log_sum, logp, H, *more = raw.linear_logprob_forward(
            *head, entropy, chunk_bytes, batch_invariant, statistics, requested
        )
        ctx.save_for_backward(*head, maximum, log_sum, logp, H)
        ctx.set_materialize_grads(False)
        return logp, H, *constants(ctx, log_sum, H, more, entropy, statistics)

    @staticmethod
    def backward(
        ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        nothing = (None,) * 11
        if d_logp is None and d_entropy is None:
            return (None, None, None, *nothing)
        *head, maximum, log_sum, logp, H = ctx.saved_tensors
        if d_logp is None:
            d_logp = torch.zeros_like(logp)
        needs = list(ctx.needs_input_grad[:3])
        d_hidden, d_weight, d_bias = raw.linear_logprob_backward(
            *head, [maximum, log_sum, logp, H], d_logp, d_entropy, needs, *ctx.chosen
        )
        return (*as_given(d_hidden, d_weight, d_bias, needs, ctx.dtypes), *nothing)


class FrozenLogprob(Function):
    """logp [N] of a head that takes no gradient; d logp / d hidden is known after the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None,
        temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor, dtype: torch.dtype | None,
        chunk_bytes: int | None, requested: str,
    ) -> Tensor:  # fmt: skip
        head = (cast(hidden, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype))
        logp, slope = raw.linear_logprob_frozen(
            *head, target, mask, temperature, softcap, logit_scale, chunk_bytes, requested
        )
        ctx.save_for_backward(slope, mask)
        ctx.dtype = hidden.dtype
        return logp

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        slope, mask = ctx.saved_tensors
        if mask is not None:
            d_logp = torch.where(mask, d_logp, 0)
        return ((slope * d_logp[:, None]).to(ctx.dtype), *(None,) * 10)


class LinearPolicyLoss(Function):
    """A folded policy loss; see the module's docstring for what its backward pass does."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, softcap: Tensor | None,
        logit_scale: Tensor, dtype: torch.dtype | None, chunk_bytes: int | None, needs: tuple[bool, bool, bool],
        requested: str, objective: str, prepared: bool, n_numbers: int, places: tuple[int, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = (cast(hidden, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype))
        fields = [tensors[i] for i in places]
        numbers, batch = fields[:n_numbers], fields[n_numbers:]
        loss, metrics, d_hidden, d_weight, d_bias = raw.linear_policy_loss(
            *head, temperature, softcap, logit_scale, objective, numbers, batch, prepared, list(needs), chunk_bytes,
            requested,
        )  # fmt: skip
        stored = [d_hidden, d_bias, *d_weight]
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        # Compiled backward passes own what they save; in eager mode the context hands its gradients out once.
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*stored)
        else:
            ctx.stored = stored
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, d_metrics: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        nothing = (None,) * (len(ctx.needs_input_grad) - 3)
        if d_loss is None:
            return (None, None, None, *nothing)
        if torch.compiler.is_compiling():
            scaled = [x * d_loss for x in ctx.saved_tensors]
        else:
            if ctx.stored is None:
                raise RuntimeError(
                    f"rlcore's folded loss runs backward once: it scales its gradients in place; {USE_REFERENCE}"
                )
            scaled, ctx.stored = [x.mul_(d_loss) for x in ctx.stored], None
        d_hidden, d_bias, d_weight = scaled[0], scaled[1], scaled[2:]
        scaled.clear()
        return (*as_given(d_hidden, d_weight, d_bias, ctx.needs_input_grad[:3], ctx.dtypes), *nothing)


class Logprob(Function):
    """What `LinearLogprob` has, flat [N], of logits that exist; with `in_place` their memory becomes the gradient's."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, mask: Tensor | None, temperature: Tensor, entropy: bool,
        in_place: bool, statistics: bool, requested: str,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        maximum, log_sum, logp, H, *more = raw.logprob_forward(
            logits, target, mask, temperature, entropy, statistics, requested
        )
        ctx.save_for_backward(logits, target, mask, temperature, maximum, log_sum, logp, H)
        ctx.set_materialize_grads(False)
        ctx.in_place, ctx.spent, ctx.requested = in_place, False, requested
        return logp, H, *constants(ctx, log_sum, H, more, entropy, statistics)

    @staticmethod
    def backward(
        ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        nothing = (None,) * 7
        if d_logp is None and d_entropy is None:
            return (None, *nothing)
        if ctx.in_place and ctx.spent:
            raise RuntimeError(
                "logprob with inplace_backward=True runs backward once: the gradient has taken the logits' place; "
                "differentiate a sum of all that depends on them, or leave inplace_backward out"
            )
        logits, target, mask, temperature, *stats = ctx.saved_tensors
        if d_logp is None:
            d_logp = torch.zeros_like(stats[2])
        rest = (target, mask, temperature, stats, d_logp, d_entropy, ctx.requested)
        if not ctx.in_place:
            return (raw.logprob_backward(logits, *rest), *nothing)
        ctx.spent = True
        # The alias shares the version counter: whoever else has saved the logits for its backward pass is told.
        gradient = logits.detach()
        raw.logprob_backward_(gradient, *rest)
        return (gradient, *nothing)
