"""The frozen model that the policy is held to: the one that the run started from."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlcore as rl
from rlcore.engine.checkpoint import save_model, why_unusable, write_directory
from rlcore.engine.config import Config
from rlcore.engine.model import load, load_or_make
from rlcore.engine.packs import Pack
from rlcore.engine.policy import Policy
from rlcore.engine.precision import compute_in_bfloat16
from rlcore.engine.tasks import Task


class Reference:
    """Log-probs [N] of answers under the frozen model, in the policy's layout and at its temperature.

    Without a model of its own it is the policy's without its adapters.
    """

    def __init__(self, policy: Policy, model: Any = None) -> None:
        self.policy, self.shared = copy.copy(policy), model is None
        if model is not None:
            self.policy.model = rl.attach(model) if policy.layout == "tree" else model

    def logp(self, pack: Pack, batch: rl.TokenBatch) -> Tensor:
        with self.policy.without_adapter() if self.shared else nullcontext():
            return self.policy.logp(pack, batch)


def load_reference(config: Config, task: Task, policy: Policy, run: Path) -> Reference | None:
    """The starting model as kl.place asks for it, or None.

    It is kept in the run's `reference/`, so that a resumed run compares with the same weights, whatever became of the
    cache or of model.path.
    """
    if config.kl.place == "none":
        return None
    if config.model.lora_rank:
        return Reference(policy)
    directory = run / "reference"
    if why_unusable(directory) is not None:
        start, tokenizer = load_or_make(config, task, torch.device("cpu"), lambda message: None)
        write_directory(directory, lambda temporary: save_model(temporary, start, tokenizer))
    model, _ = load(directory)
    if config.model.dtype == "bfloat16":
        compute_in_bfloat16(model)
    return Reference(policy, model.to(policy.device).requires_grad_(False))
