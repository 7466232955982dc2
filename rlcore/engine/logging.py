"""What a run leaves behind and shows: metrics.jsonl, TensorBoard events, samples.jsonl, curves.png, the progress line.

metrics.jsonl has one line per step, in order and once: on resume the lines after the checkpoint are cut off. Keys under
`time/` are timings, the only numbers that differ between a run and its repetition.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlcore.engine.errors import SaveError
from rlcore.engine.plot import Curves, draw, picture
from rlcore.engine.records import cut, read, write_whole
from rlcore.engine.screen import Screen
from rlcore.engine.trackers import Tracker

# Seconds between drawings of curves.png while a run goes on; more where a drawing takes over 1 % of that.
REDRAW = 20.0


class RunLog:
    """Writes the files of one run and its progress to the terminal. Open it with `with`."""

    def __init__(self, directory: Path, first_step: int, steps: int, trackers: Sequence[Tracker] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.directory, self.trackers = directory, trackers
        self.screen = Screen(first_step, steps)
        with self.writing():
            if first_step == 0:
                self.keep_old()
            self.metrics = cut(directory / "metrics.jsonl", first_step)
            self.samples = cut(directory / "samples.jsonl", first_step)
            self.board: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)
        for record in read(directory / "metrics.jsonl"):
            self.screen.accuracy = record.get("eval/accuracy", self.screen.accuracy)
        for tracker in trackers:
            tracker.start(self.say)
        self.drawn, self.redraw = time.monotonic(), REDRAW

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.screen.close()
        for file in (self.metrics, self.samples, self.board):
            # Where the disk is full, closing fails like the write before it, which is the error to report.
            with suppress(OSError):
                file.close()
        for tracker in self.trackers:
            tracker.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns the machine's refusal to write into a SaveError."""
        try:
            yield
        except OSError as error:
            raise SaveError(f"could not write to {self.directory}: {error.strerror or error}") from error

    def keep_old(self) -> None:
        """Moves metrics and samples of steps whose checkpoints are all lost aside, before a new start cuts them off."""
        last = max((record["step"] for record in read(self.directory / "metrics.jsonl")), default=0)
        if last == 0:
            return
        number = 1
        while (self.directory / f"metrics.jsonl.old{number}").exists():
            number += 1
        for name in ("metrics.jsonl", "samples.jsonl"):
            with suppress(FileNotFoundError):
                os.replace(self.directory / name, self.directory / f"{name}.old{number}")
        self.say(
            f"{self.directory} has steps up to {last} but no usable checkpoint: starting again from step 0; "
            f"its metrics and samples are kept as *.jsonl.old{number}"
        )

    def say(self, message: str) -> None:
        """One line for the reader, above the progress bar."""
        self.screen.say(message)

    def step(self, step: int, record: dict[str, float]) -> None:
        """Writes the metrics of a step everywhere."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        clean = {key: value if math.isfinite(value) else None for key, value in record.items()}
        with self.writing():
            self.metrics.write(json.dumps({"step": step, **clean}) + "\n")
            self.metrics.flush()
            # One event for all values: one for each, as add_scalar makes them, takes ten times as long.
            values = [Summary.Value(tag=key, simple_value=value) for key, value in record.items()]
            self.board.file_writer.add_summary(Summary(value=values), step)
        self.screen.step(step, record)
        for tracker in self.trackers:
            tracker.log(step, record)

    def answers(self, lines: Iterable[str]) -> None:
        """Writes answers of a step."""
        with self.writing():
            self.samples.writelines(lines)
            self.samples.flush()

    def sync(self) -> None:
        """Forces the text files to the disk, before a checkpoint that counts on them."""
        with self.writing():
            for file in (self.metrics, self.samples):
                os.fsync(file.fileno())

    def conclude(self) -> None:
        """Draws the curves a last time and says what came of the run."""
        self.curves()
        records = read(self.directory / "metrics.jsonl")
        accuracy = {r["step"]: r["eval/accuracy"] for r in records if "eval/accuracy" in r}
        before = f"{accuracy[0]:.1%}" if 0 in accuracy else "unknown"
        after = f"{accuracy[max(accuracy)]:.1%}" if accuracy else "unknown"
        self.say(f"held-out accuracy: {before} before, {after} after")
        self.say(f"curves: {self.directory / 'curves.png'}")

    def refresh(self) -> None:
        """Draws the curves again where the last drawing is old enough."""
        if time.monotonic() > self.drawn + self.redraw:
            self.curves()

    def curves(self) -> None:
        """Draws curves.png from metrics.jsonl."""
        start = time.monotonic()
        records = read(self.directory / "metrics.jsonl")
        write_whole(self.directory / "curves.png", picture(draw([Curves(self.directory.name, [records])])))
        self.drawn = time.monotonic()
        self.redraw = max(REDRAW, 100 * (self.drawn - start))
