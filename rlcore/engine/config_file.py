"""The configuration as TOML: read with file, line and key named in every error, written so that it reads back equal."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from rlcore.engine.config import Config
from rlcore.engine.config_rules import check_value, shown
from rlcore.engine.errors import UserError


def load_toml(path: Path, default: Config | None = None) -> Config:
    """The config in a TOML file over `default`. Unknown keys, wrong types, ranges: UserError with file, line, key."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        # Editors on Windows begin a file with a byte order mark; it is no part of the text.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} can not be read") from None
    except ValueError as error:
        raise UserError(f"cannot read the config {str(path)!r}: {error}") from None
    try:
        data = tomllib.loads(text)
    except ValueError as error:  # beside TOMLDecodeError: an integer of thousands of digits
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid TOML for a config: it is nested too deeply") from None

    def fill(cls: type, values: dict[str, Any], base: Any, section: str) -> Any:
        hints = typing.get_type_hints(cls, include_extras=True)
        changes = {}
        for key, value in values.items():
            full = f"{section}.{key}" if section else key
            where = f"{path}{line_of(text, full)}"
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1) or nearest_elsewhere(key)
                raise UserError(f"{where}: unknown key {full!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            if dataclasses.is_dataclass(hints[key]):
                if not isinstance(value, dict):
                    raise UserError(f"{where}: {full!r} is a table, write [{full}] and its keys below")
                changes[key] = fill(typing.cast(type, hints[key]), value, getattr(base, key), full)
            else:
                changes[key] = coerce(value, hints[key], f"{where}: {full}")
                check_value(changes[key], hints[key], f"{where}: {full}")
        return dataclasses.replace(base, **changes)

    return fill(Config, data, default or Config(), "")


def line_of(text: str, full: str) -> str:
    """` line 7`, where a dotted key stands in a TOML text, or the nearest table around it; nothing where unseen."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+([^\]]+)\]", line):
            table = bare(header[1])
            lines.setdefault(table, number)
        elif assignment := re.match(r"([^=#]+)=", line):
            key = bare(assignment[1])
            lines.setdefault(f"{table}.{key}" if table else key, number)
    while full:
        # `update.lr = 1` and [update.x] make the table `update` too.
        at = [number for key, number in lines.items() if key == full or key.startswith(full + ".")]
        if at:
            return f" line {min(at)}"
        full = full.rpartition(".")[0]
    return ""


def bare(key: str) -> str:
    """A dotted key without quotes and blanks."""
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def nearest_elsewhere(key: str) -> list[str]:
    """The closest full name among all sections, for a key that stands in the wrong one."""
    # Backwards, so that of a key that several sections have the first one stays.
    names = {name.rpartition(".")[2]: name for name in reversed(flatten(Config()))}
    return [names[near] for near in difflib.get_close_matches(key, names, n=1)]


NAMES = {int: "an integer", float: "a number", str: "a text in quotes", bool: "true or false", dict: "a table"}


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type of a field, or UserError. Integers pass as floats; nothing else is converted."""
    hint = plain(hint)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in options:
            return value
        raise UserError(f"{where} must be one of {', '.join(map(str, options))}, got {shown(value)}")
    if origin is dict and isinstance(value, dict):
        return {key: as_text(item, where) if options[1] is str else coerce(item, options[1], f"{where}.{key}")
                for key, item in value.items()}  # fmt: skip
    if origin is list:
        # One value stands for a list of it.
        return [coerce(item, options[0], where) for item in (value if isinstance(value, list) else [value])]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        # An integer beyond the largest float is as little a number to work with as infinity.
        return float(value) if abs(value) < sys.float_info.max else math.inf
    if origin is None and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise UserError(f"{where} must be {NAMES.get(origin or hint, 'a list')}, got {shown(value)}")


def plain(hint: Any) -> Any:
    """int of `Annotated[int, ...]` and of `int | None`."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def as_text(value: Any, where: str) -> str:
    """An option of a task, which may be any TOML value, as text."""
    try:
        return str(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        raise UserError(f"{where} must hold numbers and texts, got {shown(value)}") from None


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
                pairs = ", ".join(f"{literal(k)} = {literal(v)}" for k, v in value.items())
                lines.append(f"{key} = {{ {pairs} }}" if value else f"{key} = {{}}")
            elif value is not None and not dataclasses.is_dataclass(value):
                lines.append(f"{key} = {literal(value)}")
        for key, value in items.items():
            if dataclasses.is_dataclass(value):
                table(value, f"{name}.{key}" if name else key)

    table(config, "")
    return "\n".join(lines) + "\n"


def literal(value: Any) -> str:
    """A value as TOML spells it: JSON, but for the one control character that JSON leaves bare."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
