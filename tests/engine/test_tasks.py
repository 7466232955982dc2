"""The split: no question on both sides, whatever the seed, warm start included."""

from __future__ import annotations

import pytest

from rlcore.engine.config import Config, TaskConfig
from rlcore.engine.errors import UserError
from rlcore.engine.model import supervised
from rlcore.engine.rollout import encode
from rlcore.engine.tasks import Task


def test_training_and_held_out_questions_are_disjoint():
    """Every prompt of two epochs, of several seeds and pools, against every held-out prompt of every pool."""
    tasks = [Task(TaskConfig(pool=3000, seed=seed, held_out=300)) for seed in (0, 1, 1000)]
    held_out = {problem.prompt for task in tasks for problem in task.held_out}
    seen = {problem.prompt for task in tasks for problem in task.train}
    for seed in (0, 1):
        per_epoch = len(tasks[0].train) // 64 + 1
        seen |= {problem.prompt for step in range(2 * per_epoch) for problem in tasks[0].prompts(step, 64, seed)}
    assert len(held_out) > 200
    assert not seen & held_out


def test_warm_start_sees_training_questions_only(small, tiny):
    _, tokenizer, task = small
    config = tiny()
    held_out = {tuple(ids) for ids in encode(tokenizer, [problem.prompt for problem in task.held_out])}
    for step in range(60):
        prompts, _, _ = supervised(tokenizer, task, step, config, "cpu")
        assert not held_out & {tuple(ids) for ids in prompts}


def test_seeds_shift_the_same_items():
    """Why the split can not go by seed: item i of seed s is item i + 1 of seed s - 1."""
    import reasoning_gym

    first, second = (reasoning_gym.create_dataset("chain_sum", size=500, seed=seed) for seed in (0, 1))
    assert [first[i]["question"] for i in range(1, 500)] == [second[i]["question"] for i in range(499)]


def test_questions_are_distinct_and_epochs_complete():
    task = Task(TaskConfig(pool=1000, held_out=20))
    assert len({problem.prompt for problem in task.train}) == len(task.train)
    steps = len(task.train) // 10
    epoch = [problem.prompt for step in range(steps) for problem in task.prompts(step, 10, 0)]
    assert len(set(epoch)) == len(epoch)
    assert task.prompts(3, 10, 0) == task.prompts(3, 10, 0)
    assert task.prompts(3, 10, 0) != task.prompts(3, 10, 1)


def test_held_out_set_is_the_same_for_every_run_seed():
    assert Config(seed=1).task == Config(seed=2).task


def test_verifier():
    task = Task(TaskConfig(pool=500, held_out=20, partial_credit=True))
    problem = task.train[0]
    assert task.score(problem, problem.answer) == 1.0
    assert task.score(problem, f" {problem.answer} ") == 1.0
    assert task.score(problem, "") == 0.0
    assert 0.0 < task.score(problem, problem.answer + "7") < 1.0
    strict = Task(TaskConfig(pool=500, held_out=20))
    assert strict.score(problem, problem.answer) == 1.0
    assert strict.score(problem, problem.answer + "7") == 0.0
    assert task.score(problem, "no number") == 0.0


def test_options_and_their_errors():
    task = Task(TaskConfig(pool=500, held_out=20, options={"max_digits": "1"}))
    assert all(problem.entry["metadata"]["num_digits"] == 1 for problem in task.train)
    with pytest.raises(UserError, match="chain_sum"):
        Task(TaskConfig(name="chain_sums"))
    with pytest.raises(UserError, match="max_digit"):
        Task(TaskConfig(options={"max_digit": "1"}))
    with pytest.raises(UserError, match="min_terms must be positive"):
        Task(TaskConfig(options={"min_terms": "0"}))
    with pytest.raises(UserError, match="too few"):
        Task(TaskConfig(pool=1))
