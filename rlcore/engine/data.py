"""Problems from files: JSON Lines or Parquet with a prompt and an answer per row, read by byte offset.

One pass reads every row, checks it and keeps its offset, a 64-bit hash of its question and the length of its prompt:
20 bytes per row stay in memory, the rows stay on the disk. Parquet has no cheap access to single rows, so it is copied
into a temporary file of JSON lines first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlcore.engine.config import TaskConfig
from rlcore.engine.config_rules import shown
from rlcore.engine.errors import SaveError, UserError, first_line
from rlcore.engine.problem import Problem, Problems, excerpt, key_of, render
from rlcore.engine.screen import watched

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
# As many bad rows are shown one by one; all are counted.
SHOWN = 3
# The length of a prompt made of chat messages is known only to the chat template.
UNKNOWN_LENGTH = 2**32 - 1


class Rows(Problems):
    """The problems of some files, each made when it is asked for.

    keys [R] uint64: hashes of the questions; sizes [R] uint32: UTF-8 bytes of the prompts, an upper bound of their
    tokens; digest: a hash of questions and answers in their order; bad: rows that could not be used, `errors` the first
    of them, each with file and line; repeated: rows whose question was there before, left out.
    """

    def __init__(self, config: TaskConfig, key: str, paths: list[str], name: str = "data") -> None:
        self.config, self.name = config, name
        self.template = config.template or "{question}"
        self.bad, self.errors, self.repeated = 0, list[str](), 0
        self.files = [open_lines(path, key, self.reject) for path in files_of(key, paths)]
        offsets, keys, sizes, files = array("Q"), array("Q"), array("I"), array("I")
        content = hashlib.sha256()
        for number, file in enumerate(self.files):
            for offset, problem in self.scan(file):
                offsets.append(offset)
                keys.append(key_of(question_of(problem)))
                content.update(keys[-1].to_bytes(8, "little") + problem.answer.encode() + b"\0")
                sizes.append(size_of(problem))
                files.append(number)
        # The first row of every question, in the order of the files.
        first = np.sort(np.unique(np.array(keys, np.uint64), return_index=True)[1])
        self.digest = content.hexdigest()
        self.repeated = len(keys) - len(first)
        self.keys = np.array(keys, np.uint64)[first]
        self.offsets = np.array(offsets, np.uint64)[first]
        self.sizes = np.array(sizes, np.uint32)[first]
        self.file_of = np.array(files, np.uint32)[first]
        if not len(self):
            told = f"; {'; '.join(self.errors)}" if self.errors else ""
            raise UserError(f"{key}: there is no usable row in {', '.join(paths)}{told}")

    def __len__(self) -> int:
        return len(self.offsets)

    def at(self, i: int) -> Problem:
        file = self.files[self.file_of[i]]
        line = file.line_at(int(self.offsets[i]))
        try:
            problem = self.parse(line)
        except ValueError:
            problem = None
        if problem is None or key_of(question_of(problem)) != int(self.keys[i]):
            raise UserError(f"{file.path} has changed since the run read it first; start the run again")
        return problem

    def scan(self, file: Lines) -> Iterator[tuple[int, Problem]]:
        """Offset and problem of every good line; the others are rejected."""
        for number, (offset, line) in enumerate(watched(file, f"reading {file.path}"), 1):
            if not line.strip():
                continue
            try:
                problem = self.parse(line)
            except ValueError as error:
                self.reject(f"{file.path} {file.unit} {number}: {error}")
                continue
            yield offset, problem

    def reject(self, message: str) -> None:
        """Counts a row that can not be used, or raises where the config is strict."""
        if self.config.strict:
            raise UserError(f"{message} (task.strict)")
        self.bad += 1
        if self.bad <= SHOWN:
            self.errors.append(message)

    def parse(self, line: bytes) -> Problem:
        """The problem of a line; ValueError says what is wrong with it."""
        try:
            # Bytes would be taken for UTF-16 too, whose lines can not be told apart by single bytes.
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise ValueError("not UTF-8 text") from None
        except RecursionError:
            raise ValueError("nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"expected an object with the fields of a row, got {excerpt(row)}")
        prompt, question = read_prompt(field(row, self.config.prompt_field), self.config)
        answer = read_answer(row, self.config.answer_field)
        entry = {"question": question, "answer": answer, "metadata": row}
        if prompt is None:
            prompt = render(self.template, entry)
        try:
            (prompt + question + answer).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair: not a text") from None
        return Problem(prompt, answer, entry, self.name)

    @property
    def report(self) -> list[str]:
        """What the reader should know about the files: one sentence for each that is not as it should be."""
        told = []
        if self.bad:
            more = f"; and {self.bad - SHOWN} more" if self.bad > SHOWN else ""
            told.append(f"{self.bad} unusable rows left out, {len(self)} kept: {'; '.join(self.errors)}{more}")
        if self.repeated:
            told.append(f"{self.repeated} rows left out whose prompt was there before")
        return told


class Lines:
    """A file of lines: iterated with their offsets, and read at one of them."""

    unit = "line"

    def __init__(self, path: str, file: IO[bytes]) -> None:
        self.path, self.file = path, file

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        self.file.seek(0)
        offset = 0
        while line := self.line_at(offset):
            yield offset, line
            offset += len(line)

    def line_at(self, offset: int) -> bytes:
        try:
            if self.file.tell() != offset:
                self.file.seek(offset)
            return self.file.readline()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None


class CopiedRows(Lines):
    """The rows of a Parquet file as lines of a temporary file that has no name and ends with the process."""

    unit = "row"


def files_of(key: str, paths: list[str]) -> list[Path]:
    """The files that paths stand for: a directory stands for all data files right in it, by name."""
    found: list[Path] = []
    for path in paths:
        try:
            found += files_at(key, path)
        except OSError as error:  # a name that is too long, a directory that others may not read
            raise UserError(f"{key}: cannot read {shown(path)}: {error.strerror}") from None
        except RuntimeError:
            raise UserError(f"{key}: there is no user whose home would be {shown(path)}") from None
    return found


def files_at(key: str, path: str) -> list[Path]:
    """The files that one path stands for; UserError where it names none."""
    place = Path(path).expanduser()
    if path and place.is_dir():
        inside = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not inside:
            raise UserError(f"{key}: no file in {path} ends with {', '.join(SUFFIXES)}")
        return inside
    if not path or not place.exists():
        raise UserError(f"{key}: there is no file {path!r}")
    if place.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{key} must name files that end with {', '.join(SUFFIXES)}, or a directory of them, got {path!r}"
        )
    if not place.is_file():
        raise UserError(f"{key}: {path!r} is no regular file: problems are read again by their place in it")
    return [place]


def open_lines(path: Path, key: str, reject: Callable[[str], None]) -> Lines:
    if path.suffix.lower() == ".parquet":
        return copy_parquet(path, key, reject)
    try:
        return Lines(str(path), path.open("rb"))
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None


def copy_parquet(path: Path, key: str, reject: Callable[[str], None]) -> Lines:
    """The rows of a Parquet file as JSON lines; of a damaged file those before the damage."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(f"{key}: {path} needs the package 'pyarrow': pip install 'rlcore[parquet]'") from None

    copy = tempfile.TemporaryFile()  # noqa: SIM115
    count = 0
    try:
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as source:
            for batch in watched(source.iter_batches(batch_size=1024), f"reading blocks of 1,024 rows of {path}"):
                for row in batch.to_pylist():
                    copy.write(json.dumps(row, default=str, ensure_ascii=False).encode(errors="replace") + b"\n")
                    count += 1
    except (pyarrow.ArrowException, OSError) as error:
        # Arrow reports damage as an OSError too, without a number; with one it is the operating system's.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SaveError(f"could not copy {path} to {tempfile.gettempdir()}: {error.strerror}") from error
        reject(f"{path}: not readable as Parquet after row {count}: {first_line(error)}")
    return CopiedRows(str(path), copy)


def field(row: dict[str, Any], name: str) -> Any:
    """A field of a row; a.b is field b of field a. ValueError where it is missing."""
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(map(str, row)) or "none"
            raise ValueError(f"no field {name!r}; there are {there}")
        value = value[part]
    return value


def read_prompt(value: Any, config: TaskConfig) -> tuple[str | None, str]:
    """Prompt, None where the template makes it from the question, and question of the prompt field's value."""
    name = config.prompt_field
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{name!r} is empty")
        return None, value
    if not is_chat(value):
        raise ValueError(f"{name!r} must be a text or a list of messages with role and content, got {excerpt(value)}")
    if not config.chat:
        raise ValueError(f"{name!r} is a list of chat messages, which needs task.chat")
    return "", json.dumps(value, ensure_ascii=False, sort_keys=True)


def is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in value
        )
    )


def read_answer(row: dict[str, Any], name: str) -> str:
    """The reference answer as a text: numbers as they are written, lists and objects as JSON; "" without a name."""
    if not name:
        return ""
    value = field(row, name)
    if value is None:
        raise ValueError(f"{name!r} is null")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def question_of(problem: Problem) -> str:
    """What decides whether two rows are the same problem."""
    return problem.prompt or problem.entry["question"]


def size_of(problem: Problem) -> int:
    return min(len(problem.prompt.encode()) or UNKNOWN_LENGTH, UNKNOWN_LENGTH)
