"""`rlcore train --dry-run`: what a run would be and need, from its config alone; nothing is trained, made or written.

The model exists on torch's meta device, shapes without memory. What a layer keeps for its backward pass is counted by
running it there with every saved tensor seen once, so it holds for any architecture. The estimate is of the tensors of
a step at its fullest, every answer as long as allowed; Python, torch and the problems come on top. Against the measured
peak of a small run on a CPU it is right within a factor of 1.5 (tests/engine/test_estimate.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlcore as rl
from rlcore.algorithms.vocab_head_chunks import CHUNK_BYTES
from rlcore.engine.config import Config
from rlcore.engine.config_file import flatten, to_toml
from rlcore.engine.errors import UserError
from rlcore.engine.model import character_tokenizer, check_fit, check_place, small_model
from rlcore.engine.resolve import Resolved
from rlcore.engine.rollout import encode
from rlcore.engine.tasks import Task

FLOAT = 4
# Tokens of the row on the meta device from which the bytes per token follow.
PROBE = 64
# Float32 tables [rows, V] that drawing a token needs at once: logits, log-probs, probabilities, their running sum.
DRAW_TABLES = 4
# The same for a loss on plain logits: they, their log-softmax, and its gradient.
LOSS_TABLES = 3


class Estimate(NamedTuple):
    """Parameters, and bytes by what they are for. Sampling and update take turns: the peak holds the larger one."""

    parameters: int
    lasting: dict[str, int]
    sampling: dict[str, int]
    update: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.lasting.values()) + max(sum(self.sampling.values()), sum(self.update.values()))


def dry_run(resolved: Resolved) -> str:
    """The resolved config with what was changed marked, then parameters, memory and the size of a step, as text."""
    config = resolved.config
    task = Task(config.task)
    tokenizer, model = shape_of(config)
    check_fit(model, tokenizer, task, config.rollout.max_new_tokens)
    lengths = [len(ids) for ids in encode(tokenizer, [problem.prompt for problem in task.train])]
    prompt = sum(lengths) / len(lengths)
    found = estimate(config, model, prompt, max(lengths))
    P, G, T = config.rollout.prompts, config.rollout.samples, config.rollout.max_new_tokens
    epoch = math.ceil(len(task.train) / P)
    rows = {
        "model": f"{type(model).__name__}, {found.parameters / 1e6:,.2f}M parameters",
        "problems": f"{len(task.train):,} for training, {len(task.held_out):,} held out",
        "step": f"{P} prompts x {G} answers of at most {T} tokens: up to {round(P * (G * T + prompt)):,} tokens, "
        "prompts counted once",
        "epoch": f"{epoch:,} steps; {config.steps:,} steps are {config.steps / epoch:.2f} epochs",
        "memory": f"about {size(found.peak)} at the fullest moment, beside Python, torch and the problems",
    }
    for title, part in (("always", found.lasting), ("sampling", found.sampling), ("update", found.update)):
        rows[f"  {title}"] = ", ".join(f"{name} {size(count)}" for name, count in part.items() if count)
    if config.model.lora_rank or config.model.gradient_checkpointing or config.model.dtype != "float32":
        rows["  note"] = "full training in float32 is counted; adapters, bfloat16 and checkpointing change it"
    report = "\n".join(f"# {name:12} {text}" for name, text in rows.items())
    return f"{marked(config, resolved.sources)}\n{report}"


def marked(config: Config, sources: dict[str, str]) -> str:
    """The config as TOML, with who set it and the default behind every key that is not at its default."""
    defaults = flatten(Config())
    lines, table = [], ""
    for line in to_toml(config).splitlines():
        if line.startswith("["):
            table = line.strip("[]") + "."
        key = table + line.partition(" = ")[0]
        if key in sources and flatten(config)[key] != defaults[key]:
            line += f"  # {sources[key]}; default {defaults[key]!r}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def shape_of(config: Config) -> tuple[Any, Any]:
    """Tokenizer, and the model on the meta device. A model of the hub must have been downloaded before."""
    if not config.model.path:
        tokenizer = character_tokenizer()
        with torch.device("meta"):
            return tokenizer, small_model(config, len(tokenizer))
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = config.model.path
    check_place(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        shape = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return tokenizer, AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path: a dry run downloads nothing, and {path!r} is not whole here: {reason}") from None


def estimate(config: Config, model: Any, prompt: float, longest: int) -> Estimate:
    """Bytes of a run on `model`, whose prompts have `prompt` tokens on average and at most `longest`."""
    rollout, update = config.rollout, config.update
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    V, H = model.get_input_embeddings().weight.shape
    T = rollout.max_new_tokens

    group = rollout.samples * T
    minibatch = math.ceil(rollout.prompts / update.minibatches) * group
    answers = min(max(update.micro_tokens // group * group, group), minibatch)
    padded = update.layout == "padded"
    tokens = answers + (answers / T if padded else answers / group) * prompt
    logits = int(tokens) * V * FLOAT
    chunk = min(logits, CHUNK_BYTES["cpu"] if config.device == "cpu" else CHUNK_BYTES["default"])

    rows = max(rollout.prompts * rollout.samples, config.eval.batch * config.eval.samples)
    critic = "critic" in rl.methods()[config.method].needs
    return Estimate(
        parameters,
        lasting={
            "weights": weights,
            "optimizer": 2 * weights,
            "reference": weights if config.kl.place != "none" else 0,
            "critic and its optimizer": 3 * weights if critic else 0,
            "moving average": weights if update.ema else 0,
        },
        sampling={
            "KV cache": rows * (longest + T) * cache_bytes(model),
            "logits": rows * V * FLOAT * DRAW_TABLES,
        },
        update={
            "gradients": weights * (2 if critic else 1),
            "activations": int(tokens * saved_bytes(model)),
            # The folded head keeps its gradients of weight and hidden until the loss is scaled.
            "logits": LOSS_TABLES * logits if padded else chunk + V * H * FLOAT + answers * H * FLOAT,
        },
    )


def cache_bytes(model: Any) -> int:
    """Bytes of keys and values per token, all layers."""
    shape = model.config.get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return 2 * shape.num_hidden_layers * heads * width * model.get_input_embeddings().weight.element_size()


def saved_bytes(model: Any) -> float:
    """Bytes per token that the trunk keeps for its backward pass, weights left out."""
    seen: dict[int, Any] = {p.untyped_storage()._cdata: p for p in model.parameters()}
    total = 0

    def keep(x: Tensor) -> Tensor:
        nonlocal total
        storage = x.untyped_storage()
        if storage._cdata not in seen:
            # Held, so that no other storage takes its place and name.
            seen[storage._cdata] = storage
            total += storage.nbytes()
        return x

    with linear_attention(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ids = torch.zeros(1, PROBE, dtype=torch.int64, device="meta")
        # A mask of four dimensions is taken as it is: making one asks for values, which are not there.
        mask = torch.ones(1, 1, PROBE, PROBE, dtype=torch.bool, device="meta")
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return total / PROBE


class linear_attention:
    """Inside the block the model's attention keeps what a flash kernel keeps: queries, keys, values, output."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self.config = model.config.get_text_config()
        AttentionInterface.register("rlcore_estimate", shapes_of_attention)
        AttentionMaskInterface.register("rlcore_estimate", lambda *args, **options: None)

    def __enter__(self) -> None:
        self.before = self.config._attn_implementation
        self.config._attn_implementation_internal = "rlcore_estimate"

    def __exit__(self, *exception: Any) -> None:
        self.config._attn_implementation_internal = self.before


class Kept(torch.autograd.Function):
    """An output of the queries' shape that keeps its inputs and itself, as attention does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def shapes_of_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    return Kept.apply(query, key, value).transpose(1, 2).contiguous(), None


def size(count: int) -> str:
    """Bytes for a reader."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
