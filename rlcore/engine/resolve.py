"""What a run is to be: defaults < the task's < the method's < TOML files < the command line; what set each value."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.engine.arguments import parse
from rlcore.engine.config import Config
from rlcore.engine.config_file import changes, flatten, load_toml
from rlcore.engine.config_rules import validate
from rlcore.engine.errors import UserError
from rlcore.engine.tasks import DEFAULTS
from rlcore.methods import methods


@dataclass
class Train(Config):
    """Train a language model by reinforcement learning.

    Without options a small model learns sums and differences of two numbers in a few minutes. Values come from the
    defaults, then from the task's and the method's own, then from a TOML file (--config, or the run's own on --resume),
    then from the command line.
    """

    config: Path | None = None
    """A TOML file with the options below; each run writes its own as runs/NAME/config.toml."""
    resume: Path | None = None
    """Directory of a run to go on with, from its last good checkpoint."""
    dry_run: bool = False
    """Print the resolved config, the parameters, an estimate of the memory and the size of a step; write nothing."""


@dataclass(frozen=True)
class Resolved:
    """A valid config; `sources` names, for every dotted key that is not at its default, who set it."""

    config: Config
    sources: dict[str, str]
    resume: bool
    dry_run: bool


def resolve(arguments: list[str]) -> Resolved:
    """The config of `rlcore train ARGUMENTS`; UserError names the key or option that is not as it must be."""
    resume, given = value_of("--resume", arguments), value_of("--config", arguments)
    files = [] if resume is None else [config_of(resume)]
    files += [] if given is None else [Path(given)]

    config = Config()
    sources: dict[str, str] = {}

    def layer(changed: Config, source: str) -> Config:
        for key in changes(config, changed):
            sources[key] = source
        return changed

    for file in files:
        config = load_toml(file, config)
    method = value_of("--method", arguments) or config.method
    task = value_of("--task.name", arguments) or config.task.name
    task = "" if config.task.data or config.task.mixture else task
    config = layer(with_keys(Config(), DEFAULTS.get(task, {})), f"the task {task}")
    own = published(method)
    config = layer(with_keys(config, own), f"the method {method}")
    for file in files:
        before = flatten(config)
        config = layer(load_toml(file, config), str(file))
        if resume is not None and file == files[0] and config.method != method:
            # The run's file holds every key: those of its old method are as little a choice as those of the new one.
            other = {key: before[key] for key in {**published(config.method), **own}}
            config = layer(with_keys(config, other), f"the method {method}")
    place = config.dir, config.name
    if resume is not None:
        directory = config_of(resume).parent
        config = dataclasses.replace(config, dir=str(directory.parent), name=directory.name)
        place = config.dir, config.name
    command = parse(Train, arguments, "rlcore train", Train(**vars(config)))
    final = Config(**{item.name: getattr(command, item.name) for item in dataclasses.fields(Config)})
    config = layer(validate(final), "the command line")
    if resume is not None and (config.dir, config.name) != place:
        raise UserError(f"--resume: the run keeps its place {resume}; leave --dir and --name out")
    return Resolved(config, sources, resume is not None, command.dry_run)


def published(method: str) -> dict[str, Any]:
    """The settings that belong to a method; none for a name that is unknown."""
    return methods()[method].defaults if method in methods() else {}


def config_of(run: str) -> Path:
    """config.toml of the run to be resumed."""
    directory = Path(run) if Path(run).name not in ("", "..") else Path(run).resolve()
    if not os.path.isfile(directory / "config.toml"):
        raise UserError(f"--resume: {run} is not the directory of a run (it has no config.toml)")
    return directory / "config.toml"


def with_keys(config: Config, values: dict[str, Any]) -> Config:
    """The config with values at dotted keys."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            name, value = section, dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{name: value})
    return config


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The last value of a flag, looked up before the options are parsed because it supplies their defaults."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
    return value
