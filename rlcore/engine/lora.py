"""LoRA by PEFT: W x + (alpha / rank) B A x with W frozen; one copy of the weights serves policy and reference.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685. B starts at zero, so an adapted
model starts as its base. A checkpoint holds the adapters alone and, in base.json, the path of the base, the dtype in
which it was held and the sha256 of its weights; adapters never go onto other weights than those they were trained on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from rlcore.engine.config import ModelConfig
from rlcore.engine.errors import UserError, first_line
from rlcore.engine.seeding import seed_of

BASE = "base.json"


def add(model: Any, config: ModelConfig, seed: int) -> Any:
    """The model with fresh adapters, float32; all else is frozen. UserError where the targets do not exist."""
    base = describe(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "lora"))
        adapted = adapt(model, config)
    adapted._rlcore_base = base
    return adapted.eval()


def adapt(model: Any, config: ModelConfig) -> Any:
    """PEFT's model around this one, with adapters from torch's random state."""
    peft = require_peft()
    targets: Any = config.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    shape = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, shape)
    except ValueError as error:
        raise UserError(
            f"model.lora_targets: {config.lora_targets!r} does not fit this model: {first_line(error)}"
        ) from None


def is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


def is_saved(directory: Path) -> bool:
    """Whether a directory holds adapters that `save` wrote."""
    return (directory / BASE).is_file() and (directory / "adapter_config.json").is_file()


def save(directory: Path, model: Any) -> None:
    """Adapters in PEFT's format, and base.json."""
    # PEFT holds the targets as a set, whose order differs between processes, and from that of a set read back.
    for shape in model.peft_config.values():
        shape.target_modules = sorted(shape.target_modules)
    # What the base has is in the base: no embeddings, and no model card, which PEFT fills with questions to answer.
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    (directory / BASE).write_text(json.dumps(model._rlcore_base, indent=1) + "\n")


def saved_base(directory: Path) -> dict[str, str]:
    """path, dtype and sha256 of the model that the adapters in a directory belong to."""
    return json.loads((directory / BASE).read_text())


def restore(model: Any, directory: Path) -> Any:
    """The base model with the adapters of a directory; UserError where they were trained on other weights."""
    peft = require_peft()
    expected, found = saved_base(directory), describe(model)
    if any(expected[key] != found[key] for key in ("dtype", "sha256")):
        raise UserError(
            f"{directory}: its adapters belong to the weights of {expected['path']!r} (sha256 "
            f"{expected['sha256'][:12]}, {expected['dtype']}), those found have sha256 {found['sha256'][:12]} "
            f"({found['dtype']})"
        )
    with torch.random.fork_rng(devices=[]):
        adapted = peft.PeftModel.from_pretrained(model, directory, is_trainable=True)
    adapted._rlcore_base = expected
    return adapted.eval()


def merged(model: Any) -> Any:
    """The base with W + (alpha / rank) B A in place of W, in the base's dtype; the adapted model is used up."""
    return model.merge_and_unload()


def describe(model: Any) -> dict[str, str]:
    """path, dtype and sha256 over names, dtypes, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "path": str(model.config.name_or_path),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sha256": digest.hexdigest(),
    }


def require_peft() -> Any:
    """The peft package, or UserError that says how to get it."""
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise UserError("model.lora_rank needs the package 'peft': pip install 'rlcore[lora]'") from None
    return peft
