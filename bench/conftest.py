"""The benchmark's options, and what happens to a measured row: printed in one table, kept as JSON, guarded if asked."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import Race, Row, environment, machine_class, min_of_medians, run_race
from report import plain_table

Record = Callable[..., None]


@dataclass
class Session:
    """One run of the benchmark."""

    quick: bool
    guard: bool
    threads: int
    directory: Path
    shape: tuple[int, ...] | None = None  # of the vocabulary head, where it is not the one of the limits
    committed: dict[str, Row] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    load: float = 0.0

    @property
    def file(self) -> Path:
        return self.directory / machine_class(self.threads) / "cpu.json"

    def race(self, contestants: dict[str, Callable[[], Any]], seconds: float = 4.0) -> Race:
        return run_race(contestants, seconds, self.quick)

    def read(self) -> None:
        """The rows of the last full run on such a machine, if it had the same versions."""
        if self.file.exists():
            stored = json.loads(self.file.read_text())
            if stored["environment"] == environment(self.threads):
                self.committed = {row["key"]: Row.from_dict(row) for row in stored["rows"]}

    def write(self) -> None:
        """Rows of this run replace those of the same key."""
        rows = self.committed | {row.key: row for row in self.rows}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(self.threads), "rows": [row.as_dict() for row in rows.values()]}
        self.file.write_text(json.dumps(content, indent=1) + "\n")


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rlcore benchmark")
    group.addoption("--quick", action="store_true", help="small shapes: checks the benchmark, not the speed")
    group.addoption("--guard", action="store_true", help="fail where a limit is missed beyond the spread")
    group.addoption("--threads", type=int, default=2, help="threads of torch (default: 2)")
    shape = {"type": lambda text: tuple(map(int, text.split(","))), "metavar": "N,H,V"}
    group.addoption(
        "--shape", help="tokens, hidden size and vocabulary of vocab_head; not kept in bench/results", **shape
    )
    default = Path(__file__).parent / "results"
    group.addoption("--results", type=Path, default=default, help="where the JSON goes (default: bench/results)")


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    session = Session(option("--quick"), option("--guard"), option("--threads"), option("--results"), option("--shape"))
    session.load = os.getloadavg()[0]
    session.read()
    config.stash[SESSION] = session
    torch.set_num_threads(session.threads)


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash[SESSION]
    kept = run.directory != Path(__file__).parent / "results"
    if run.rows and (kept or not (run.quick or run.guard or run.shape)):
        run.write()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[SESSION]
    if not run.rows:
        return
    terminalreporter.section("rlcore beside its limits")
    facts = ", ".join(f"{name} {value}" for name, value in environment(run.threads).items())
    terminalreporter.write_line(f"{facts}, load {run.load:.1f} before and {os.getloadavg()[0]:.1f} after")
    if run.quick:
        terminalreporter.write_line("quick shapes: these figures say nothing about speed")
    if run.shape:
        terminalreporter.write_line(
            "vocab_head with N {}, H {}, V {}: the limits are for another shape".format(*run.shape)
        )
    terminalreporter.write_line(plain_table(run.rows))
    busy = sum(row.spread > 0.15 for row in run.rows)
    if busy and not run.quick:
        terminalreporter.write_line(f"{busy} rows with a spread above 15 %: the machine was busy, measure again")


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def record(benchmark: Any, run: Session) -> Record:
    """record(row, seconds of our function per round): keeps the row and hands the times to pytest-benchmark."""

    def keep(row: Row, seconds: Sequence[float]) -> None:
        run.rows.append(row)
        benchmark.group = row.family
        benchmark.extra_info.update(row.as_dict())
        # What its own runners do with a measured round; they know no race.
        benchmark._mode = "race"
        stats = benchmark._make_stats(1)
        for x in seconds:
            stats.update(x)
        wrong = row.regression(run.committed.get(row.key))
        if run.guard and wrong:
            pytest.fail(wrong, pytrace=False)

    return keep


@pytest.fixture
def compare(run: Session, record: Record, request: pytest.FixtureRequest) -> Callable[..., float]:
    """compare(measure, ours, yardstick, name, most=... or least=...): one row from a race of two; our seconds per call.

    The caller has checked the results.
    """

    def race(
        measure: str, ours: Callable[[], Any], yardstick: Callable[[], Any], name: str, seconds: float = 4.0,
        **limit: Any,
    ) -> float:  # fmt: skip
        result = run.race({"ours": ours, "yardstick": yardstick}, seconds)
        family = request.path.stem.removeprefix("test_")
        row = result.row(request.node.name, family, measure, ["ours"], ["yardstick"], name, **limit)
        record(row, result.of("ours"))
        return min_of_medians(result.of("ours"))

    return race
