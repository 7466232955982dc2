"""`rlcore train --dry-run`: what a run would be and need, from its config alone; nothing is trained, made or written.

The model is made of fake tensors, shapes without memory. What its layers keep for the backward pass, in which dtype
and with which adapters, is counted by running it on them with every saved tensor seen once, so it holds for any
architecture. The estimate is of the tensors of a step at its fullest, every answer as long as allowed; Python, torch
and the problems come on top. Against the measured peak of small runs on a CPU it is right within a factor of 1.5
(tests/engine/test_estimate.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rlcore as rl
from rlcore.adapters.transformers import decoder, unwrap
from rlcore.algorithms.vocab_head_rows import logits_bytes
from rlcore.engine import lora
from rlcore.engine.config import Config
from rlcore.engine.config_file import flatten, to_toml
from rlcore.engine.errors import UserError, first_line
from rlcore.engine.model import base_dtype, character_tokenizer, check_fit, check_place, small_model
from rlcore.engine.resolve import Resolved
from rlcore.engine.rollout import encode
from rlcore.engine.tasks import Task

FLOAT = 4
# Tokens of the first of two rows of fake tensors, and half those of the second, from which the bytes per token follow.
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
    """Tokenizer, and the model with its adapters in fake tensors. A model of the hub must have been downloaded."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = config.model.path
    if path:
        check_place(path)
    try:
        with torch.device("meta"):
            if path:
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
                shape = AutoConfig.from_pretrained(path, local_files_only=True)
            else:
                tokenizer = character_tokenizer()
                shape = small_model(config, len(tokenizer)).config
            model = AutoModelForCausalLM.from_config(shape, dtype=base_dtype(config))
    except Exception as error:  # transformers and the operating system each raise what they like
        raise UserError(
            f"model.path: a dry run downloads nothing, and {path!r} is not whole here: {first_line(error)}"
        ) from None
    with torch.device("meta"):
        return tokenizer, as_fake(lora.adapt(model, config.model) if config.model.lora_rank else model)


def as_fake(model: Any) -> Any:
    """The model with its tensors, which are on the meta device, as fake ones on the CPU, where there is autocast."""
    made: dict[Tensor, Tensor] = {}
    with FakeTensorMode():
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, x in table.items():
                    if x is not None and x not in made:
                        like = torch.empty(x.shape, dtype=x.dtype, device="cpu")
                        made[x] = nn.Parameter(like, x.requires_grad) if isinstance(x, nn.Parameter) else like
                    table[name] = None if x is None else made[x]
    return model


def estimate(config: Config, model: Any, prompt: float, longest: int) -> Estimate:
    """Bytes of a run on `model`, whose prompts have `prompt` tokens on average and at most `longest`."""
    rollout, update = config.rollout, config.update
    weights, trained = bytes_of(model.parameters()), bytes_of(p for p in model.parameters() if p.requires_grad)
    head = model.get_output_embeddings().weight
    V, T = head.shape[0], rollout.max_new_tokens

    padded = update.layout == "padded"
    answers, tokens = largest_pack(config, prompt, padded)
    rows = max(rollout.prompts * rollout.samples, config.eval.batch * config.eval.samples)
    critic = "critic" in rl.methods()[config.method].needs
    kept = of_forward_pass(model, config)
    return Estimate(
        sum(parameter.numel() for parameter in model.parameters()),
        lasting={
            "weights": weights,
            "optimizer": 2 * trained,
            "reference": weights if config.kl.place != "none" and not config.model.lora_rank else 0,
            "critic and its optimizer": 3 * trained if critic else 0,
            "moving average": trained if update.ema else 0,
        },
        sampling={
            "KV cache": int(rows * (longest + T) * kept.cache),
            "logits": rows * V * FLOAT * DRAW_TABLES,
            "weights in bfloat16": kept.casts,
            "weights beside their average": trained if update.ema else 0,
        },
        update={
            "gradients": trained * (2 if critic else 1),
            "activations": int(tokens * kept.activations),
            "logits": LOSS_TABLES * int(tokens) * V * FLOAT if padded else of_folded_head(config, head, answers),
            "weights in bfloat16": kept.casts,
        },
    )


def of_folded_head(config: Config, head: Tensor, rows: int) -> int:
    """Logits of a chunk, and the gradients of weight and hidden, which wait in float32 for the loss to be scaled.

    On a GPU a float32 d hidden beside one in 16 bits is part of the budget for logits.
    """
    V, H = head.shape
    d_hidden = rows * H * FLOAT
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    held = d_hidden if config.model.dtype == "bfloat16" and not on_cpu else 0
    logits = min(rows * V * FLOAT, logits_bytes(torch.device("cpu" if on_cpu else "cuda"), None, held))
    return logits + (V * H * FLOAT if head.requires_grad else 0) + d_hidden


def largest_pack(config: Config, prompt: float, padded: bool) -> tuple[int, float]:
    """Answer tokens, and all tokens, of the fullest pack where every answer is as long as allowed."""
    T, G, most = config.rollout.max_new_tokens, config.rollout.samples, config.update.micro_tokens
    once, each = (0.0, prompt + T) if padded else (prompt, float(T))
    minibatch = math.ceil(config.rollout.prompts / config.update.minibatches)
    if once + G * each > most:  # part of a group
        answers, groups = max(1, int((most - once) // each)), 1
    else:
        groups = min(minibatch, int(most // (once + G * each)))
        answers = groups * G
    return answers * T, groups * once + answers * each


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


class Kept(NamedTuple):
    """Bytes that a forward pass leaves: for the backward pass and as KV cache, per token; casts of weights."""

    activations: float
    cache: float
    casts: int


def of_forward_pass(model: Any, config: Config) -> Kept:
    """What the trunk keeps in the dtype of the run; with checkpointing the inputs of all layers and one layer whole."""
    (first, cache), (second, _) = (saved_bytes(model, config, tokens) for tokens in (PROBE, 2 * PROBE))
    shape = unwrap(model).config.get_text_config()
    whole = (second - first) / PROBE
    inputs = shape.num_hidden_layers * shape.hidden_size * unwrap(model).dtype.itemsize
    kept = inputs + whole / shape.num_hidden_layers if config.model.gradient_checkpointing else whole
    return Kept(kept, cache / PROBE, max(0, 2 * first - second))


def saved_bytes(model: Any, config: Config, tokens: int) -> tuple[int, int]:
    """Bytes that the trunk keeps of a row for its backward pass, weights left out; bytes of its KV cache."""
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

    inner = unwrap(model)
    mode = next(inner.parameters()).fake_mode
    half = torch.autocast("cpu", torch.bfloat16, enabled=config.model.dtype == "bfloat16")
    with mode, half, linear_attention(inner), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        # A mask of four dimensions is taken as it is: making one asks for values, which are not there.
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
        out = decoder(inner)(input_ids=ids, attention_mask=mask, use_cache=True)
    return total, bytes_of(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values))


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


class KeepAll(torch.autograd.Function):
    """An output of the queries' shape that keeps its inputs and itself, as attention does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def shapes_of_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    return KeepAll.apply(query, key, value).transpose(1, 2).contiguous(), None


def size(count: int) -> str:
    """Bytes for a reader."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
