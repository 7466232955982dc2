"""Checkpoints that are whole or not there: safetensors and JSON, a manifest, one rename.

    checkpoints/step-000100/ model/...  optimizer.safetensors  trainer.json  manifest.json

Everything is written into a temporary directory beside the others, synced to the disk, and renamed. The manifest holds
the format's version and size and sha256 of every file; a directory that does not match it is never loaded, and a
resumed run sets it aside. One of another format is refused and left as it is.
Model and tokenizer are in Hugging Face format, so `from_pretrained` loads a checkpoint's `model/` anywhere. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlcore.engine import lora
from rlcore.engine.errors import SaveError, UserError

MANIFEST = "manifest.json"
VERSION = 2


class Saved(NamedTuple):
    """A checkpoint on the disk."""

    path: Path
    step: int


def save(
    root: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    keep: int,
    more: Callable[[Path], None] = lambda directory: None,
) -> Path:
    """Writes `root/step-...` whole or not at all and removes all but the last `keep`; returns its path.

    more: writes what else belongs into the directory. Raises SaveError where the disk is full or not writable; what was
    there before is left as it was.
    """
    final = root / f"step-{step:06d}"
    if final.exists() and why_unusable(final) is None:
        return final

    def write(directory: Path) -> None:
        save_model(directory / "model", model, tokenizer)
        save_optimizer(directory / "optimizer.safetensors", model, optimizer)
        more(directory)
        (directory / "trainer.json").write_text(json.dumps({"step": step}) + "\n")

    write_directory(final, write)
    others = [path for path in found(root) if path != final]
    for old in others[: max(0, len(others) - keep + 1)]:
        discard(old)
    return final


def load_latest(root: Path, say: Callable[[str], None]) -> Saved | None:
    """The newest whole checkpoint under `root`, or None; damaged ones are named through `say` and passed over."""
    for directory in reversed(found(root)):
        problem = why_unusable(directory)
        if (other := format_of(directory)) not in (None, VERSION):
            raise UserError(
                f"{directory} was written by another version of rlcore: it has format {other}, this one reads {VERSION}"
            )
        if problem is None:
            return Saved(directory, json.loads((directory / "trainer.json").read_text())["step"])
        say(f"skipping {directory}: {problem}")
    return None


def set_aside(root: Path, after: int) -> None:
    """Renames the checkpoints of later steps than `after` to `*.damaged`: load_latest found them unusable.

    Left where they are, they would count among those that are kept, in place of good ones.
    """
    for directory in found(root):
        if step_of(directory) > after:
            aside = directory.with_name(f"{directory.name}.damaged")
            try:
                if aside.exists():
                    discard(aside)
                os.replace(directory, aside)
            except OSError as error:
                raise SaveError(f"could not rename {directory}: {error.strerror}") from error


def save_optimizer(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state by the names of the model's parameters."""
    from safetensors.torch import save as to_bytes

    path.write_bytes(to_bytes(optimizer_tensors(model, optimizer)))


def restore_optimizer(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Puts the optimizer's saved state back; parameters go by name, hyper-parameters stay those of `optimizer`."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    check_names(tensors, model, path)
    for name, parameter in model.named_parameters():
        prefix = name + "/"
        for key in [key for key in tensors if key.startswith(prefix)]:
            value = tensors[key]
            # AdamW keeps its step count on the host.
            optimizer.state[parameter][key[len(prefix) :]] = value if value.dim() == 0 else value.to(parameter.device)


def check_names(tensors: dict[str, torch.Tensor], model: Any, path: Path) -> None:
    """Raises UserError where the state of an optimizer belongs to parameters that the model does not have."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [
        f"{key} {tuple(value.shape)} for {shapes[name]}" if name in shapes else key
        for key, value in tensors.items()
        for name in [key.rpartition("/")[0]]
        if name not in shapes or value.dim() > 0 and tuple(value.shape) != shapes[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} is of another model: it holds {', '.join(wrong[:3])}{more}")


def optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as one flat dict `parameter/moment`."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def save_model(directory: Path, model: Any, tokenizer: Any) -> None:
    """Model and tokenizer in Hugging Face format; of a model with adapters, these alone."""
    if lora.is_adapted(model):
        lora.save(directory, model)
    else:
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary directory, adds the manifest, syncs, and renames it to `final`.

    Raises SaveError, with nothing left behind, where the machine can not write.
    """
    from safetensors import SafetensorError

    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        files = {
            str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": digest(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        (temporary / MANIFEST).write_text(json.dumps({"format": VERSION, "files": files}, indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if why_unusable(final) is None:
            # Another process was faster with the same thing.
            shutil.rmtree(temporary, ignore_errors=True)
            return
        if final.exists():
            discard(final)
        os.replace(temporary, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise SaveError(f"could not write {final}: {reason}") from error


def why_unusable(directory: Path) -> str | None:
    """Why a checkpoint can not be loaded, in a few words, or None where every file matches the manifest."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if (other := format_of(directory)) != VERSION:
            return f"{MANIFEST} has format {other}, not {VERSION}"
        for name, entry in manifest["files"].items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} is cut short ({path.stat().st_size} of {entry['size']} bytes)"
            if digest(path) != entry["sha256"]:
                return f"{name} is damaged (its sha256 differs)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is missing or cut short"
    return None


def format_of(directory: Path) -> int | None:
    """The format in which a checkpoint was written, or None where its manifest can not be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    # The first format had no number: its manifest was the table of files itself.
    return manifest.get("format", 1) if isinstance(manifest, dict) else None


def found(root: Path) -> list[Path]:
    """All checkpoint directories under `root`, oldest step first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def clean(root: Path) -> None:
    """Removes what a killed process left half written. Only the holder of the run's lock may call it."""
    if root.is_dir():
        for path in root.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def discard(directory: Path) -> None:
    """Removes a directory so that it is never seen half removed."""
    doomed = directory.with_name(f".{directory.name}.{os.getpid()}.old.tmp")
    os.replace(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    sha = hashlib.sha256()
    while block := file.read(1 << 20):
        sha.update(block)
    return sha.hexdigest()


def sync(path: Path) -> None:
    """Forces a file's or directory's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
