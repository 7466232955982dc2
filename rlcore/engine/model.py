"""The policy model: any Hugging Face causal LM by path or id, or the small one of `warm_start`.

What a run trains is the base with, in this order: adapters (`model.lora_rank`), the dtype of its forward passes
(`model.dtype`), gradient checkpointing. Nothing is unpickled, and no code comes with a model: weights are safetensors,
trust_remote_code is off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlcore.adapters.transformers import max_depth, unwrap
from rlcore.engine import lora
from rlcore.engine.checkpoint import save_model, why_unusable, write_directory
from rlcore.engine.config import Config
from rlcore.engine.errors import SaveError, UserError, first_line
from rlcore.engine.precision import compute_in_bfloat16
from rlcore.engine.tasks import Task
from rlcore.engine.warm_start import character_tokenizer, fingerprint, small_model, warm_start

SAFE = {"trust_remote_code": False}


def load_start(config: Config, task: Task, device: torch.device, say: Callable[[str], None]) -> tuple[Any, Any]:
    """The model that a run starts from, on `device`, and its tokenizer."""
    model, tokenizer = load_or_make(config, task, device, say)
    if config.model.lora_rank:
        model = lora.add(model, config.model, config.seed)
    return prepare(model, config).to(device), tokenizer


def load_trained(
    directory: Path, config: Config, task: Task, device: torch.device, say: Callable[[str], None]
) -> tuple[Any, Any]:
    """The model of a run's checkpoint, `model/` in it, on `device`, and its tokenizer.

    Where the checkpoint holds adapters, their base is loaded, or made, as at the start of the run.
    """
    if not config.model.lora_rank:
        model, tokenizer = load(directory)
    else:
        base, tokenizer = load_or_make(config, task, device, say)
        model = lora.restore(base, directory)
    return prepare(model, config).to(device), tokenizer


def prepare(model: Any, config: Config) -> Any:
    """The model with the run's dtype and checkpointing, which no file of it holds."""
    if config.model.dtype == "bfloat16":
        compute_in_bfloat16(model)
    if config.model.gradient_checkpointing:
        inner = unwrap(model)
        # transformers has renamed it, and warns about the old name.
        enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
        try:
            # The other kind recomputes without the keyword argument that carries the tree.
            enable({"use_reentrant": False})
            inner._rlcore_checkpointing = True
        except ValueError as error:
            raise UserError(f"model.gradient_checkpointing: {first_line(error)}") from None
    return model


def save_merged(directory: Path, model: Any, tokenizer: Any) -> None:
    """Writes the model with its adapters merged in, whole or not at all; the adapted model is used up."""
    if why_unusable(directory) is not None:
        merged = lora.merged(model)
        write_directory(directory, lambda temporary: save_model(temporary, merged, tokenizer))


def load(path: Path | str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model (evaluation mode, dropout set to 0) and tokenizer from a directory or a Hugging Face id.

    A directory of adapters gives their base, in the dtype that it had, with the adapters on it. UserError says what a
    directory lacks: a causal LM, weights, a tokenizer, an end token; or that its weights are not finite.
    """
    path = Path(path).expanduser() if str(path).startswith("~") else path
    check_place(str(path))
    if lora.is_saved(Path(path)):
        base = lora.saved_base(Path(path))
        model, tokenizer = load(base["path"], getattr(torch, base["dtype"]))
        return lora.restore(model, Path(path)), tokenizer
    shape = load_config(path)
    tokenizer = load_tokenizer(path)
    model = load_weights(path, shape, dtype)
    check_finite(model, path)
    return model.eval(), tokenizer


def load_config(path: Path | str) -> Any:
    """The model's configuration with dropout set to 0; UserError where it is that of no decoder."""
    from transformers import AutoConfig

    try:
        shape = AutoConfig.from_pretrained(path, **SAFE)
    except Exception as error:  # transformers, the hub and the operating system each raise what they like
        raise UserError(f"model.path: no model can be loaded from {str(path)!r}: {first_line(error)}") from None
    if getattr(shape, "is_encoder_decoder", False):
        raise UserError(f"model.path: {str(path)!r} is an encoder-decoder model ({shape.model_type}), not a causal LM")
    for part in (shape, shape.get_text_config()):
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return shape


def load_weights(path: Path | str, shape: Any, dtype: torch.dtype) -> Any:
    """The model; UserError where there is no causal LM of this kind, or its files lack weights."""
    from transformers import AutoModelForCausalLM

    # Of transformers' types the checker takes the one that it returns without the report.
    load_model: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, report = load_model(
            path, config=shape, dtype=dtype, use_safetensors=True, output_loading_info=True, **SAFE
        )
    except Exception as error:
        raise UserError(f"model.path: no causal LM can be loaded from {str(path)!r}: {first_line(error)}") from None
    # transformers only warns, and goes on with random numbers.
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model.path: the files of {str(path)!r} lack weights of {type(model).__name__}: {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )
    return model


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer, with the end token for padding where it has no token of its own for that."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **SAFE)
    except Exception as error:
        raise UserError(f"model.path: no tokenizer can be loaded from {str(path)!r}: {first_line(error)}") from None
    # Where there are no files, transformers makes an empty tokenizer of the model's kind.
    if set(tokenizer("0 a")["input_ids"]) <= set(tokenizer.all_special_ids):
        raise UserError(f"model.path: there is no tokenizer in {str(path)!r}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {str(path)!r} has no end-of-text token")
    if tokenizer.pad_token_id is None:
        # Padding is told from answers by lengths, never by its token.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_place(path: str) -> None:
    """Raises UserError at once where there is no such directory, and no such model to download.

    Loading itself would ask for every file again and again, a minute long, before it gave up.
    """
    if os.path.isdir(path):
        return
    if path.startswith(("/", ".")) or path.count("/") > 1:
        raise UserError(f"model.path: there is no directory {path!r}")
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if try_to_load_from_cache(path, "config.json") is None:
            HfApi().model_info(path, timeout=10)
    except Exception as error:  # the hub's, its HTTP client's and the operating system's have nothing in common
        raise UserError(
            f"model.path: no directory {path!r}, and no such model on the Hugging Face hub: {first_line(error)}"
        ) from None


def check_finite(model: Any, path: Path | str) -> None:
    """Raises UserError where a weight holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            count = int((~parameter.isfinite()).sum())
            raise UserError(f"model.path: {name} of {str(path)!r} holds {count} numbers that are NaN or infinite")


@torch.no_grad()
def check_causal(model: Any, path: Path | str) -> None:
    """Raises UserError where the logits of a token depend on the tokens after it: encoders load as causal LMs too."""
    vocabulary = model.get_input_embeddings().num_embeddings
    # Two calls of one shape: what does not depend on the last token takes the same path to the same bits, but for
    # experts, which see other batches.
    first, second = (
        model(torch.tensor([[*range(3, 10), last]], device=model.device) % vocabulary, use_cache=False).logits[0, :-1]
        for last in (10, 11)
    )
    tolerance = 1e-5 if first.dtype == torch.float32 else 1e-2
    if not (first - second).abs().max() <= tolerance * first.float().std():
        raise UserError(
            f"model.path: {type(model).__name__} of {str(path)!r} is not causal: logits depend on the tokens after them"
        )


def load_or_make(config: Config, task: Task, device: torch.device, say: Callable[[str], None]) -> tuple[Any, Any]:
    """The base model of a run, without adapters, on `device`, and its tokenizer.

    A warm-started model is kept under config.model.cache, by a hash of everything it depends on.
    """
    dtype = base_dtype(config)
    if config.model.path:
        model, tokenizer = load(config.model.path, dtype)
        if lora.is_adapted(model):
            model = lora.merged(model).to(dtype)
        check_causal(model, config.model.path)
        return model.to(device), tokenizer
    directory = Path(config.model.cache).expanduser() / f"warm-start-{fingerprint(config, device, task.digest)}"
    if why_unusable(directory) is None:
        say(f"warm-started model from {directory}")
        model, tokenizer = load(directory, dtype)
        return model.to(device), tokenizer
    say("making a small model: supervised steps on training questions until some of its answers are right")
    tokenizer = character_tokenizer()
    model = small_model(config, len(tokenizer)).to(device).eval()
    check_fit(model, tokenizer, task, config.rollout.max_new_tokens)
    warm_start(model, tokenizer, task, config, say)
    try:
        write_directory(directory, lambda temporary: save_model(temporary, model, tokenizer))
    except SaveError as error:
        say(f"the warm-started model is not kept for the next run: {error}")
        return model.to(dtype), tokenizer
    # Read back, so that the first run has what later ones have, down to the bytes of the tokenizer's files.
    model, tokenizer = load(directory, dtype)
    return model.to(device), tokenizer


def base_dtype(config: Config) -> torch.dtype:
    """What the base is held in: float32, or bfloat16 where adapters are trained in bfloat16."""
    return torch.bfloat16 if config.model.dtype == "bfloat16" and config.model.lora_rank else torch.float32


def check_fit(model: Any, tokenizer: Any, task: Task, answer_length: int) -> None:
    """Makes the task's prompts fit the model; raises UserError where they can not, or tokens have no embedding.

    A model's context ends where its rotary frequencies would begin to depend on the longest sequence of a batch: the
    same answer would have other log-probs in other company.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"model.path: the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}")
    limits = getattr(model.config.get_text_config(), "max_position_embeddings", None), max_depth(unwrap(model))
    context = min((limit for limit in limits if limit is not None), default=None)
    task.fit(tokenizer, context, answer_length)
