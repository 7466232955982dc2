"""Benchmarks: one file per family, ours beside plain torch in the same process; `make bench` prints the table.

A case first compares its result with the expected one and is not timed if they differ. The times are those of this
machine and this run: read the ratios inside a group, not the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Timed = Callable[[Callable[[], Any], Any], None]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Timed:
    """timed(fn, expected): fn() must be close to `expected` (a tensor, or a tuple of them); then time fn."""

    def run(fn: Callable[[], Any], expected: Any) -> None:
        torch.testing.assert_close(fn(), expected, rtol=1e-4, atol=1e-5)
        benchmark.group = request.node.originalname
        benchmark.pedantic(fn, rounds=15, warmup_rounds=3)

    return run
