"""`rlcore eval`: measures a checkpoint of a run, prints a table and writes eval-STEP.json into the run."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rlcore.engine.checkpoint import Saved, found, step_of, why_unusable
from rlcore.engine.config import AT_LEAST_ONE, NOT_NEGATIVE, Config
from rlcore.engine.config_file import load_toml
from rlcore.engine.config_rules import check_ranges
from rlcore.engine.errors import UserError
from rlcore.engine.evaluate import Evaluation, measure
from rlcore.engine.plot import is_number
from rlcore.engine.records import read, write_whole
from rlcore.engine.run import check_same
from rlcore.engine.screen import watched


@dataclass
class Eval:
    """Measure a checkpoint of a run on held-out problems: mean@k, pass@k, majority vote, lengths.

    What is not given is as in the run's config, so the numbers are those that the run itself would get. Prints a table
    and writes eval-STEP.json into the run, with the answers to every problem.
    """

    run: Path
    """Directory of a run."""
    checkpoint: str = "last"
    """A step, last, or best: the one with the highest held-out accuracy among those that are kept."""
    samples: Annotated[int | None, AT_LEAST_ONE] = None
    """Answers per problem."""
    temperature: Annotated[float | None, NOT_NEGATIVE] = None
    """Sampling temperature. 0: the likeliest token each time, and one answer per problem."""
    limit: Annotated[int | None, AT_LEAST_ONE] = None
    """Only so many problems, from the first."""
    device: str | None = None
    """cpu, cuda, cuda:N or auto."""


def evaluate_run(command: Eval) -> None:
    """Raises UserError and SaveError, whose messages are meant for the user."""
    from transformers.utils import logging

    from rlcore.engine.model import check_fit, load_trained
    from rlcore.engine.tasks import Task
    from rlcore.engine.trainer import choose_device, repeatable

    logging.disable_progress_bar()
    check_ranges(command, "--")
    config = config_of(command)
    saved = chosen(command.run, command.checkpoint)
    check_same(saved.path, config)
    device = choose_device(config)
    with repeatable(config):
        task = Task(config.task, config.reward)
        # What the run's own evaluations use, where it keeps a moving average of the weights.
        weights = saved.path / ("ema" if config.update.ema and (saved.path / "ema").is_dir() else "model")
        model, tokenizer = load_trained(weights, config, task, device, print)
        check_fit(model, tokenizer, task, config.rollout.max_new_tokens)
        problems = task.held_out[: command.limit]
        evaluation = measure(model, tokenizer, task, problems, config, device, partial(watched, what="evaluating"))
    for failure in evaluation.failures[:3]:
        print(failure)
    result = summary(evaluation, saved.step, config)
    result["problems"] = [
        {"prompt": problem.prompt, "reference": problem.answer, "right": sum(right), "answers": dict(Counter(texts))}
        for problem, right, texts in zip(problems, evaluation.correct, evaluation.texts)
    ]
    path = command.run / f"eval-{saved.step}.json"
    write_whole(path, (json.dumps(result, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace"))
    show(result, saved)
    print(path)


def config_of(command: Eval) -> Config:
    """The run's config with what the command changes."""
    if not os.path.isfile(command.run / "config.toml"):
        raise UserError(f"{str(command.run)!r} is not the directory of a run: it has no config.toml")
    config = load_toml(command.run / "config.toml")
    given = {name: value for name in ("samples", "temperature") if (value := getattr(command, name)) is not None}
    return replace(config, eval=replace(config.eval, **given), device=command.device or config.device)


def chosen(run: Path, wanted: str) -> Saved:
    """The checkpoint that `wanted` names: a step, "last" or "best"."""
    whole = {step_of(path): path for path in found(run / "checkpoints") if why_unusable(path) is None}
    if not whole:
        raise UserError(f"{str(run)!r} has no whole checkpoint")
    if wanted == "last":
        step = max(whole)
    elif wanted == "best":
        accuracy = {
            r["step"]: r["eval/accuracy"] for r in read(run / "metrics.jsonl") if is_number(r.get("eval/accuracy"))
        }
        known = [step for step in whole if step in accuracy]
        if not known:
            raise UserError(f"--checkpoint best: none of the steps {listed(whole)} has a held-out accuracy")
        step = max(known, key=lambda step: (accuracy[step], step))
    elif wanted.isdecimal() and int(wanted) in whole:
        step = int(wanted)
    else:
        raise UserError(f"--checkpoint must be last, best or one of the steps {listed(whole)}, got {wanted!r}")
    return Saved(whole[step], step)


def listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps)))


def summary(evaluation: Evaluation, step: int, config: Config) -> dict[str, Any]:
    """What was measured and how. accuracy_stderr: over problems, whose k answers are not independent."""
    P, k = len(evaluation.correct), len(evaluation.correct[0])
    by_problem = [sum(row) / k for row in evaluation.correct]
    mean = sum(by_problem) / P
    spread = math.sqrt(sum((x - mean) ** 2 for x in by_problem) / (P - 1) / P) if P > 1 else None
    metrics = evaluation.metrics()
    return {
        "step": step,
        "temperature": config.eval.temperature,
        "samples": k,
        "metrics": {"accuracy": metrics.pop("accuracy"), "accuracy_stderr": spread, **metrics},
    }


def show(result: dict[str, Any], saved: Saved) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    metrics, k = result["metrics"], result["samples"]
    shares = ("accuracy", "accuracy_stderr", "finished", "truncated")
    print(f"step {saved.step}, {len(result['problems'])} problems, k = {k}, temperature {result['temperature']:g}")
    table = Table("metric")
    table.add_column("", justify="right")
    for name, value in metrics.items():
        share = name in shares or name.startswith(("pass_at", "maj_at"))
        label = f"accuracy (mean@{k})" if name == "accuracy" else name.replace("_at_", "@")
        form = ".1%" if share else "d" if isinstance(value, int) else ".3f"
        table.add_row(label, "unknown" if value is None else format(value, form))
    Console().print(table)
