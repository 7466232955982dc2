"""Prompts -> answers, rewards and one flat TokenBatch: everything that a step learns from."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import rlcore as rl
from rlcore.engine.config import RolloutConfig
from rlcore.engine.precision import numerics
from rlcore.engine.sampler import sample
from rlcore.engine.tasks import Problem, Task


@dataclass(frozen=True)
class Rollout:
    """The answers of one step: P prompts with G answers each, S = P * G sequences, N answer tokens.

    batch: target [N], offsets [S+1], group [S], rollout_logp [N] (of the distribution that was sampled from).
    """

    problems: list[Problem]  # P
    prompts: list[list[int]]  # P token id lists
    responses: list[list[list[int]]]  # P x G token id lists, the end token included
    texts: list[str]  # S
    reward: Tensor  # [S] float32: the weighted sum of the channels
    channels: dict[str, Tensor]  # [S] float32 each
    correct: Tensor  # [S] bool
    failures: list[str]  # a sentence for every reward that failed
    finished: Tensor  # [S] bool: ended with the end token
    model_logp: Tensor  # [N] the sampler's log-probs before top-k and top-p
    batch: rl.TokenBatch
    scoring: float = 0.0  # seconds that the rewards took


def roll_out(
    model: Any,
    tokenizer: Any,
    task: Task,
    problems: list[Problem],
    config: RolloutConfig,
    generator: torch.Generator,
    step: int | None = None,
) -> Rollout:
    """Samples config.samples answers to every problem and scores them; `step` is named where a reward fails."""
    prompts = encode(tokenizer, [problem.prompt for problem in problems])
    with numerics(model):
        drawn = sample(
            model,
            prompts,
            config.samples,
            max_new_tokens=config.max_new_tokens,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=generator,
        )
    real = torch.arange(drawn.ids.shape[1], device=drawn.ids.device) < drawn.lengths[:, None]
    offsets = torch.nn.functional.pad(drawn.lengths.cumsum(0), (1, 0))
    group = torch.arange(len(problems), device=offsets.device).repeat_interleave(config.samples)
    answers = [ids[:length] for ids, length in zip(drawn.ids.tolist(), drawn.lengths.tolist(), strict=True)]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    start = time.perf_counter()
    scores = task.scores([problems[s // config.samples] for s in range(len(texts))], texts, step)
    return Rollout(
        problems=problems,
        prompts=prompts,
        responses=[answers[s : s + config.samples] for s in range(0, len(answers), config.samples)],
        texts=texts,
        reward=scores.total.to(offsets.device),
        channels={name: score.to(offsets.device) for name, score in scores.channels.items()},
        correct=scores.correct.to(offsets.device),
        failures=scores.failures,
        finished=drawn.ids.gather(1, drawn.lengths[:, None] - 1).squeeze(1) == tokenizer.eos_token_id,
        model_logp=drawn.model_logp[real],
        batch=rl.TokenBatch(drawn.ids[real], offsets, group=group, rollout_logp=drawn.behaviour_logp[real]),
        scoring=time.perf_counter() - start,
    )


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts, with the beginning-of-text token where the tokenizer has one."""
    return tokenizer(texts)["input_ids"]


def take(batch: rl.TokenBatch, sequences: Tensor) -> rl.TokenBatch:
    """The given sequences [K] of a flat batch as a minibatch with denominators of its own."""
    return replace(batch.take(sequences), totals=None, whole=True)
