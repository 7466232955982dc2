"""prefix_attention: one packed tree beside the prompt repeated before each response; the attention, then a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import check
from torch import Tensor

import rlcore as rl
from rlcore.algorithms import prefix_attention as composition


def packed_rows(groups: int, responses: int, prompt: int, response: int) -> Tensor:
    """Rows of the packed tree for each path of prompt and response: [G*R, P+L]."""
    size = prompt + responses * response
    group = torch.arange(groups).repeat_interleave(responses)[:, None] * size
    start = prompt + torch.arange(responses).repeat(groups)[:, None] * response
    return torch.cat([group + torch.arange(prompt), group + start + torch.arange(response)], dim=1)


def test_attention(compare: Callable[..., float], run: Any) -> None:
    groups, responses, prompt, response = (1, 2, 16, 8) if run.quick else (2, 8, 256, 64)
    heads, kv_heads, dim = 8, 4, 64
    tree = rl.PrefixTree.from_groups([[1] * prompt] * groups, [[[2] * response] * responses] * groups)
    rows = packed_rows(groups, responses, prompt, response)
    q = torch.randn(tree.M, heads, dim, requires_grad=True)
    k = torch.randn(tree.M, kv_heads, dim, requires_grad=True)
    v = torch.randn(tree.M, kv_heads, dim, requires_grad=True)
    weight = torch.randn(len(rows), response, heads, dim)  # the loss reads response rows alone
    packed_weight = torch.zeros(tree.M, heads, dim)
    packed_weight[rows[:, prompt:]] = weight
    # The baseline starts from the repeated batch, as a padded trainer does: the copies are not part of its time.
    repeated = [x.detach()[rows].transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]

    def ours() -> tuple[Tensor, ...]:
        loss = (rl.prefix_attention(q, k, v, tree) * packed_weight).sum()
        return (loss.detach(), *torch.autograd.grad(loss, (q, k, v)))

    def plain() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(*repeated, is_causal=True, enable_gqa=True)
        loss = (out.transpose(1, 2)[:, prompt:] * weight).sum()
        return (loss.detach(), *torch.autograd.grad(loss, repeated))

    loss, *gradients = plain()
    expected = [torch.zeros_like(x).index_put((rows,), g.transpose(1, 2), accumulate=True)
                for x, g in zip((q, k, v), gradients, strict=True)]  # fmt: skip
    check("prefix_attention", ours(), (loss, *expected), tolerance=1e-3)
    compare("prefix_attention", ours, plain, "torch SDPA, repeated prompts", seconds=2.0, speedup=True)


@pytest.mark.parametrize("passes", ["forward", "forward and backward"])
@pytest.mark.parametrize("shape", ["short responses", "long responses"])
def test_flash_calls(compare: Callable[..., float], run: Any, shape: str, passes: str) -> None:
    """The op beside nothing but the flash attention calls of its torch composition, on blocks that lie ready."""
    prompt, responses, length = (512, 8, 64) if shape == "short responses" else (128, 16, 128)
    prompt, length = (prompt // 16, length // 16) if run.quick else (prompt, length)
    tree = rl.PrefixTree.from_groups([[1] * prompt], [[[2] * length] * responses])
    q, k, v, do = (torch.randn(tree.M, heads, 32) for heads in (8, 4, 4, 8))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    scale = 32**-0.5
    table = tree.node_table
    calls = []
    for part in composition.plan(table):
        rows, keys = (part.queries, part.query_slice), (part.keys, part.key_slice)
        blocks = [composition.blocks(q, *rows), composition.blocks(k, *keys), composition.blocks(v, *keys)]
        calls.append((blocks, composition.blocks(do, *rows), part.own and part.mask is None, part.bias(q.dtype)))

    def forward() -> list[tuple[Tensor, Tensor]]:
        return [composition.flash(*x, 0.0, causal, attn_mask=bias, scale=scale) for x, _, causal, bias in calls]

    def both() -> None:
        for (o, lse), (x, part_do, causal, bias) in zip(forward(), calls, strict=True):
            composition.flash_backward(part_do, *x, o, lse, 0.0, causal, attn_mask=bias, scale=scale)

    def ours() -> tuple[Tensor, ...]:
        o = rl.prefix_attention(*leaves, tree)
        return (o.detach(), *torch.autograd.grad(o, leaves, do))

    o, lse = composition.composed_forward(q, k, v, table, scale, None)
    expected = composition.composed_backward(do, q, k, v, o, lse, table, scale, None)[:3]
    check("flash calls", ours(), (o, *(x for x in expected if x is not None)), tolerance=1e-4)
    what = f"prompt {prompt}, {responses} responses x {length}"
    pair = (lambda: rl.prefix_attention(q, k, v, tree), forward) if passes == "forward" else (ours, both)
    compare(f"{passes}, {what}", *pair, "flash attention calls alone", seconds=2.0, speedup=True)


def test_policy_update(compare: Callable[..., float], run: Any) -> None:
    """Forward, loss, backward and an optimizer step of a small Qwen3, with the loss on the responses."""
    transformers = pytest.importorskip("transformers")
    layers, width, vocabulary, prompt, responses, length = (
        (2, 64, 100, 32, 4, 8) if run.quick else (4, 256, 1000, 512, 8, 64)
    )
    config = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64 * 2, num_key_value_heads=width // 64, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=1024, dtype="float32",
    )  # fmt: skip
    shared = transformers.Qwen3ForCausalLM(config)
    repeated = transformers.Qwen3ForCausalLM(config)
    repeated.load_state_dict(shared.state_dict())
    rl.attach(shared)

    question = torch.randint(vocabulary, (prompt,))
    answers = torch.randint(vocabulary, (responses, length))
    ids = torch.cat([question.expand(responses, -1), answers], dim=1)
    present = torch.ones_like(ids)
    advantage = torch.randn(responses)
    with torch.no_grad():
        old = log_probs(repeated, ids, present, length) + 0.02 * torch.randn(responses, length)
    objective = rl.Objective()

    def tree_loss() -> Tensor:
        tree = rl.PrefixTree.from_groups([question.tolist()], [answers.tolist()])
        batch = rl.TokenBatch(tree.target, tree.offsets, advantage=advantage, old_logp=old.flatten())
        return rl.linear_policy_loss(rl.trunk(shared, tree), shared.lm_head.weight, batch, objective)[0]

    def padded_loss() -> Tensor:
        ratio = (log_probs(repeated, ids, present, length) - old).exp()
        a = advantage[:, None]
        return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()

    def update(loss: Callable[[], Tensor], model: Any, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.detach()

    results = []
    for loss, model in ((tree_loss, shared), (padded_loss, repeated)):
        value = loss()
        results.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
    check("policy update", *results, tolerance=1e-3)
    # A learning rate of 0 keeps both models, and so the work, the same in every round.
    steps = [torch.optim.AdamW(model.parameters(), lr=0.0) for model in (shared, repeated)]
    compare(
        f"policy update, prompt {prompt}, {responses} responses x {length}",
        lambda: update(tree_loss, shared, steps[0]), lambda: update(padded_loss, repeated, steps[1]),
        "repeated prompts, padded batch", seconds=15.0, least=3.0,
    )  # fmt: skip


def log_probs(model: Any, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """[B, T] of the last `length` tokens, from the logits of the rows that predict them, as trainers do it."""
    logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0]
