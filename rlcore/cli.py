"""The command line: `rlcore train`, `plot` and `backends`.

Exit codes: 0 done; 1 an error that should not happen, with a traceback; 2 something in the command, the config or the
files is not as it must be; 3 the machine could not write (disk full, read-only directory); 130 interrupted, saved.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rlcore.engine.config import Config, validate
from rlcore.engine.config_file import load_toml
from rlcore.engine.errors import Interrupted, SaveError, UserError

T = TypeVar("T")
PACKAGES = (
    "transformers", "tokenizers", "safetensors", "reasoning_gym", "tyro", "rich", "tensorboard", "matplotlib",
)  # fmt: skip
USAGE = """usage: rlcore COMMAND [OPTIONS]

  train       train a language model by reinforcement learning; `rlcore train --help` lists all options
  plot        draw the curves of one run or several into one picture
  backends    say which kernels are live on this machine, and why the others are not
  --version   print the version"""


@dataclass
class Train(Config):
    """Train a language model by reinforcement learning.

    Without options a small model learns sums and differences of two numbers in a few minutes. Values come from the
    defaults, then from a TOML file (--config, or the run's own on --resume), then from the command line.
    """

    config: Path | None = None
    """A TOML file with the options below; each run writes its own as runs/NAME/config.toml."""
    resume: Path | None = None
    """Directory of a run to go on with, from its last good checkpoint."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if command == "train":
            train(rest)
        elif command == "plot":
            from rlcore.engine.plot import Plot, plot

            plot(parse(Plot, rest, command))
        elif command == "backends":
            import rlcore

            for name, state in rlcore.backends().items():
                print(f"{name:12} {state}")
        elif command == "--version":
            import rlcore

            print(rlcore.__version__)
        elif command in ("--help", "-h"):
            print(USAGE)
        else:
            raise UserError(f"unknown command {command!r}\n{USAGE}")
    except UserError as error:
        return stop(error, 2)
    except SaveError as error:
        return stop(error, 3)
    except Interrupted as error:
        return stop(error, 130)
    except KeyboardInterrupt:
        return stop("interrupted", 130)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rlcore"):
            raise
        needed = f"the package {error.name!r}, which is not installed" if error.name else f"more packages ({error})"
        return stop(f"{command} needs {needed}; from a checkout of rlcore: pip install '.[train]'", 2)
    return 0


def stop(error: object, code: int) -> int:
    print(f"rlcore: {error}", file=sys.stderr)
    return code


def parse(command: type[T], arguments: list[str], name: str) -> T:
    """The options of a command; fields without a default are positional."""
    import tyro

    return tyro.cli(command, args=arguments, prog=f"rlcore {name}", config=(tyro.conf.PositionalRequiredArgs,))


def train(arguments: list[str]) -> None:
    """`rlcore train`: the config from defaults, a TOML file and the command line, in this order of precedence."""
    # A package that only the end of a run uses is missed now, not then.
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    import tyro

    defaults = Config()
    resume = value_of("--resume", arguments)
    if resume is not None:
        directory = Path(resume) if Path(resume).name not in ("", "..") else Path(resume).resolve()
        if not (directory / "config.toml").is_file():
            raise UserError(f"--resume: {resume} is not the directory of a run (it has no config.toml)")
        stored = load_toml(directory / "config.toml", defaults)
        defaults = dataclasses.replace(stored, dir=str(directory.parent), name=directory.name)
    own = defaults.dir, defaults.name
    if (path := value_of("--config", arguments)) is not None:
        defaults = load_toml(Path(path), defaults)
    command = tyro.cli(Train, args=arguments, default=Train(**vars(defaults)), prog="rlcore train")
    config = validate(Config(**{item.name: getattr(command, item.name) for item in dataclasses.fields(Config)}))
    if resume is not None and (config.dir, config.name) != own:
        raise UserError(f"--resume: the run keeps its place {resume}; leave --dir and --name out")

    from transformers.utils import logging

    from rlcore.engine.run import name_run
    from rlcore.engine.trainer import train as run_training

    logging.disable_progress_bar()
    # Before the first step it is like Ctrl-C; from then on the loop finishes the step that it is at.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_training(name_run(config), resume=command.resume is not None)
    finally:
        signal.signal(signal.SIGTERM, before)


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of a flag, looked up before the options are parsed because it supplies their defaults."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None


if __name__ == "__main__":
    sys.exit(main())
