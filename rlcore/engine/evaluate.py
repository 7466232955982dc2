"""How good a policy is on held-out problems: mean@k, pass@k, majority vote, lengths, how much answers differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlcore.engine.config import Config, RolloutConfig
from rlcore.engine.rollout import roll_out
from rlcore.engine.seeding import generator
from rlcore.engine.tasks import Problem, Task


@dataclass(frozen=True)
class Evaluation:
    """The answers to P problems, k to each: lists of P lists of k."""

    texts: list[list[str]]
    correct: list[list[bool]]
    reward: list[list[float]]
    length: list[list[int]]  # tokens, the end token included
    finished: list[list[bool]]
    failures: list[str] = field(default_factory=list)  # a sentence for every reward that failed

    def metrics(self) -> dict[str, float]:
        """Means over all answers or all problems, without prefix.

        accuracy is mean@k; pass_at_j for the powers of two j <= k; maj_at_k; length with its median and 95th
        percentile; truncated, the share without an end token; answer_entropy, how much the k answers to a problem
        differ (nats, 0 where all are equal, log k at most); reward_errors, how many rewards failed.
        """
        k = len(self.texts[0])
        lengths, right = np.asarray(self.length).ravel(), [sum(row) for row in self.correct]
        finished = float(np.mean(self.finished))
        return {
            "accuracy": sum(right) / (k * len(right)),
            **{f"pass_at_{j}": mean(pass_at(k, c, j) for c in right) for j in powers_of_two(k)},
            f"maj_at_{k}": mean(map(majority, self.texts, self.correct)),
            "answer_entropy": mean(map(answer_entropy, self.texts)),
            "reward": float(np.mean(self.reward, dtype=np.float64)),
            "length": float(lengths.mean()),
            "length_p50": float(np.percentile(lengths, 50)),
            "length_p95": float(np.percentile(lengths, 95)),
            "finished": finished,
            "truncated": 1 - finished,
            "reward_errors": len(self.failures),
        }


def evaluate(
    model: Any, tokenizer: Any, task: Task, config: Config, device: torch.device, say: Callable[[str], None]
) -> dict[str, float]:
    """The metrics of a policy on all held-out problems, as `eval/NAME`; says the first failures of rewards."""
    evaluation = measure(model, tokenizer, task, task.held_out, config, device)
    for failure in evaluation.failures[:3]:
        say(failure)
    return {f"eval/{name}": value for name, value in evaluation.metrics().items()}


def measure(
    model: Any,
    tokenizer: Any,
    task: Task,
    problems: list[Problem],
    config: Config,
    device: torch.device,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Evaluation:
    """Samples config.eval.samples answers to every problem, or the likeliest one at temperature 0.

    Every evaluation of a run uses the same random numbers, so that two of them differ by the policy alone. `watch` goes
    around the batches, for a progress bar.
    """
    greedy = config.eval.temperature == 0
    plain = RolloutConfig(
        samples=1 if greedy else config.eval.samples,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=1.0 if greedy else config.eval.temperature,
        top_k=1 if greedy else 0,
    )
    evaluation = Evaluation([], [], [], [], [])
    for start in watch(range(0, len(problems), config.eval.batch)):
        stream = generator(config.seed, "evaluate", start, device=device)
        rollout = roll_out(model, tokenizer, task, problems[start : start + config.eval.batch], plain, stream)
        assert rollout.batch.offsets is not None
        columns: list[tuple[list[Any], list[Any]]] = [
            (evaluation.texts, rollout.texts),
            (evaluation.correct, rollout.correct.tolist()),
            (evaluation.reward, rollout.reward.tolist()),
            (evaluation.length, rollout.batch.offsets.diff().tolist()),
            (evaluation.finished, rollout.finished.tolist()),
        ]
        for rows, values in columns:
            rows.extend(values[s : s + plain.samples] for s in range(0, len(values), plain.samples))
        evaluation.failures.extend(rollout.failures)
    return evaluation


def pass_at(n: int, c: int, k: int) -> float:
    """The chance that at least one of k answers is right, drawn without replacement from n of which c are.

    pass@k = 1 - C(n - c, k) / C(n, k), unbiased for k independent answers. Source: Chen et al., "Evaluating large
    language models trained on code" (2021).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n, c, k: expected 0 <= c <= n and 1 <= k <= n, got {n}, {c}, {k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(texts: list[str], correct: list[bool]) -> float:
    """The chance that the most frequent answer is right; of answers that tie each is as likely to be taken.

    Answers are equal where they are so without white space around them, which is what a verifier gets to see.
    """
    votes = Counter(text.strip() for text in texts)
    most = max(votes.values())
    right: dict[str, list[bool]] = {answer: [] for answer in votes}
    for text, is_right in zip(texts, correct, strict=True):
        right[text.strip()].append(is_right)
    return mean(mean(right[text]) for text, count in votes.items() if count == most)


def answer_entropy(texts: list[str]) -> float:
    """The entropy of the distribution of distinct answers, in nats: -sum of p log p, p the share of each."""
    counts = Counter(text.strip() for text in texts).values()
    return math.log(len(texts)) - sum(c * math.log(c) for c in counts) / len(texts)


def powers_of_two(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
