"""The configuration: dataclasses that are the command line, its help and the TOML file.

Precedence: the defaults below < a TOML file (`--config FILE`, or `runs/NAME/config.toml` on resume) < the command line.
The string under a field is its help text. A TOML file has the same names: top-level keys, and one table per section.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlcore.engine.errors import UserError
from rlcore.methods import methods


@dataclass
class TaskConfig:
    """What is practised."""

    name: str = "chain_sum"
    """Name of a reasoning-gym task."""
    options: dict[str, str] = field(default_factory=dict)
    """Options of the task, as KEY VALUE pairs. chain_sum defaults to two operands of one or two digits."""
    template: str = ""
    """The prompt: {question} stands for the question's text, {name} for an entry of the task's metadata. Empty: the
    question and a line break; for chain_sum the bare "{expression} ="."""
    partial_credit: bool = False
    """Reward an answer that is not right with the verifier's score for it. Policies stop at such answers: "14" for "4"
    is half right to chain_sum's verifier, because it contains it."""
    pool: int = 80000
    """How many items are drawn from the task; duplicates are dropped."""
    seed: int = 0
    """Seed of the pool: runs with different --seed share the same problems and the same held-out set."""
    held_out: int = 500
    """Number of held-out problems used by evaluations."""
    held_out_fraction: float = 0.1
    """Share of all questions, chosen by a hash of the text, that training never sees."""


@dataclass
class ModelConfig:
    """The policy."""

    path: str = ""
    """Directory or id of a Hugging Face causal LM. Empty: a small Qwen3, made by a short supervised warm start."""
    hidden_size: int = 128
    """Width of the small model."""
    layers: int = 2
    """Layers of the small model."""
    heads: int = 4
    """Attention heads of the small model; it has half as many key and value heads."""
    warm_accuracy: float = 0.4
    """The supervised warm start of the small model ends when its sampled answers would be right at this rate."""
    warm_steps: int = 500
    """Most steps of the warm start."""
    warm_batch: int = 256
    """Problems per step of the warm start."""
    warm_lr: float = 6e-3
    """Learning rate of the warm start."""
    cache: str = "~/.cache/rlcore"
    """Where warm-started models are kept for the next run."""


@dataclass
class RolloutConfig:
    """How answers are sampled for training."""

    prompts: int = 128
    """Prompts per step."""
    samples: int = 8
    """Answers per prompt: the group over which advantages are compared."""
    max_new_tokens: int = 8
    """Longest answer, in tokens, the end token included."""
    temperature: float = 1.0
    """Sampling temperature, also that of the log-probabilities in the loss."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0 is off."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this much probability; 1 is off."""


@dataclass
class UpdateConfig:
    """How the policy is updated."""

    lr: float = 1.5e-3
    """Peak learning rate of AdamW."""
    warmup: int = 5
    """Steps over which the learning rate rises linearly from zero."""
    final_lr: float = 0.05
    """Share of the learning rate that is left at the last step; it falls in a straight line."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.99
    """AdamW's decay of the second moment."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    epochs: int = 1
    """Passes over the answers of a step."""
    minibatches: int = 2
    """Optimizer steps per pass."""
    micro_tokens: int = 8192
    """Most answer tokens that go through the model at a time; the answers to a prompt stay together."""
    clip_low: float | None = None
    """Lower clip width of the probability ratio; the method's own where absent."""
    clip_high: float | None = None
    """Upper clip width of the probability ratio; the method's own where absent."""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """tree: packed prefix trees and the folded head; padded: plain batches; auto: trees where they are exact."""


@dataclass
class EvalConfig:
    """How the policy is measured: mean accuracy over samples at temperature 1 on the held-out problems."""

    every: int = 25
    """Steps between evaluations; there is always one before and one after. 0: only these two."""
    samples: int = 8
    """Answers per held-out problem."""
    batch: int = 125
    """Problems that are sampled at a time."""


@dataclass
class Config:
    """Reinforcement learning of a language model on a task with a verifier."""

    method: str = "grpo"
    """Algorithm, by key: grpo, rloo, reinforce_pp."""
    steps: int = 400
    """Steps: rollout, reward, advantage, update."""
    seed: int = 0
    """Seeds everything random: the small model and its warm start, prompts, answers, order of updates."""
    name: str = ""
    """Name of the run; empty: task, method and seed, with a number where the name is taken."""
    dir: str = "runs"
    """Directory of the runs."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto: cuda where there is one, else cpu."""
    threads: int = 0
    """CPU threads; 0: one for the small model, whose work is too fine to share, and torch's own number for others."""
    shuffle_rewards: bool = False
    """Control experiment: deal the rewards of a step out at random. Nothing can be learned."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept."""
    log_samples: int = 8
    """Answers written to samples.jsonl per step."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def validate(config: Config) -> Config:
    """Checks ranges and returns the config; raises UserError that names the key, what is expected and what came."""
    if config.method not in methods():
        raise UserError(f"method: unknown key {config.method!r}; there are {', '.join(methods())}")
    if Path(config.name).name != config.name or config.name == "..":
        raise UserError(f"name must be a plain name without directories, got {config.name!r}; they go into dir")
    at_least_one = (
        "steps checkpoint_every keep task.pool task.held_out model.hidden_size model.layers model.heads "
        "model.warm_batch rollout.prompts rollout.samples rollout.max_new_tokens update.epochs update.minibatches "
        "update.micro_tokens eval.samples eval.batch"
    )
    not_negative = (
        "threads log_samples model.warm_steps rollout.top_k update.warmup update.weight_decay update.clip_low "
        "update.clip_high eval.every"
    )
    positive = "model.warm_lr rollout.temperature rollout.top_p update.lr update.max_grad_norm"
    for keys, holds, expected in (
        (at_least_one, lambda v: v >= 1, "at least 1"),
        (not_negative, lambda v: v >= 0, "0 or more"),
        (positive, lambda v: v > 0, "greater than 0"),
        ("rollout.top_p", lambda v: v <= 1, "at most 1"),
        ("update.final_lr model.warm_accuracy", lambda v: 0 <= v <= 1, "in [0, 1]"),
        ("task.held_out_fraction", lambda v: 0 < v < 1, "between 0 and 1"),
        ("update.beta1 update.beta2", lambda v: 0 <= v < 1, "in [0, 1)"),
        ("task.template", lambda v: not v or "{" in v, "a text with {question} or another {name} in it"),
    ):
        for key in keys.split():
            value = config
            for part in key.split("."):
                value = getattr(value, part)
            if value is not None and not holds(value):
                raise UserError(f"{key} must be {expected}, got {value!r}")
    if config.model.hidden_size % config.model.heads or config.model.heads % 2:
        raise UserError("model.heads must be even and divide model.hidden_size")
    if config.update.minibatches > config.rollout.prompts:
        raise UserError("update.minibatches must not be more than rollout.prompts: minibatches hold whole groups")
    if "groups" in methods()[config.method].needs and config.rollout.samples < 2:
        raise UserError(
            f"rollout.samples must be at least 2 for {config.method}, which compares the answers of a group, got "
            f"{config.rollout.samples}"
        )
    return config


def load_toml(path: Path, default: Config | None = None) -> Config:
    """The config in a TOML file over `default`. Unknown keys and wrong types raise UserError: file, line and key."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None

    def line_of(section: str, key: str) -> str:
        """` line 7`, where the key of a section stands, found by its text."""
        current = ""
        for number, line in enumerate(text.splitlines(), 1):
            if table := re.match(r"\s*\[([^\]]+)\]", line):
                current = table[1].strip()
            if re.match(rf"\s*{re.escape(key)}\s*=", line) and current == section or table and current == key:
                return f" line {number}"
        return ""

    def fill(cls: type, values: dict[str, Any], base: Any, section: str) -> Any:
        hints = typing.get_type_hints(cls)
        changes = {}
        for key, value in values.items():
            full = f"{section}.{key}" if section else key
            where = f"{path}{line_of(section, key)}"
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1) or nearest_elsewhere(key)
                raise UserError(f"{where}: unknown key {full!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            if dataclasses.is_dataclass(hints[key]):
                if not isinstance(value, dict):
                    raise UserError(f"{where}: {full!r} is a table, write [{full}] and its keys below")
                changes[key] = fill(typing.cast(type, hints[key]), value, getattr(base, key), full)
            else:
                changes[key] = coerce(value, hints[key], f"{where}: {full}")
        return dataclasses.replace(base, **changes)

    return fill(Config, data, default or Config(), "")


def nearest_elsewhere(key: str) -> list[str]:
    """The closest full name among all sections, for a key that stands in the wrong one."""
    names = {name.rpartition(".")[2]: name for name in flatten(Config())}
    return [names[near] for near in difflib.get_close_matches(key, names, n=1)]


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type of a field, or UserError. Integers pass as floats; nothing else is converted."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in options:
            return value
        raise UserError(f"{where} must be one of {', '.join(map(str, options))}, got {value!r}")
    if origin in (typing.Union, types.UnionType):
        hint = next(option for option in options if option is not type(None))
    if origin is dict:
        if isinstance(value, dict):
            return {str(key): str(item) for key, item in value.items()}
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    names = {int: "an integer", float: "a number", str: "a text in quotes", bool: "true or false", dict: "a table"}
    raise UserError(f"{where} must be {names[origin or hint]}, got {value!r}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The config as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{item.name}."))
        else:
            flat[prefix + item.name] = value
    return flat


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Old and new value of every key, dotted, in which two configs differ."""
    before, after = flatten(old), flatten(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def to_toml(config: Config, leave_out: tuple[str, ...] = ()) -> str:
    """The config as TOML text that `load_toml` reads back to an equal config; absent values are left out.

    leave_out: top-level keys that are left out too.
    """
    lines: list[str] = []

    def table(values: Any, name: str) -> None:
        items = {item.name: getattr(values, item.name) for item in dataclasses.fields(values)}
        items = {key: value for key, value in items.items() if name or key not in leave_out}
        if name:
            lines.append(f"\n[{name}]")
        for key, value in items.items():
            if isinstance(value, dict):
                pairs = ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())
                lines.append(f"{key} = {{ {pairs} }}" if value else f"{key} = {{}}")
            elif value is not None and not dataclasses.is_dataclass(value):
                lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
        for key, value in items.items():
            if dataclasses.is_dataclass(value):
                table(value, f"{name}.{key}" if name else key)

    table(config, "")
    return "\n".join(lines) + "\n"
