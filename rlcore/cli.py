"""The command line: `rlcore train`, `eval`, `show`, `plot`, `methods`, `doctor`, `backends`.

Exit codes: 0 done; 1 an error that should not happen, with a traceback, or a self-test that failed; 2 something in the
command, the config or the files is not as it must be; 3 the machine could not go on (disk full, read-only directory,
out of memory); 130 interrupted, saved.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from rlcore import interrupt
from rlcore.engine.errors import Interrupted, SaveError, UserError

PACKAGES = (
    "transformers", "tokenizers", "safetensors", "reasoning_gym", "tyro", "rich", "tensorboard", "matplotlib",
)  # fmt: skip
EXIT_CODES = """exit codes: 0 done; 1 an error that should not happen, or a self-test that failed; 2 a mistake in the
command, the config or the files; 3 the machine could not go on (disk full, read-only directory, out of memory);
130 interrupted: a run is saved and says how to go on"""
# No room, no quota, a file system for reading only.
CAN_NOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        interrupt.end()
        if command in COMMANDS:
            code = COMMANDS[command][0](rest)
            sys.stdout.flush()
            return code
        if command == "--version":
            import rlcore

            print(rlcore.__version__)
        elif command in ("--help", "-h"):
            print(usage())
        else:
            import difflib

            near = difflib.get_close_matches(command, COMMANDS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {command!r}; {meant} (rlcore --help says more)")
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
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return stop("there is not enough memory; `rlcore train --dry-run` estimates what a config needs", 3)
    except BrokenPipeError:
        drop_output()
        return stop("the reader of the output has closed it", 3)
    except OSError as error:
        if error.errno not in CAN_NOT_WRITE:
            raise
        drop_output()
        return stop(f"could not write {error.filename or 'the output'}: {error.strerror}", 3)
    return 0


def usage() -> str:
    commands = "\n".join(f"  {name:11} {line}" for name, (_, line) in COMMANDS.items())
    return (
        f"usage: rlcore COMMAND [OPTIONS]\n\n{commands}\n  --version   print the version\n\n"
        f"`rlcore train --help` lists all options of train, `rlcore COMMAND --help` those of any other command.\n\n"
        f"{EXIT_CODES}"
    )


def stop(error: object, code: int) -> int:
    print(f"rlcore: {error}", file=sys.stderr)
    return code


def drop_output() -> None:
    """Lets the rest of the output go nowhere: Python would try again to write it at exit, and fail aloud."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def out_of_memory(error: Exception) -> bool:
    """Whether a MemoryError or torch's RuntimeError says that an allocation failed."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("can't allocate memory", "out of memory", "not enough memory")
    )


def train(arguments: list[str]) -> int:
    """`rlcore train`."""
    # A package that only the end of a run uses is missed now, not then.
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    with terminable():
        from rlcore.engine.resolve import resolve

        resolved = resolve(arguments)

        from transformers.utils import logging

        from rlcore.engine.run import name_run
        from rlcore.engine.trainer import train as run_training

        logging.disable_progress_bar()
        if resolved.dry_run:
            from rlcore.engine.estimate import dry_run

            print(dry_run(resolved))
            return 0
        run_training(name_run(resolved.config), resume=resolved.resume)
    return 0


@contextmanager
def terminable() -> Iterator[None]:
    """A termination signal is like Ctrl-C; from the first step on, the loop finishes the step that it is at."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def evaluate(arguments: list[str]) -> int:
    """`rlcore eval`."""
    from rlcore.engine import eval_run
    from rlcore.engine.arguments import parse

    eval_run.evaluate_run(parse(eval_run.Eval, arguments, "rlcore eval"))
    return 0


def show(arguments: list[str]) -> int:
    """`rlcore show`."""
    from rlcore.engine import show
    from rlcore.engine.arguments import parse

    show.show(parse(show.Show, arguments, "rlcore show"))
    return 0


def plot(arguments: list[str]) -> int:
    """`rlcore plot`."""
    from rlcore.engine import plot
    from rlcore.engine.arguments import parse

    plot.plot(parse(plot.Plot, arguments, "rlcore plot"))
    return 0


def backends(arguments: list[str]) -> int:
    """`rlcore backends`."""
    Options("backends").parse_args(arguments)
    import rlcore

    for name, state in rlcore.backends().items():
        print(f"{name:12} {state}")
    return 0


def doctor(arguments: list[str]) -> int:
    """`rlcore doctor`: exit code 1 where a self-test fails."""
    options = Options("doctor")
    options.add_argument("--json", action="store_true", help="print the findings as JSON")
    as_json = options.parse_args(arguments).json

    from rlcore.engine.doctor import as_text, report

    found = report()
    print(json.dumps(found, indent=1) if as_json else as_text(found))
    return 0 if found["passed"] else 1


def methods(arguments: list[str]) -> int:
    """`rlcore methods`: every key with title, paper, formula and needs."""
    Options("methods").parse_args(arguments)
    import rlcore

    for method in rlcore.methods().values():
        rows = {"paper": method.paper, "formula": method.formula, "needs": ", ".join(method.needs) or "rewards alone"}
        if method.defaults:
            rows["sets"] = ", ".join(f"{key} = {value}" for key, value in method.defaults.items())
        if method.state != "runs":
            rows["state"] = method.state
        print(f"{method.key:13} {method.title}")
        for name, text in rows.items():
            print(f"  {name:8}    {text}")
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (train, "train a language model by reinforcement learning; --dry-run says what it would be"),
    "eval": (evaluate, "measure a checkpoint of a run: mean@k, pass@k, majority vote, lengths"),
    "show": (show, "show logged answers token by token, in the terminal or as a page"),
    "plot": (plot, "draw the curves of one run or several into one picture"),
    "methods": (methods, "list the methods: key, title, paper, formula, what they need"),
    "doctor": (doctor, "describe machine, versions and live kernels, test them against the reference, measure speed"),
    "backends": (backends, "say which kernels are live on this machine, and why the others are not"),
}


class Options(argparse.ArgumentParser):
    """Options of the commands that need torch and numpy alone; a mistake is one sentence as everywhere."""

    def __init__(self, command: str, **more: Any) -> None:
        super().__init__(prog=f"rlcore {command}", description=COMMANDS[command][1], allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists all options)")


if __name__ == "__main__":
    sys.exit(main())
