"""The loop: sample prompts -> roll out -> reward -> advantage -> update -> evaluate -> log -> checkpoint.

P prompts per step, G answers per prompt, S = P * G answers (sequences) of N tokens together.

Everything random comes from a stream named by (seed, purpose, step). So step k follows from what learned up to step
k - 1 alone (`Learner`): that is all that a checkpoint holds, and a resumed run repeats an uninterrupted one bit by bit.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import rlcore as rl
from rlcore.engine import checkpoint
from rlcore.engine.config import Config
from rlcore.engine.config_rules import validate
from rlcore.engine.errors import Interrupted, UserError, first_line
from rlcore.engine.evaluate import evaluate
from rlcore.engine.logging import RunLog
from rlcore.engine.model import check_fit, load_start, load_trained, save_merged
from rlcore.engine.policy import Policy
from rlcore.engine.reference import load_reference
from rlcore.engine.resample import fill_up, token_count, without_signal
from rlcore.engine.rollout import Rollout, roll_out
from rlcore.engine.run import RunDirectory, check_same, save_identity
from rlcore.engine.samples import lines
from rlcore.engine.seeding import generator, permutation, seed_of
from rlcore.engine.tasks import Task
from rlcore.engine.timing import Stopwatch
from rlcore.engine.trackers import trackers
from rlcore.engine.update import Learner


def train(config: Config, resume: bool = False) -> None:
    """Runs `config.dir/config.name` from its start, or from its last good checkpoint, to its last step.

    Raises UserError, SaveError or Interrupted, whose messages are meant for the user.
    """
    method = rl.methods()[validate(config).method]
    device = choose_device(config)
    with RunDirectory(Path(config.dir) / config.name, config, resume) as run, repeatable(config):
        tracked = trackers(config, run.path)
        task = Task(config.task, config.reward)
        checkpoint.clean(run.checkpoints)
        saved = checkpoint.load_latest(run.checkpoints, print) if resume else None
        first_step = 0 if saved is None else saved.step + 1
        checkpoint.set_aside(run.checkpoints, after=first_step - 1)
        if saved is None:
            model, tokenizer = load_start(config, task, device, print)
        else:
            check_same(saved.path, config)
            model, tokenizer = load_trained(saved.path / "model", config, task, device, print)
        check_fit(model, tokenizer, task, config.rollout.max_new_tokens)
        policy = Policy(model, tokenizer.pad_token_id, config.update.layout, config.rollout.temperature)
        learner = Learner(config, method, policy, load_reference(config, task, policy, run.path))
        if saved is not None:
            learner.restore(saved.path)
        run.accept()

        with RunLog(run.path, first_step, config.steps, tracked) as log, StopSignal() as stop:
            log.say(introduction(config, policy, task, run, first_step))
            writing = 0.0  # seconds that the metrics of the last step took to write: they count in the next
            # Step 0 is the evaluation before any training.
            for step in range(first_step, config.steps + 1):
                record: dict[str, float] = {}
                if step > 0:
                    clock = Stopwatch(log=writing)
                    with clock("rollout"):
                        rollout, record = answers_of_step(model, tokenizer, task, config, step)
                    for failure in rollout.failures[:3]:
                        log.say(failure)
                    clock.move("rollout", "reward", rollout.scoring)
                    reward = rollout.reward
                    if config.shuffle_rewards:
                        reward = reward[permutation(len(reward), config.seed, "shuffle", step)]
                    seen, metrics = learner.learn(rollout, reward, step, clock)
                    with clock("log"):
                        log.answers(lines(step, rollout, seen, tokenizer, config.log_samples))
                    record |= {**metrics, **clock.metrics()}
                    record["time/tokens_per_s"] = record["sampled_tokens"] / record["time/step"]

                evaluating = is_due(step, config.eval.every, config.steps) or step == 0
                if evaluating:
                    start = time.perf_counter()
                    with learner.evaluated():
                        record |= evaluate(model, tokenizer, task, config, device, log.say)
                    record["time/eval"] = time.perf_counter() - start
                start = time.perf_counter()
                log.step(step, record)
                writing = time.perf_counter() - start
                if evaluating:
                    log.refresh()

                stopping = stop.requested and step < config.steps
                if is_due(step, config.checkpoint_every, config.steps) or step == 0 or stopping:
                    log.sync()
                    more = partial(save_rest, learner, tokenizer)
                    checkpoint.save(run.checkpoints, step, model, tokenizer, learner.optimizer, config.keep, more)
                if stopping:
                    log.curves()
                    raise Interrupted(f"Stopped after step {step}. Go on with: {run.command}")
            if config.model.lora_merge:
                save_merged(run.path / "merged", model, tokenizer)
            log.conclude()


def save_rest(learner: Learner, tokenizer: Any, directory: Path) -> None:
    """What a checkpoint holds beside the policy and its optimizer."""
    learner.save(directory, tokenizer)
    save_identity(directory, learner.config)


def answers_of_step(
    model: Any, tokenizer: Any, task: Task, config: Config, step: int
) -> tuple[Rollout, dict[str, float]]:
    """The rollout that a step learns from, and what the answers to its own prompts were like."""
    device = model.get_input_embeddings().weight.device

    def draw(again: int, count: int) -> Rollout:
        # Each round of resampling goes through the problems in an order of its own, so nothing is carried over.
        seed = seed_of(config.seed, "resample", again) if again else config.seed
        stream = ("resample", step, again) if again else ("rollout", step)
        problems = task.prompts(step - 1, config.rollout.prompts, seed)[:count]
        random = generator(config.seed, *stream, device=device)
        return roll_out(model, tokenizer, task, problems, config.rollout, random, step)

    rollout = draw(0, config.rollout.prompts)
    metrics = summary(rollout)
    if config.rollout.dynamic_sampling:
        rollout, resampled = fill_up(rollout, draw, config.rollout.max_resample)
        metrics["sampled_tokens"] += resampled.pop("tokens")
        metrics |= resampled
    return rollout, metrics


def summary(rollout: Rollout) -> dict[str, float]:
    """What the answers of a step were like: means over all S of them, groups_without_signal over the P groups."""
    return {
        "reward": rollout.reward.mean().item(),
        **{f"reward/{name}": score.mean().item() for name, score in rollout.channels.items()},
        "reward_errors": len(rollout.failures),
        "accuracy": rollout.correct.float().mean().item(),
        "length": rollout.batch.N / len(rollout.texts),
        "finished": rollout.finished.float().mean().item(),
        "groups_without_signal": without_signal(rollout).float().mean().item(),
        "sampled_tokens": token_count(rollout),
    }


def is_due(step: int, every: int, last: int) -> bool:
    return step == last or every > 0 and step % every == 0


def choose_device(config: Config) -> torch.device:
    """The configured device, or cuda where there is one, else the CPU."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Read back: on the device meta there are no numbers.
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).split(". ")[0]
        raise UserError(f"device: {name!r} can not be used: {reason}") from None
    return torch.device(name)


def introduction(config: Config, policy: Policy, task: Task, run: RunDirectory, first_step: int) -> str:
    """What is about to happen, in a few lines."""
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    layout = "prefix trees and the folded head" if policy.layout == "tree" else "plain padded batches"
    if policy.why_padded:
        layout += f", because prefix trees are not exact for this model: {policy.why_padded}"
    span = f"from step {first_step} to {config.steps}" if first_step <= config.steps else "finished already"
    return (
        f"{run.path}: {config.method} on {task.name}, seed {config.seed}, {span}\n"
        f"{type(policy.model).__name__}, {size / 1e6:.2f}M parameters on {policy.device}; updates through {layout}\n"
        f"{len(task.train)} training and {len(task.held_out)} held-out problems; "
        f"{config.rollout.prompts} x {config.rollout.samples} answers per step"
        + "".join(f"\n{note}" for note in task.notes)
        + ("; rewards are shuffled (control)" if config.shuffle_rewards else "")
    )


@contextmanager
def repeatable(config: Config) -> Iterator[None]:
    """The configured number of threads and deterministic algorithms inside the block."""
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.set_num_threads(config.threads or (threads if config.model.path else 1))
    if not mode:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill


class StopSignal:
    """Ctrl-C or a termination signal lets the step end and a checkpoint be written; a second one stops at once."""

    requested = False

    def __enter__(self) -> StopSignal:
        self.before = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nFinishing the step and saving; once more to stop at once.", flush=True)
