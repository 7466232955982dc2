"""prefix_attention: one packed tree per prompt beside the prompt repeated before each response."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlcore as rl

GROUPS, RESPONSES, PROMPT, RESPONSE, HEADS, KV_HEADS, DIM = 2, 8, 256, 64, 8, 4, 64


def paths() -> Tensor:
    """Rows of the packed tree for each path of prompt and response: [G*R, P+L]."""
    size = PROMPT + RESPONSES * RESPONSE
    group = torch.arange(GROUPS).repeat_interleave(RESPONSES)[:, None] * size
    response = PROMPT + torch.arange(RESPONSES).repeat(GROUPS)[:, None] * RESPONSE
    prompt_rows = group + torch.arange(PROMPT)
    return torch.cat([prompt_rows, group + response + torch.arange(RESPONSE)], dim=1)


@pytest.mark.parametrize("who", ["rlcore, packed", "torch, repeated prompts"])
def test_forward_and_backward(timed: Callable[..., None], who: str) -> None:
    tree = rl.PrefixTree.from_groups([[1] * PROMPT] * GROUPS, [[[2] * RESPONSE] * RESPONSES] * GROUPS)
    rows = paths()
    q = torch.randn(tree.M, HEADS, DIM, requires_grad=True)
    k = torch.randn(tree.M, KV_HEADS, DIM, requires_grad=True)
    v = torch.randn(tree.M, KV_HEADS, DIM, requires_grad=True)
    weight = torch.randn(len(rows), RESPONSE, HEADS, DIM)  # the loss reads response rows alone
    packed_weight = torch.zeros(tree.M, HEADS, DIM)
    packed_weight[rows[:, PROMPT:]] = weight
    # The baseline starts from the repeated batch, as a padded trainer does: the copies are not part of its time.
    repeated = [x.detach()[rows].transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]

    def ours() -> tuple[Tensor, ...]:
        loss = (rl.prefix_attention(q, k, v, tree) * packed_weight).sum()
        return (loss.detach(), *torch.autograd.grad(loss, (q, k, v)))

    def plain() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(*repeated, is_causal=True, enable_gqa=True)
        loss = (out.transpose(1, 2)[:, PROMPT:] * weight).sum()
        return (loss.detach(), *torch.autograd.grad(loss, repeated))

    loss, *gradients = plain()
    packed = [torch.zeros_like(x).index_put((rows,), g.transpose(1, 2), accumulate=True)
              for x, g in zip((q, k, v), gradients, strict=True)]  # fmt: skip
    if who == "torch, repeated prompts":
        timed(plain, (loss, *gradients))
    else:
        timed(ours, (loss, *packed))
