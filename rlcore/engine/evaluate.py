"""Accuracy on held-out problems: the mean over k samples at temperature 1."""

from __future__ import annotations

from typing import Any

import torch

from rlcore.engine.config import Config, RolloutConfig
from rlcore.engine.rollout import roll_out
from rlcore.engine.seeding import generator
from rlcore.engine.tasks import Task


def evaluate(model: Any, tokenizer: Any, task: Task, config: Config, device: torch.device) -> dict[str, float]:
    """accuracy (right or not), reward, length in tokens and the share of finished answers, means over all samples.

    Every evaluation of a run uses the same random numbers, so that two of them differ by the policy alone.
    """
    plain = RolloutConfig(samples=config.eval.samples, max_new_tokens=config.rollout.max_new_tokens)
    sums = dict.fromkeys(("accuracy", "reward", "length", "finished"), 0.0)
    count = 0
    for start in range(0, len(task.held_out), config.eval.batch):
        problems = task.held_out[start : start + config.eval.batch]
        stream = generator(config.seed, "evaluate", start, device=device)
        rollout = roll_out(model, tokenizer, task, problems, plain, stream)
        count += len(rollout.texts)
        sums["accuracy"] += float(rollout.correct.sum())
        sums["reward"] += float(rollout.reward.sum())
        sums["length"] += float(rollout.batch.N)
        sums["finished"] += float(rollout.finished.sum())
    return {f"eval/{name}": value / count for name, value in sums.items()}
