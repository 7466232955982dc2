"""The directory of a run: its name, its config, its lock."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from rlcore.engine.config import Config, to_toml
from rlcore.engine.errors import SaveError, UserError


class RunDirectory:
    """`runs/NAME/`, held by one process: config.toml, metrics.jsonl, samples.jsonl, tensorboard/, curves.png,
    checkpoints/. Use it with `with`: the lock is the operating system's and ends with the process, however it ends."""

    def __init__(self, path: Path, config: Config, resume: bool) -> None:
        self.path, self.config, self.resume = path, config, resume
        self._lock: Any = None

    def __enter__(self) -> RunDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise SaveError(f"cannot write to {self.path}: {error.strerror}") from None
        if not lock(self._lock):
            raise UserError(f"{self.path} is in use by another process; choose another --name")
        if not self.resume and (self.path / "config.toml").exists():
            raise UserError(
                f"{self.path} holds a run already; choose another --name, or go on with: "
                f"rlcore train --resume {self.path}"
            )
        self.write("config.toml", to_toml(self.config))
        return self

    def __exit__(self, kind: type | None, *exception: Any) -> None:
        # A run that a mistake in the config kept from starting does not take the name from the corrected one.
        if kind is UserError and not (self.path / "metrics.jsonl").exists():
            (self.path / "config.toml").unlink(missing_ok=True)
        self._lock.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write(self, name: str, text: str) -> None:
        """Replaces a small file at once, so that a crash leaves the old one or the new one."""
        temporary = self.path / f".{name}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise SaveError(f"could not write {self.path / name}: {error.strerror}") from error


def lock(file: Any) -> bool:
    """Takes an exclusive lock on an open file; False where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock, the check for an existing run remains
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def name_run(config: Config) -> Config:
    """The config with a name: the given one, or task, method and seed with a number where that is taken."""
    if config.name:
        return config
    stem = f"{config.task.name}-{config.method}-seed{config.seed}" + ("-shuffled" if config.shuffle_rewards else "")
    number = 1
    while (Path(config.dir) / (name := stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return dataclasses.replace(config, name=name)
