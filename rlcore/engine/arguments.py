"""A command's options: what the command line gets wrong becomes one sentence that names the option and the nearest."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from typing import Any, TypeVar

from rlcore.engine.config_file import plain
from rlcore.engine.errors import UserError

T = TypeVar("T")
EXPECTED = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "KEY VALUE pairs"}


def parse(cls: type[T], arguments: list[str], prog: str, default: T | None = None) -> T:
    """A dataclass filled from the command line over `default` by tyro; `--help` prints and exits with 0.

    Without a default, fields that have none are positional.

    Raises UserError, one sentence, where tyro would print a box and exit.
    """
    import tyro

    hints = options(cls)
    check_names(hints, arguments, prog)
    given_names = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    kept: dict[str, dict[str, Any]] = {}
    if default is not None:
        # tyro turns a dict that has entries into an option per entry; empty ones are KEY VALUE pairs.
        kept = {name: field_of(default, name) for name in hints if typing.get_origin(plain(hints[name])) is dict}
        for name in kept:
            default = with_field(default, name, {})
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            if default is None:
                return tyro.cli(cls, args=arguments, prog=prog, config=(tyro.conf.PositionalRequiredArgs,))
            result = tyro.cli(cls, args=arguments, prog=prog, default=default)
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise UserError(f"{sentence(refusal.getvalue(), hints, arguments)} ({prog} --help lists all options)") from None
    for name, value in kept.items():
        if name not in given_names:
            result = with_field(result, name, value)
    return result


def options(cls: type, prefix: str = "--") -> dict[str, Any]:
    """Every option of a dataclass with the type of its field."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        option = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            found |= options(typing.cast(type, hint), option + ".")
        else:
            found[option] = hint
    return found


def field_of(config: Any, option: str) -> Any:
    """The value that an option has in a dataclass."""
    for name in option.removeprefix("--").replace("-", "_").split("."):
        config = getattr(config, name)
    return config


def with_field(config: Any, option: str, value: Any) -> Any:
    """The dataclass with another value of an option."""
    head, _, rest = option.removeprefix("--").replace("-", "_").partition(".")
    inner = with_field(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})


def check_names(hints: dict[str, Any], arguments: list[str], prog: str) -> None:
    """Raises UserError at the first argument that looks like an option and is none."""
    switches = {f"{head}.no-{name}" if head else f"--no-{name}" for head, name in map(split, of_type(hints, bool))}
    known = {*hints, *switches, "--help"}
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if not name.startswith("--") or name in known or name.startswith("--tyro-"):
            continue
        last = split(name)[1]
        same = [option for option in hints if split(option)[1] == last]
        near = same or difflib.get_close_matches(name, known, n=3) or elsewhere(last, hints)
        meant = f"; did you mean {' or '.join(near)}?" if near else f"; {prog} --help lists all"
        raise UserError(f"unknown option {argument.partition('=')[0]}{meant}")


def of_type(hints: dict[str, Any], kind: type) -> list[str]:
    return [name for name, hint in hints.items() if hint is kind]


def split(option: str) -> tuple[str, str]:
    """`--update.lr` as `--update` and `lr`; `--seed` as nothing and `seed`."""
    head, _, name = option.removeprefix("--").rpartition(".")
    return (f"--{head}" if head else ""), name


def elsewhere(last: str, hints: dict[str, Any]) -> list[str]:
    """The options whose last part is closest, for one that names the wrong section."""
    near = difflib.get_close_matches(last, {split(name)[1] for name in hints}, n=1)
    return [name for name in hints if near and split(name)[1] == near[0]]


def sentence(box: str, hints: dict[str, Any], arguments: list[str]) -> str:
    """What tyro says in its error box, in one line; a value that does not parse is told in our words."""
    # The first line is the box's title; a rule ends the reason, before hints and help texts.
    body = [line.strip("│ ") for line in box.strip("\n").splitlines()[1:]]
    rules = [i for i, line in enumerate(body) if re.match(r"[─╰-]{2}", line) and i > 0]
    kept = [line for line in body[: rules[0] if rules else None] if not line.startswith("--" * 8)]
    text = " ".join(kept).strip().rstrip(".")
    failed = re.match(r"Error parsing (--[\w.-]+)", text)
    if failed and failed[1] in hints:
        hint = plain(hints[failed[1]])
        expected = EXPECTED.get(typing.get_origin(hint) or hint)
        if expected:
            return f"{failed[1]} must be {expected}, got {given(failed[1], arguments)}"
    return text or "the command line could not be read"


def given(option: str, arguments: list[str]) -> str:
    """What stands behind an option on the command line, as it was written; where it is repeated the last counts."""
    for i, argument in reversed(list(enumerate(arguments))):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option:
            rest = [value] if equals else []
            for following in [] if equals else arguments[i + 1 :]:
                if following.startswith("--"):
                    break
                rest.append(following)
            return repr(" ".join(rest))
    return "nothing"
