"""Policy and value losses on log-probs that exist already.

A built-in objective of float32 (or narrower) scores runs as one pass that leaves the loss, all metrics and the
gradients behind: in C++ on the CPU, in Triton or CUDA C++ on CUDA. The backward pass scales these by the incoming
gradient and leaves them as they are, so it may run as often as the graph is retained. It can not be differentiated
twice. Everything else is the reference.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rlcore.algorithms import policy_loss as algorithm
from rlcore.algorithms.objective import KL, TIS, Objective
from rlcore.algorithms.policy_loss import check_fields, check_scores, full_precision
from rlcore.algorithms.policy_loss_metrics import metric_names
from rlcore.algorithms.value_loss import value_loss
from rlcore.layout import TokenBatch
from rlcore.ops.policy_loss_raw import implementation, is_raw
from rlcore.ops.policy_loss_raw import policy_loss as raw_policy_loss

__all__ = ["KL", "TIS", "Objective", "policy_loss", "value_loss"]


def scaled(ctx: Any, d_loss: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The stored gradients times the incoming one; on the CPU they are handed out as they are where that is 1.

    Elsewhere its value is not read: that would wait for the device.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "rlcore's policy_loss can not be differentiated twice (create_graph=True); "
            'use `with rl.backend("reference"):` around the forward pass'
        )
    if d_loss is None:
        return None, None
    gradients = ctx.saved_tensors
    if torch.compiler.is_compiling():
        gradients = [x * d_loss for x in gradients]
    elif d_loss.device.type != "cpu" or d_loss.item() != 1.0:
        gradients = torch._foreach_mul(gradients, d_loss)  # both in one launch
    wanted = ctx.needs_input_grad
    return gradients[0] if wanted[0] else None, gradients[1] if wanted[1] else None


class PolicyLoss(Function):
    """Loss and metrics of flat scores [N], eagerly: the pass is called without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, entropy: Tensor | None, batch: TokenBatch, objective: Objective, module: ModuleType
    ) -> tuple[Tensor, Tensor]:
        out = module.evaluate(logp, entropy, batch, objective, ctx.needs_input_grad[:2])
        ctx.save_for_backward(out.d_logp, out.d_entropy)
        ctx.mark_non_differentiable(out.metrics)
        ctx.set_materialize_grads(False)
        return out.loss, out.metrics

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, d_metrics: None) -> tuple[Tensor | None, ...]:
        return (*scaled(ctx, d_loss), None, None, None)


class CompiledPolicyLoss(Function):
    """The same through the custom op, with all tensors as arguments, which is what torch.compile can trace."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, entropy: Tensor | None, needs: tuple[bool, bool], objective: str, n_numbers: int,
        places: tuple[int, ...], *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        fields = [tensors[i] for i in places]
        numbers, batch = fields[:n_numbers], fields[n_numbers:]
        loss, metrics, d_logp, d_entropy = raw_policy_loss(logp, entropy, objective, numbers, batch, list(needs))
        ctx.save_for_backward(d_logp, d_entropy)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, d_metrics: None) -> tuple[Tensor | None, ...]:
        return (*scaled(ctx, d_loss), *(None,) * (len(ctx.needs_input_grad) - 2))


def policy_loss(
    logp: Tensor, batch: TokenBatch, objective: Objective, entropy: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a (micro-)batch under an objective, and its metrics; differentiable in logp and entropy.

    See `rlcore.algorithms.policy_loss` for the formula, the shapes and the errors. Except on the reference (custom
    objectives, float64) a double backward raises RuntimeError: use the reference backend.
    """
    check_scores(logp, batch, objective, entropy)
    traced = torch.compiler.is_compiling()
    module = None if traced else implementation(logp, entropy, objective)
    if module is None and not (traced and is_raw(logp, entropy, objective)):
        return algorithm.policy_loss(logp, batch, objective, entropy)
    check_fields(batch, objective)
    x = full_precision(logp).reshape(-1)
    h = None if entropy is None else full_precision(entropy).reshape(-1)
    if h is not None and not objective.needs_entropy:
        h = h.detach()
    if module is None:
        needs = (wants_gradient(x), wants_gradient(h))
        tensors, places = distinct([*objective.numbers, *batch.tensors()])
        loss, values = CompiledPolicyLoss.apply(
            x, h, needs, objective.key, len(objective.numbers), places, *tensors
        )  # fmt: skip
    elif wants_gradient(x) or wants_gradient(h):
        loss, values = PolicyLoss.apply(x, h, batch, objective, module)
    else:
        loss, values, *_ = module.evaluate(x, h, batch, objective, (False, False))
    names = metric_names(batch, objective, entropy is not None)
    return loss, dict(zip(names, values.unbind(), strict=True))


def wants_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def distinct(tensors: list[Tensor | None]) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """The tensors without repetition and the place of each among them: compiled code takes no tensor twice."""
    unique: list[Tensor | None] = []
    places = []
    for x in tensors:
        place = next((i for i, seen in enumerate(unique) if seen is x), len(unique))
        if place == len(unique):
            unique.append(x)
        places.append(place)
    return unique, tuple(places)
