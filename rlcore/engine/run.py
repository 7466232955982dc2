"""The directory of a run: its name, its config, its lock."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from rlcore.engine.checkpoint import found
from rlcore.engine.config import Config
from rlcore.engine.config_file import changes, flatten, load_toml, to_toml
from rlcore.engine.errors import Interrupted, SaveError, UserError
from rlcore.engine.records import write_whole
from rlcore.engine.tasks import label

# What a run is: with another value it would be another run, not the rest of this one.
FIXED = ("seed", "model.", "task.")
FREE = ("model.cache", "model.gradient_checkpointing", "model.lora_merge")
# Files and models that were moved are found again where config.toml says so.
PLACES = ("model.path", "task.data", "task.held_out_data")
IDENTITY = "run.json"


class RunDirectory:
    """`runs/NAME/`, held by one process: config.toml, metrics.jsonl, samples.jsonl, tensorboard/, curves.png,
    checkpoints/. Use it with `with`: the lock is the operating system's and ends with the process, however it ends."""

    def __init__(self, path: Path, config: Config, resume: bool) -> None:
        self.path, self.config, self.resume = path, config, resume
        self.changes: dict[str, tuple[Any, Any]] = {}
        self._lock: Any = None

    def __enter__(self) -> RunDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise SaveError(f"cannot write to {self.path}: {error.strerror}") from None
        try:
            locked = lock(self._lock)
        except OSError as error:
            raise SaveError(f"cannot lock {self.path / '.lock'}: {error.strerror}") from None
        if not locked:
            raise UserError(f"{self.path} is in use by another process; choose another --name")
        if self.resume:
            self.compare()
        elif any((self.path / name).exists() for name in ("config.toml", "metrics.jsonl", "checkpoints")):
            raise UserError(f"{self.path} holds a run already; choose another --name, or go on with: {self.command}")
        else:
            self.write_config()
        return self

    def __exit__(self, kind: type | None, *exception: Any) -> None:
        # A run that a mistake in the config kept from starting does not take the name from the corrected one.
        if kind is UserError and not self.resume and not (self.path / "metrics.jsonl").exists():
            (self.path / "config.toml").unlink(missing_ok=True)
        self._lock.close()
        if kind is KeyboardInterrupt:
            saved = found(self.checkpoints)
            state = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
            raise Interrupted(f"Stopped at once; {state}. Go on with: {self.command}") from None

    def compare(self) -> None:
        """Notes in what the config differs from the run's own; refuses what would make it another run."""
        if not (self.path / "config.toml").exists():
            return self.write_config()
        stored = load_toml(self.path / "config.toml")
        self.changes = changes(dataclasses.replace(stored, name=self.config.name, dir=self.config.dir), self.config)
        fixed = [key for key in self.changes if key.startswith(FIXED) and key not in FREE]
        if fixed:
            raise UserError(
                f"a resumed run keeps its seed, model and task; choose another --name for {self.told(fixed)}"
            )
        return None

    def accept(self) -> None:
        """Makes a changed config that of the run, once task, model and optimizer could be made from it."""
        if self.changes:
            print(f"resumed with changes: {self.told(list(self.changes))}")
            self.write_config()

    def told(self, keys: list[str]) -> str:
        return ", ".join(f"{key} {self.changes[key][0]!r} -> {self.changes[key][1]!r}" for key in keys)

    def write_config(self) -> None:
        """config.toml, without name and place, so that it serves other runs and a directory that was moved."""
        write_whole(self.path / "config.toml", to_toml(self.config, leave_out=("name", "dir")).encode())

    @property
    def command(self) -> str:
        """The command that goes on with the run."""
        return f"rlcore train --resume {shlex.quote(str(self.path))}"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def identity(config: Config) -> dict[str, Any]:
    """What a run is, by key."""
    return {k: x for k, x in flatten(config).items() if k.startswith(FIXED) and k not in (*FREE, *PLACES)}


def save_identity(directory: Path, config: Config) -> None:
    """Into a checkpoint: config.toml may be edited later."""
    (directory / IDENTITY).write_text(json.dumps(identity(config), indent=1) + "\n")


def check_same(directory: Path, config: Config) -> None:
    """Raises UserError where a checkpoint is of another run than the config describes; names the keys."""
    # Earlier versions wrote none.
    if not (directory / IDENTITY).is_file():
        return
    there, here = json.loads((directory / IDENTITY).read_text()), identity(config)
    wrong = [f"{k} is {there[k]!r} there and {x!r} in the config" for k, x in here.items() if there.get(k, x) != x]
    if wrong:
        raise UserError(f"{directory} is a checkpoint of another run: {', '.join(wrong)}")


def lock(file: Any) -> bool:
    """Takes an exclusive lock on an open file; False where another process has it, OSError where locks do not work."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock, the check for an existing run remains
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def name_run(config: Config) -> Config:
    """The config with a name: the given one, or task, method and seed with a number where that is taken."""
    if config.name:
        return config
    task = re.sub(r"[^\w.+-]", "_", label(config.task))
    stem = f"{task}-{config.method}-seed{config.seed}" + ("-shuffled" if config.shuffle_rewards else "")
    number = 1
    while os.path.exists(Path(config.dir) / (name := stem if number == 1 else f"{stem}-{number}")):
        number += 1
    return dataclasses.replace(config, name=name)
