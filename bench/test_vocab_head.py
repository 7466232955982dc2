"""vocab_head: hidden states to a loss and to log-probs, forward and backward, beside the matrix products alone, plain
torch, and other libraries; and its memory.

All selected rows run in one race, so that a product or a competitor that several rows refer to is timed once per round.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from measure import Race, Row, check
from vocab_head_cases import FRESH, PREALLOCATED, Cases

pytestmark = pytest.mark.timeout(1800)
FORWARD, HIDDEN, WEIGHT = FRESH


class Line(NamedTuple):
    measure: str
    ours: tuple[str, ...]
    over: tuple[str, ...]
    yardstick: str
    most: float | None = None
    least: float | None = None
    speedup: bool = False


SHAPE = (2048, 1024, 32000)  # tokens, hidden size, vocabulary
TORCH = "plain torch"
BARE = "3 bare products, preallocated"
TWO, THREE, FOUR = (f"{n} bare products" for n in (2, 3, 4))
LINES = {
    "policy_loss": Line("linear_policy_loss", ("policy_loss",), FRESH, THREE, most=1.10),
    "policy_loss_preallocated": Line(
        "linear_policy_loss", ("policy_loss",), PREALLOCATED, f"{THREE}, outputs preallocated", most=1.20),
    "products": Line("3 bare products, fresh outputs", FRESH, PREALLOCATED, "outputs preallocated"),
    "entropy_gradient": Line("  with entropy gradient", ("entropy_gradient",), FRESH, THREE, most=1.15),
    "zero_rows": Line("  60 % zero-coefficient rows", ("zero_rows",), FRESH, THREE, most=0.70),
    "masked_rows": Line("  60 % masked rows", ("masked_rows",), FRESH, THREE, most=0.50),
    "frozen_policy_loss": Line("  frozen head", ("frozen_policy_loss",), (FORWARD, HIDDEN), TWO, most=1.15),
    "frozen_logprob": Line("linear_logprob, frozen head", ("frozen_logprob",), (FORWARD, HIDDEN), TWO, most=1.15),
    "logprob": Line("linear_logprob", ("logprob",), (*FRESH, FORWARD), FOUR, most=1.12),
    "torch": Line("linear_policy_loss", ("policy_loss",), ("torch",), TORCH, least=1.6),
    "torch_ceiling": Line(BARE, PREALLOCATED, ("torch",), f"{TORCH} (ceiling)", speedup=True),
    "torch_entropy": Line("  with entropy gradient", ("entropy_gradient",), ("torch_entropy",), TORCH, least=1.6),
    "trl": Line("linear_policy_loss", ("policy_loss",), ("trl",), "TRL", least=1.7),
    "liger": Line("linear_policy_loss", ("policy_loss",), ("liger",), "Liger", least=1.7),
    "liger_ceiling": Line(BARE, PREALLOCATED, ("liger",), "Liger (ceiling)", speedup=True),
}  # fmt: skip
# TRL's kernels read this module in their backward pass.
PEERS = {"trl": ("trl.trainer.utils", "trl"), "liger": ("liger_kernel.chunked_loss", "liger-kernel")}
PEERS["liger_ceiling"] = PEERS["liger"]


@pytest.fixture(scope="module")
def race(request: pytest.FixtureRequest, run: Any) -> Race:
    """Checks the result of everything that the selected rows need, then times it."""
    selected = {item.callspec.params["key"] for item in request.session.items
                if getattr(item, "originalname", "") == "test_speed" and item.path == request.path}  # fmt: skip
    selected = {key for key in selected if key not in PEERS or missing(key) is None}
    shape = run.shape or ((96, 32, 300) if run.quick else SHAPE)
    cases = Cases(*shape)
    names = list(dict.fromkeys(name for key in LINES if key in selected for name in LINES[key].ours + LINES[key].over))
    contestants = {name: cases.function(name) for name in names}
    expected = cases.expected(names)
    for name, function in contestants.items():
        result = function()
        if name in expected:
            check(name, result, expected[name])
        del result
    expected.clear()
    return run.race(contestants, seconds=30.0)


def missing(key: str) -> str | None:
    """Why a peer can not be timed here, or None."""
    module, package = PEERS[key]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{package} can not be imported ({error}): make bench-peers"
    return None


@pytest.mark.parametrize("key", [pytest.param(k, marks=[pytest.mark.peers] * (k in PEERS)) for k in LINES])
def test_speed(key: str, record: Callable[..., None], request: pytest.FixtureRequest) -> None:
    line = LINES[key]
    yardstick = line.yardstick
    if key in PEERS:
        from importlib.metadata import version

        if (why := missing(key)) is not None:
            pytest.skip(why)
        yardstick += f" {version(PEERS[key][1])}"
    race: Race = request.getfixturevalue("race")
    row = race.row(f"vocab_head[{key}]", "vocab_head", line.measure, line.ours, line.over, yardstick,
                   most=line.most, least=line.least, speedup=line.speedup)  # fmt: skip
    record(row, race.of(*line.ours))


MEMORY = {
    ("policy_loss", "float32"): ("linear_policy_loss", SHAPE, 64),
    ("logprob", "float32"): ("linear_logprob", SHAPE, 64),
    ("policy_loss", "bfloat16"): ("linear_policy_loss", SHAPE, 128),
    ("inplace_backward", "float32"): ("logprob, inplace_backward", (1024, 64, 32000), 4),
    ("inplace_backward", "bfloat16"): ("logprob, inplace_backward", (1024, 64, 32000), 8),
}


@pytest.mark.parametrize("case, dtype", MEMORY)
def test_memory(case: str, dtype: str, record: Callable[..., None], run: Any) -> None:
    """Growth of the peak resident set of a fresh process, above inputs, outputs and gradients."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    if run.quick and (case, dtype) != ("policy_loss", "float32"):
        pytest.skip("one process is enough to see that it works")
    measure, full, most = MEMORY[case, dtype]
    shape = map(str, run.shape or ((256, 64, 2000) if run.quick else full))
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, str(script), case, dtype, *shape, str(run.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    row = Row(
        f"vocab_head_memory[{case}-{dtype}]", "vocab_head", f"{measure}, peak memory, {dtype}",
        f"logits: {out['logits_mib']:.0f} MiB", out["growth_mib"], "MiB", "most", most, ours_seconds=out["seconds"],
    )  # fmt: skip
    record(row, [out["seconds"]])
