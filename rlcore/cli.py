"""The command line: `rlcore train` and `rlcore backends`.

Exit codes: 0 done; 1 an error that should not happen, with a traceback; 2 something in the command, the config or the
files is not as it must be; 3 the machine could not write (disk full, read-only directory); 130 interrupted, saved.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from rlcore.engine.config import Config, load_toml, validate
from rlcore.engine.errors import Interrupted, SaveError, UserError

USAGE = """usage: rlcore COMMAND [OPTIONS]

  train       train a language model by reinforcement learning; `rlcore train --help` lists all options
  backends    say which kernels are live on this machine, and why the others are not
  --version   print the version"""


@dataclass
class Train(Config):
    """Train a language model by reinforcement learning.

    Without options a small model learns sums of two numbers in a few minutes. Values come from the defaults, then from
    a TOML file (--config, or the run's own on --resume), then from the command line.
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
        return stop("interrupted before the step was done; the last checkpoint is intact", 130)
    return 0


def stop(error: object, code: int) -> int:
    print(f"rlcore: {error}", file=sys.stderr)
    return code


def train(arguments: list[str]) -> None:
    """`rlcore train`: the config from defaults, a TOML file and the command line, in this order of precedence."""
    try:
        import tyro
    except ImportError:
        raise UserError("training needs more packages; install them with: pip install 'rlcore[train]'") from None

    defaults = Config()
    resume = value_of("--resume", arguments)
    if resume is not None:
        if not (Path(resume) / "config.toml").is_file():
            raise UserError(f"--resume: {resume} is not the directory of a run (it has no config.toml)")
        defaults = load_toml(Path(resume) / "config.toml", defaults)
    if (path := value_of("--config", arguments)) is not None:
        defaults = load_toml(Path(path), defaults)
    command = tyro.cli(Train, args=arguments, default=Train(**vars(defaults)), prog="rlcore train")
    config = validate(Config(**{item.name: getattr(command, item.name) for item in dataclasses.fields(Config)}))

    from transformers.utils import logging

    from rlcore.engine.run import name_run
    from rlcore.engine.trainer import train as run_training

    logging.disable_progress_bar()
    if command.resume is not None:
        directory = command.resume.resolve()
        config = dataclasses.replace(config, dir=str(directory.parent), name=directory.name)
    run_training(name_run(config), resume=command.resume is not None)


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
