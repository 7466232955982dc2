"""Weights & Biases and trackio: the same metrics, sent there too. A tracker that fails never stops a run.

Each start of a run is a run of its own there: one that is resumed begins at the step it goes on from.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlcore.engine.config import Config
from rlcore.engine.config_file import flatten
from rlcore.engine.errors import UserError, first_line

NAMES = ("wandb", "trackio")


class Tracker:
    """A package with `init`, `log` and `finish`. The first failure is told and ends its use."""

    def __init__(self, package: str, **arguments: Any) -> None:
        self.package, self.arguments = package, arguments
        self.module: Any = None
        self.say: Callable[[str], None] = print

    def start(self, say: Callable[[str], None]) -> None:
        """Begins the run there; `say` is where a failure is told."""
        self.say = say
        try:
            module = importlib.import_module(self.package)
            module.init(**self.arguments)
            self.module = module
        except (Exception, SystemExit) as error:
            self.give_up(error)

    def log(self, step: int, record: dict[str, float]) -> None:
        """Sends the metrics of a step that are finite."""
        if self.module:
            try:
                self.module.log({key: value for key, value in record.items() if math.isfinite(value)}, step=step)
            except (Exception, SystemExit) as error:
                self.give_up(error)

    def close(self) -> None:
        """Ends the run there."""
        if self.module:
            try:
                self.module.finish()
            except (Exception, SystemExit) as error:
                self.give_up(error)
        self.module = None

    def give_up(self, error: BaseException) -> None:
        self.module = None
        self.say(f"{self.package} failed and is left out from here on; the run goes on: {first_line(error)}")


def trackers(config: Config, directory: Path) -> list[Tracker]:
    """The trackers that a config asks for; UserError where the package of one is not installed."""
    return [
        Tracker(package, project=project, name=directory.name, config=flatten(config), **more(package, directory))
        for package in NAMES
        if (project := installed(package, getattr(config.log, package)))
    ]


def installed(package: str, project: str) -> str:
    """The project, or UserError where one is named and its package is missing."""
    if project and importlib.util.find_spec(package) is None:
        raise UserError(f"log.{package} needs the package {package!r}: pip install 'rlcore[track]'")
    return project


def more(package: str, directory: Path) -> dict[str, Any]:
    """wandb keeps its files in the run's directory, and away from its terminal."""
    return {"dir": str(directory), "settings": {"console": "off"}} if package == "wandb" else {}
