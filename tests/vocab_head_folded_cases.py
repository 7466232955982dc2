"""A minibatch of the folded policy loss with every field, and its loss, metrics and gradients."""

from __future__ import annotations

import torch

from rlcore.algorithms import vocab_head as algorithm
from rlcore.layout import TokenBatch
from rlcore.ops.vocab_head import linear_policy_loss

OFFSETS = [0, 1, 13, 13, 30, 47]


def batch_of(case, seed=0, offsets=OFFSETS, **fields):
    """A batch with every field that an objective may read; old log-probs close to the policy's."""
    g = torch.Generator().manual_seed(seed)
    shape = case.target.shape
    randn = lambda: torch.randn(shape, generator=g)  # noqa: E731
    with torch.no_grad():
        exact = algorithm.linear_logprob(case.hidden, case.weight, case.target, **case.kwargs()).logp.float()
    group = torch.tensor([0, 0, 1, 1, 1]) if len(shape) == 1 else torch.arange(shape[0]) // 2
    fields = {
        "advantage": randn() * (torch.rand(shape, generator=g) < 0.8),
        "old_logp": exact + 0.2 * randn(), "ref_logp": exact + 0.3 * randn(), "rollout_logp": exact + 0.2 * randn(),
        "segment": torch.randint(3, shape, generator=g).cumsum(-1), "group": group, "mask": case.mask,
        "weight": torch.rand(shape, generator=g), **fields,
    }  # fmt: skip
    return TokenBatch(case.target, torch.tensor(offsets) if len(shape) == 1 else None, **fields)


def run(case, batch, objective, factor=1.0):
    """(loss, metrics, gradients of factor * loss)."""
    case = case.fresh()
    loss, metrics = linear_policy_loss(case.hidden, case.weight, batch, objective, case.bias, **case.numbers())
    return loss, metrics, torch.autograd.grad(loss * factor, case.leaves)


def assert_same(found, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    assert list(found[1]) == list(expected[1])
    for name, x in expected[1].items():
        torch.testing.assert_close(found[1][name].to(x.dtype), x, rtol=rtol, atol=atol, msg=f"metric {name} differs")
    for x, y in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
