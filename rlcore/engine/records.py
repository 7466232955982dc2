"""Files of a run: JSON Lines that survive a crash, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlcore.engine.errors import SaveError, UserError


def is_there(path: Path) -> bool:
    """Whether a file exists; UserError where it is something else: a device or a pipe may be read without end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a regular file, got a directory, device or pipe")
    return path.exists()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file up to the first line that is none: a crash may have cut the last one short."""
    if not is_there(path):
        return []
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            records.append(record)
    return records


def cut(path: Path, first_step: int) -> Any:
    """Opens a JSONL file for appending after its records before `first_step`; what is later or damaged is cut off."""
    is_there(path)
    file = path.open("a+b")
    file.seek(0)
    end = 0
    for line in file:
        try:
            wanted = line.endswith(b"\n") and json.loads(line)["step"] < first_step
        except (ValueError, KeyError, TypeError):
            break
        if not wanted:
            break
        end += len(line)
    file.truncate(end)
    file.close()
    return path.open("a", encoding="utf-8")


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file at once: a crash leaves the old one or the new one. SaveError where the machine can not write."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SaveError(f"could not write {path}: {error.strerror or error}") from error
