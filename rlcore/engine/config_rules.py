"""What a configuration must hold to: the range of each field, then the rules between fields."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

from rlcore.engine.config import Config, Range
from rlcore.engine.errors import UserError
from rlcore.methods import methods


def validate(config: Config) -> Config:
    """Checks ranges and returns the config; raises UserError that names the key, what is expected and what came."""
    check_ranges(config)
    if config.method not in methods():
        raise UserError(f"method: unknown key {config.method!r}; there are {', '.join(methods())}")
    if Path(config.name).name != config.name or config.name == "..":
        raise UserError(f"name must be a plain name without directories, got {config.name!r}; they go into dir")
    for key, path in (("model.path", config.model.path), ("model.cache", config.model.cache)):
        try:
            Path(path).expanduser()
        except RuntimeError:
            raise UserError(f"{key}: there is no user whose home would be {path!r}") from None
    if config.task.template and "{" not in config.task.template:
        raise UserError(
            f"task.template must be a text with {{question}} or another {{name}} in it, got {config.task.template!r}"
        )
    check_data_and_rewards(config)
    if config.model.hidden_size % config.model.heads or config.model.heads % 2:
        raise UserError("model.heads must be even and divide model.hidden_size")
    if config.model.lora_merge and not config.model.lora_rank:
        raise UserError("model.lora_merge needs adapters to merge: set model.lora_rank to 1 or more, got 0")
    if config.update.minibatches > config.rollout.prompts:
        raise UserError("update.minibatches must not be more than rollout.prompts: minibatches hold whole groups")
    if "groups" in methods()[config.method].needs and config.rollout.samples < 2:
        raise UserError(
            f"rollout.samples must be at least 2 for {config.method}, which compares the answers of a group, got "
            f"{config.rollout.samples}"
        )
    if config.rollout.dynamic_sampling and config.rollout.samples < 2:
        raise UserError(
            "rollout.samples must be at least 2 with rollout.dynamic_sampling, which looks for groups of answers that "
            f"differ, got {config.rollout.samples}"
        )
    if config.kl.place == "none" and config.kl.adaptive_target:
        raise UserError(
            f"kl.place must be loss or reward with kl.adaptive_target = {config.kl.adaptive_target}, got 'none'"
        )
    answers = config.rollout.prompts * config.rollout.samples
    if config.kl.adaptive_target and config.kl.horizon < answers:
        raise UserError(
            f"kl.horizon must be at least the answers of a step, rollout.prompts * rollout.samples = {answers}, got "
            f"{config.kl.horizon}"
        )
    if config.kl.place == "loss" and config.kl.kind == "k1":
        raise UserError(
            "kl.kind must be k2 or k3 with kl.place = loss: the gradient of k1 is zero on average, got 'k1'"
        )
    return config


def check_data_and_rewards(config: Config) -> None:
    """The rules between the fields of `task`, and between those of `reward`."""
    task, reward = config.task, config.reward
    for name, weight in task.mixture.items():
        if not (0 < weight < float("inf")):
            raise UserError(f"task.mixture.{name} must be greater than 0, got {weight!r}")
    if ("data" in task.mixture) > bool(task.data):
        raise UserError("task.mixture names data, but task.data names no file")
    if task.mixture and task.data and "data" not in task.mixture:
        raise UserError("task.data would not be used: task.mixture does not name data")
    if task.mixture and task.template and not task.data:
        raise UserError("task.template is for one task or for task.data: the tasks of a mixture have their own")
    if task.held_out_data and not task.data:
        raise UserError("task.held_out_data needs task.data, the files to train on")
    if task.system and not task.chat:
        raise UserError("task.system needs task.chat, which puts it before the prompts")
    names = list(reward.channels) or ["correct"]
    for key in [*reward.weights, *([reward.correct] if reward.correct else [])]:
        if key not in names:
            where = "reward.correct" if key == reward.correct else "reward.weights"
            raise UserError(f"{where}: no channel {key!r}; there are {', '.join(names)}")
    for name, weight in reward.weights.items():
        if not abs(weight) < float("inf"):
            raise UserError(f"reward.weights.{name} must be a finite number, got {weight!r}")


def check_ranges(config: Any, prefix: str = "") -> None:
    """Holds every value against what its field may be; None always may."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{prefix}{name}.")
        else:
            check_value(value, hint, prefix + name)


def check_value(value: Any, hint: Any, name: str) -> None:
    """Raises UserError for a number out of the range beside its field, and for text that no file or path can hold."""
    for allowed in getattr(hint, "__metadata__", ()):
        if isinstance(allowed, Range) and value is not None and not allowed.holds(value):
            raise UserError(f"{name} must be {allowed.expected}, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{name} must be an integer of at most 64 bits, got {shown(value)}")
    texts = [value] if isinstance(value, str) else [*value, *value.values()] if isinstance(value, dict) else []
    for text in texts:
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)):
            raise UserError(f"{name} must be text without null characters and broken letters, got {shown(text)}")


def shown(value: Any) -> str:
    """A value in a message: its first characters are enough."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."
