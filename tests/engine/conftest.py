"""A run small enough for a test that learns something: sums of digits, two layers of width 32, four steps."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlcore.engine.config import Config, EvalConfig, ModelConfig, RolloutConfig, TaskConfig, UpdateConfig


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tmp_path: Path, model_cache: Path) -> Callable[..., Config]:
    def make(**changes: object) -> Config:
        config = Config(
            name="run",
            dir=str(tmp_path),
            device="cpu",
            threads=1,
            steps=4,
            checkpoint_every=2,
            task=TaskConfig(pool=2000, held_out=10, options={"max_digits": "1"}),
            model=ModelConfig(
                hidden_size=32, heads=2, warm_steps=60, warm_batch=32, warm_lr=1e-2, cache=str(model_cache)
            ),
            rollout=RolloutConfig(prompts=6, samples=6),
            update=UpdateConfig(minibatches=2, micro_tokens=40),
            eval=EvalConfig(every=2, samples=2),
        )
        for key, value in changes.items():
            *section, name = key.split("__")
            if section:
                value = dataclasses.replace(getattr(config, section[0]), **{name: value})
                name = section[0]
            config = dataclasses.replace(config, **{name: value})
        return config

    return make


@pytest.fixture(scope="session")
def small(model_cache: Path):
    """A small model with random weights, its tokenizer, and a task."""
    from rlcore.engine.model import character_tokenizer, small_model
    from rlcore.engine.tasks import Task

    config = Config(model=ModelConfig(hidden_size=32, heads=2), task=TaskConfig(pool=2000, held_out=10))
    tokenizer = character_tokenizer()
    return small_model(config, len(tokenizer)).eval(), tokenizer, Task(config.task)


@pytest.fixture(scope="session")
def finished_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(tiny: Callable[..., Config], finished_place: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with checkpoints and evaluations at steps 2 and 4, trained once."""
    from rlcore.engine.trainer import train

    if not (finished_place / "run").exists():
        train(tiny(dir=str(finished_place), eval__samples=4, task__held_out=20))
    return shutil.copytree(finished_place / "run", tmp_path / "finished")
