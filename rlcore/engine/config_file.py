"""The configuration as TOML: read with file, line and key named in every error, written so that it reads back equal."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from rlcore.engine.config import Config
from rlcore.engine.errors import UserError


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
