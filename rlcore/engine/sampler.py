"""The in-process sampler: a KV cache, every prompt prefilled once for its whole group, explicit random numbers.

What all prompts of a call have in common (an instruction, a system prompt) is prefilled once for all of them; then each
prompt once; then the cache is repeated for the answers of its group. Answers that reach the end token leave the batch
and the cache, so finished rows cost nothing. Token t of answer r is drawn with the uniform number u[r, t] of a table
that is made up front: the same seed gives the same answers, whatever else is in the batch and whenever others finish.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcore.adapters.transformers import max_depth, unwrap


class Samples(NamedTuple):
    """Answers of P prompts with G samples each: row r belongs to prompt r // G.

    `behaviour_logp` is the log-probability under the distribution that was drawn from (temperature, top-k, top-p);
    `model_logp` the one before top-k and top-p, which the trainer computes as well. Both are 0 beyond the length.
    """

    ids: Tensor  # [P * G, T] int64, the end token included, padded with pad_id
    lengths: Tensor  # [P * G] int64
    behaviour_logp: Tensor  # [P * G, T] float32
    model_logp: Tensor  # [P * G, T] float32


@torch.no_grad()
def sample(
    model: Any,
    prompts: list[list[int]],
    samples: int,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Samples:
    """Samples `samples` answers per prompt from a Hugging Face causal LM; see the module's docstring.

    `generator` lives on the model's device. An answer ends with its end token or at `max_new_tokens`.
    Raises ValueError for empty prompts, and for those so long that rotary frequencies would depend on the longest
    answer.
    """
    limit = max_depth(unwrap(model))
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{i}]: expected at least one token, got none")
        check_depth(f"prompts[{i}]", len(prompt), max_new_tokens, limit)
    device = generator.device
    rows = len(prompts) * samples
    uniform = torch.rand(rows, max_new_tokens, generator=generator, device=device)
    ids = torch.full((rows, max_new_tokens), pad_id, device=device)
    behaviour_logp = torch.zeros(rows, max_new_tokens, device=device)
    model_logp = torch.zeros(rows, max_new_tokens, device=device)
    lengths = torch.full((rows,), max_new_tokens, device=device)

    logits, cache, mask, position = prefill(model, prompts, pad_id, device)
    cache.batch_repeat_interleave(samples)
    logits, mask, position = (x.repeat_interleave(samples, 0) for x in (logits, mask, position))
    alive = torch.arange(rows, device=device)
    for t in range(max_new_tokens):
        token, drawn, full = draw(logits, uniform[alive, t], temperature, top_k, top_p)
        ids[alive, t], behaviour_logp[alive, t], model_logp[alive, t] = token, drawn, full
        ended = token == eos_id
        lengths[alive[ended]] = t + 1
        keep = (~ended).nonzero().squeeze(1)
        if t + 1 == max_new_tokens or len(keep) == 0:
            break
        if len(keep) < len(alive):
            cache.batch_select_indices(keep)
            alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        position = position + 1
        logits = model(
            token[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache, use_cache=True
        ).logits[:, -1]
    return Samples(ids, lengths, behaviour_logp, model_logp)


def prefill(
    model: Any, prompts: list[list[int]], pad_id: int, device: torch.device, keep_all: bool = False
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Runs P prompts through the model once: last logits [P, V], cache, attention mask [P, L], last position [P].

    The common beginning of all prompts runs once, in a batch of one; the rest is padded on the left, behind it. With a
    sliding window it runs with every prompt, since windows are counted in columns and padding would take part of them.
    The cache keeps what windows still need, or, with `keep_all`, the keys of all tokens in all layers.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    common = 0 if any(cache.is_sliding) else shared_length(prompts)
    if keep_all:
        cache = DynamicCache()
    if common:
        head = torch.tensor([prompts[0][:common]], device=device)
        model(head, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    width = max(len(prompt) for prompt in prompts) - common
    padding = [width - len(prompt) + common for prompt in prompts]
    rest = torch.tensor([[pad_id] * pad + prompt[common:] for pad, prompt in zip(padding, prompts)], device=device)
    real = torch.arange(width, device=device) >= torch.tensor(padding, device=device)[:, None]
    mask = torch.cat([real.new_ones(len(prompts), common), real], 1).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, common:]
    out = model(
        rest, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return out.logits[:, -1], cache, mask, position[:, -1]


def check_depth(name: str, length: int, follow: int, limit: int | None) -> None:
    """Raises ValueError where `length` tokens, with those that may `follow`, are more than `limit`; None: no limit."""
    if limit is not None and length + follow > limit:
        raise ValueError(
            f"{name}: expected at most {limit} tokens with those that may follow, got {length} + {follow}: beyond that "
            "this model's rotary frequencies depend on the longest sequence that runs"
        )


def shared_length(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with alike, so that at least one is left of each; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts)))
    return min(common, min(len(prompt) for prompt in prompts) - 1)


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverting the distribution function at `uniform`: logits [R, V], uniform [R] in [0, 1).

    Returns token, its log-probability after and before top-k and top-p, each [R].
    """
    full = (logits.float() / temperature).log_softmax(-1)
    kept = truncate(full, top_k, top_p).log_softmax(-1) if top_k or top_p < 1 else full
    cdf = kept.exp().cumsum(-1)
    total = cdf[:, -1]
    at = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cdf, at[:, None], right=True)
    return token.squeeze(1), kept.gather(1, token).squeeze(1), full.gather(1, token).squeeze(1)


def truncate(logp: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for all but the `top_k` likeliest tokens and, of these, the fewest that hold at least `top_p` of the rest.

    Top-k comes first and top-p is taken on what it leaves, renormalised. The likeliest token always stays. Ties at the
    border go to the lower token id. logp: [R, V].
    """
    ordered, index = logp.sort(stable=True, descending=True, dim=-1)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[:, top_k:] = True
    if top_p < 1:
        probability = ordered.masked_fill(drop, -torch.inf).softmax(-1)
        drop |= probability.cumsum(-1) - probability >= top_p
        drop[:, 0] = False
    return logp.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -torch.inf)
