"""Every kind of run, killed and taken up again, ends like one that was not; `rlcore eval` repeats what it measured."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlcore.cli import main
from rlcore.engine.checkpoint import found
from rlcore.engine.config import Config
from rlcore.engine.logging import RunLog, read
from rlcore.engine.resolve import with_keys
from rlcore.engine.trainer import train

LORA = {"model.lora_rank": 4, "update.lr": 2e-2}
EMA = {"update.ema": 0.5, "update.lr": 2e-2}
PPO = {"method": "ppo", "critic.lr": 1e-2}
BFLOAT16 = {"model.dtype": "bfloat16"}
KINDS = {
    "ema": EMA,
    "ppo": PPO,
    "bfloat16": BFLOAT16,
    "lora": LORA,
    "lora-ppo": {**PPO, **LORA},
    "lora-ema": {**EMA, **LORA},
    "lora-kl-merged": {**LORA, "kl.place": "reward", "kl.adaptive_target": 0.01, "model.lora_merge": True},
    "lora-bfloat16-ppo-ema": {**PPO, **EMA, **LORA, **BFLOAT16},
    "padded-checkpointing-ppo": {**PPO, "update.layout": "padded", "model.gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(params=KINDS)
def whole(request, tiny: Callable[..., Config], place: Path) -> Config:
    """A run of this kind that nothing interrupted, trained once."""
    measured = {"eval.samples": 4, "task.held_out": 20}
    config = with_keys(tiny(dir=str(place), name=request.param), {**measured, **KINDS[request.param]})
    if not (place / request.param).exists():
        train(config)
    return config


def run_of(config: Config) -> Path:
    return Path(config.dir) / config.name


def metrics_of(config: Config) -> list[dict]:
    records = read(run_of(config) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if not key.startswith("time/")} for record in records]


def last_files(config: Config) -> dict[str, bytes]:
    last = found(run_of(config) / "checkpoints")[-1]
    files = {str(f.relative_to(last)): f.read_bytes() for f in sorted(last.rglob("*")) if f.is_file()}
    return {**files, "samples.jsonl": (run_of(config) / "samples.jsonl").read_bytes()}


def killed(config: Config, after: int) -> None:
    """Trains in a forked process that dies when it has logged a step, before it saves that step's checkpoint."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        write = RunLog.step

        def step_and_die(log, step, record):
            write(log, step, record)
            if step == after:
                os.kill(os.getpid(), signal.SIGKILL)

        RunLog.step = step_and_die
        try:
            train(config)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_and_resumed(whole, tmp_path):
    """Weights, optimizer states, averages, metrics and samples of the end: killed in step 3, resumed from step 2."""
    expected, records = last_files(whole), metrics_of(whole)
    assert all(record["policy/grad_norm"] > 0 and record["reward"] > 0 for record in records[1:])
    first = found(run_of(whole) / "checkpoints")[0]
    for name in expected:
        if name.endswith(("model.safetensors", "ema.safetensors", "critic.safetensors")):
            before, after = load_file(first / name), load_file(found(run_of(whole) / "checkpoints")[-1] / name)
            assert any(not before[key].equal(after[key]) for key in after), name
    config = dataclasses.replace(whole, dir=str(tmp_path), name="killed")
    killed(config, after=3)
    train(config, resume=True)
    files = last_files(config)
    assert not {name for name in files.keys() | expected.keys() if files.get(name) != expected.get(name)}
    assert metrics_of(config) == records


def test_measured_again(whole):
    """`rlcore eval` without options gives the numbers of the run's own evaluations, to the last digit."""
    measured = {r["step"]: {k[5:]: v for k, v in r.items() if k.startswith("eval/")} for r in metrics_of(whole)}
    assert measured[2] != measured[4]
    for step in (2, 4):
        assert main(["eval", str(run_of(whole)), "--checkpoint", str(step)]) == 0
        metrics = json.loads((run_of(whole) / f"eval-{step}.json").read_text())["metrics"]
        assert {name: value for name, value in metrics.items() if name != "accuracy_stderr"} == measured[step]
