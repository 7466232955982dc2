"""Gradients that come in with strides, or other than one: a test of each language that kernels are written in.

tests/kernels/test_incoming_gradients.py and tests/cuda/test_incoming_gradients.py run it. Their fixtures: `name` of the
backend, `device` of the tensors that it takes there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rlcore as rl

N, H, V = 11, 8, 37
TREE = rl.PrefixTree.from_groups([[1, 2, 3]], [[[4] * 5, [5] * 3]])


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear_logprob(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    target = torch.arange(N, device=hidden.device)
    return rl.linear_logprob(hidden, weight, target, entropy=True)[:2]


def logprob(logits: Tensor) -> tuple[Tensor, ...]:
    return rl.logprob(logits, torch.arange(N, device=logits.device), entropy=True)[:2]


def batch_on(device: torch.device) -> rl.TokenBatch:
    batch = rl.TokenBatch(torch.arange(N), torch.tensor([0, 4, N]), advantage=numbers(2), old_logp=-numbers(N).abs())
    return batch.to(device)


OBJECTIVE = rl.Objective(entropy=0.1)


def linear_policy_loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (rl.linear_policy_loss(hidden, weight, batch_on(hidden.device), OBJECTIVE)[0],)


def policy_loss(logp: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
    return (rl.policy_loss(logp, batch_on(logp.device), OBJECTIVE, entropy)[0],)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (rl.prefix_attention(q, k, v, TREE.to(q.device)),)


def segment_sum(x: Tensor) -> tuple[Tensor, ...]:
    return (rl.segment_sum(x, offsets=torch.tensor([0, 4, 4, N], device=x.device)),)


def gae(reward: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return tuple(rl.gae(reward, value, torch.tensor([0, 4, N], device=reward.device), 0.9, 0.8))


Function = Callable[..., tuple[Tensor, ...]]
HEAD: dict[Function, tuple[Tensor, ...]] = {
    linear_logprob: (numbers(N, H), numbers(V, H)), logprob: (numbers(N, V),),
    linear_policy_loss: (numbers(N, H), numbers(V, H)), policy_loss: (-numbers(N).abs(), numbers(N).abs()),
}  # fmt: skip
OTHERS: dict[Function, tuple[Tensor, ...]] = {
    prefix_attention: (numbers(TREE.M, 2, 16), numbers(TREE.M, 1, 16), numbers(TREE.M, 1, 16)),
    segment_sum: (numbers(N),), gae: (numbers(N), numbers(N)),
}  # fmt: skip

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "compact": lambda g: g.clone(),
    "every second": lambda g: torch.stack((g, torch.full_like(g, torch.nan)), -1)[..., 0],
    "transposed": lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda g: g[:1].expand_as(g),
    "expanded, compact": lambda g: g[:1].expand_as(g).contiguous(),
}


def gradients(function: Function, inputs: tuple[Tensor, ...], device: str, name: str, form: str, scale: float):
    leaves = [x.to(device, copy=True).requires_grad_() for x in inputs]
    with rl.backend(name):
        outputs = function(*leaves)
        incoming = [scale * numbers(*y.shape).to(device) for y in outputs]
        incoming = [FORMS[form](g) if g.dim() else g for g in incoming]
        return torch.autograd.grad(outputs, leaves, incoming)


def check(function: Function, inputs: tuple[Tensor, ...], name: str, device: str) -> None:
    found = {form: gradients(function, inputs, device, name, form, 1.0) for form in FORMS}
    for form, g in found.items():
        for x, y in zip(g, found["expanded, compact" if form.startswith("expanded") else "compact"], strict=True):
            assert torch.equal(x, y), form
    for x, y in zip(gradients(function, inputs, device, name, "compact", -4.0), found["compact"], strict=True):
        assert torch.equal(x, -4.0 * y)
    for form in ("compact", "expanded"):
        expected = gradients(function, inputs, "cpu", "reference", form, 1.0)
        for x, y in zip(found[form], expected, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", HEAD)
def test_incoming_gradients(name, device, function):
    check(function, HEAD[function], name, device)
