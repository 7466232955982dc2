"""Tiny Hugging Face decoders of many architectures, trees of three shapes, and what single sequences give on them."""

from __future__ import annotations

import random
from typing import Any

import torch
import transformers
from torch import Tensor

import rlcore as rl
from rlcore.adapters.transformers import head

COMMON = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 8},
    "Llama": {},
    "Qwen2": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "Gemma3": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "GptOss": {"head_dim": 8, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.0625},
    "GPTNeoX": {},
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, kind: str = "ForCausalLM", **changes: Any):
    names = {"Gemma3": "Gemma3Text"}
    config = getattr(transformers, f"{names.get(name, name)}Config")(**{**COMMON, **MODELS.get(name, {}), **changes})
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}{kind}")(config).to(dtype)


def ids(source: random.Random, n: int) -> list[int]:
    return [source.randrange(3, 40) for _ in range(n)]


def flat_groups() -> tuple[rl.PrefixTree, list[list[int]]]:
    """Three prompts with ragged answers, one of them empty."""
    source = random.Random(1)
    prompts = [ids(source, n) for n in (9, 1, 4)]
    responses = [[ids(source, n) for n in lengths] for lengths in ((7, 1, 0, 5), (3, 12), (6, 6, 2))]
    sequences = [p + r for p, answers in zip(prompts, responses, strict=True) for r in answers]
    return rl.PrefixTree.from_groups(prompts, responses, share=True), sequences


def branching() -> tuple[rl.PrefixTree, list[list[int]]]:
    """Depth three, branching 2-3-2: twelve paths."""
    source = random.Random(2)
    paths = [ids(source, 5)]
    for branches in (2, 3, 2):
        firsts = range(3, 3 + branches)
        paths = [[*path, first, *ids(source, source.randrange(5))] for path in paths for first in firsts]
    return rl.PrefixTree.from_paths(paths, share=True), paths


def random_trie() -> tuple[rl.PrefixTree, list[list[int]]]:
    """Forty paths over three tokens, of 1 to 14: nodes of one token, paths inside paths, paths without predictions."""
    source = random.Random(3)
    paths = [[source.randrange(3, 6) for _ in range(source.randrange(1, 15))] for _ in range(40)]
    return rl.PrefixTree.from_paths(paths, share=True), paths


SHAPES = {"flat groups": flat_groups, "branching": branching, "random trie": random_trie}


def single_logits(model: Any, tree: rl.PrefixTree, sequences: list[list[int]]) -> Tensor:
    """[N, V] at the tree's predictions, from the model itself, one sequence at a time."""
    rows = []
    for tokens, count in zip(sequences, tree.offsets.diff().tolist(), strict=True):
        if count:
            rows.append(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -count - 1 : -1])
    return torch.cat(rows)


def tree_logits(model: Any, tree: rl.PrefixTree) -> Tensor:
    """[N, V] from the trunk and the head that the probe measured."""
    weight, bias, softcap, scale = head(model)
    z = scale * torch.nn.functional.linear(rl.trunk(model, tree), weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)
