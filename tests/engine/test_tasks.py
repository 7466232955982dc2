"""The split: no question on both sides, whatever the seed, warm start included."""

from __future__ import annotations

import copy

import pytest
import torch

from rlcore.engine import countdown
from rlcore.engine.config import Config, TaskConfig
from rlcore.engine.errors import UserError
from rlcore.engine.resolve import resolve
from rlcore.engine.rollout import encode
from rlcore.engine.tasks import Task
from rlcore.engine.warm_start import supervised


def test_training_and_held_out_questions_are_disjoint():
    """Every prompt of two epochs, of several seeds and pools, against every held-out prompt of every pool."""
    tasks = [Task(TaskConfig(pool=3000, seed=seed, held_out=300)) for seed in (0, 1, 1000)]
    held_out = {problem.prompt for task in tasks for problem in task.held_out}
    seen = {problem.prompt for task in tasks for problem in task.train}
    for seed in (0, 1):
        per_epoch = len(tasks[0].train) // 64 + 1
        seen |= {problem.prompt for step in range(2 * per_epoch) for problem in tasks[0].prompts(step, 64, seed)}
    assert len(held_out) > 200 and len(tasks[0].train) > 4 * len(tasks[0].held_out)
    assert not seen & held_out


def test_answers_of_the_warm_start_begin_with_no_special_token(small, tiny):
    """Tokenizers that put a token in front of every text put it in front of prompts alone."""
    from tokenizers.processors import TemplateProcessing

    tokenizer, config = copy.deepcopy(small[1]), tiny()
    plain, given = supervised(tokenizer, small[2], 0, config, torch.device("cpu"))
    begin = ("<unk>", tokenizer.unk_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<unk> $A", None, [begin])
    pack, batch = supervised(tokenizer, small[2], 0, config, torch.device("cpu"))
    assert pack.prompts == [[begin[1], *prompt] for prompt in plain.prompts]
    assert pack.responses == plain.responses and torch.equal(batch.target, given.target)


def test_warm_start_sees_training_questions_only(small, tiny):
    _, tokenizer, task = small
    config = tiny()
    held_out = {tuple(ids) for ids in encode(tokenizer, [problem.prompt for problem in task.held_out])}
    for step in range(60):
        pack, _ = supervised(tokenizer, task, step, config, torch.device("cpu"))
        assert not held_out & {tuple(ids) for ids in pack.prompts}


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
    size = len(task.train)
    first, second, *_ = ([p.prompt for p in task.prompts(epoch, size, 0)] for epoch in range(9))
    assert first != second and sorted(first) == sorted(second)
    assert len(task.orders) < 9  # each as long as the data


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


def test_mixtures():
    """Weights hold in every block of 1000, epochs of each task are complete, a step needs no other before it."""
    options = {"countdown.max_value": "12"}
    config = TaskConfig(pool=600, held_out=40, mixture={"chain_sum": 3.0, "countdown": 1.0}, options=options)
    task = Task(config)
    assert task.name == "chain_sum+countdown" and len(task.held_out) == 40
    assert sorted({p.task for p in task.held_out}) == ["chain_sum", "countdown"]
    assert len(task.train) == sum(len(part.train) for part in task.parts.values())
    drawn = [p for step in range(60) for p in task.prompts(step, 50, seed=1)]
    for block in (drawn[:1000], drawn[1000:2000]):
        assert sum(p.task == "chain_sum" for p in block) == 750
    for name, part in task.parts.items():
        mine = [p.prompt for p in drawn if p.task == name]
        size = len(part.train)
        whole = len(mine) // size * size
        for epoch in range(0, whole, size):
            assert sorted(mine[epoch : epoch + size]) == sorted(p.prompt for p in part.train)
    assert whole >= size and Task(config).prompts(30, 50, seed=1) == drawn[1500:1550]
    assert all(task.score(p, p.answer) == 1.0 for p in task.held_out)
    assert max(n for p in task.train if p.task == "countdown" for n in p.entry["metadata"]["numbers"]) == 12
    with pytest.raises(UserError, match=r"written TASK\.OPTION, got 'max_digits'"):
        Task(TaskConfig(mixture={"chain_sum": 1.0}, options={"max_digits": "1"}))


def test_blocks_of_a_mixture_are_full(tmp_path):
    """A weight so small that its task would have no prompt gets one, and the block keeps its size; a template is for
    the files alone."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}?", "answer": {i}}}\n' for i in range(200)))
    mixture = {"chain_sum": 1.0, "data": 1.0, "countdown": 1e-9}
    task = Task(TaskConfig(pool=300, held_out=20, mixture=mixture, data=[str(path)], template="Q: {question}"))
    assert task.in_block.tolist() == [500, 499, 1]
    assert list(task.train) == [p for part in task.parts.values() for p in part.train]
    drawn = [p for step in range(2) for p in task.prompts(step, 1000, seed=0)]
    assert sum(p.task == "countdown" for p in drawn) == 2 and sum(p.task == "chain_sum" for p in drawn) == 1000
    assert all(p.prompt.startswith("Q: ") == (p.task == "data") for p in drawn)


def test_countdown_asks_the_same_problem_on_one_side_only():
    """Whatever the order of its numbers and the sentence that asks for it."""
    task = Task(TaskConfig(name="countdown", pool=3000, held_out=300))

    def identity(problem):
        data = problem.entry["metadata"]
        return tuple(sorted(data["numbers"])), data["target"]

    train, held_out = ({identity(p) for p in side} for side in (task.train, task.held_out))
    assert len(train) == len(task.train) and not train & held_out
    problem = task.train[0]
    numbers = " ".join(map(str, problem.entry["metadata"]["numbers"]))
    assert problem.prompt == f"{numbers} -> {problem.entry['metadata']['target']}:" and " " not in problem.answer
    assert all(task.score(p, p.answer) == 1.0 for p in task.train)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("2*3+4", True), (" 4 + (3*2)\n", True), ("4+3*2/1", False), ("2+3+4", False), ("10", False), ("4+3+3", False),
        ("2*3+4 ", True), ("(2*(3)+4)", True), ("", False), ("2*3+", False), ("2*3+4=10", False), ("2**3+4", False),
        ("9**9**9**9", False), ("__import__('os').getpid()", False), ("+".join("1" * 10**5), False), ("(" * 199, False),
        ("2/0", False), ("20/4*3-5", False), ("2*3+4.0", False), ("True*3", False),
        ("4+3+2+4-3", False), ("2*3+4#", False), ("2*3+0x4", False), ("2*3+4\\\n", False), ("(2*3\n+4)", False),
    ],
)  # fmt: skip
def test_countdown_checks_answers_without_running_them(answer, right):
    entry = {"metadata": {"numbers": [2, 3, 4], "target": 10}}
    assert countdown.is_solution(answer, entry) is right


def test_countdown_divides_exactly():
    assert countdown.is_solution("8/(3-8/3)", {"metadata": {"numbers": [8, 3, 8, 3], "target": 24}})


def test_a_task_brings_its_defaults():
    """Below the method's, the file's and the command line's; only where the task is practised alone."""
    config = resolve(["--task.name", "countdown", "--model.layers", "5"]).config
    assert (config.model.layers, config.model.warm_steps, config.rollout.max_new_tokens) == (5, 400, 12)
    assert resolve([]).config.rollout.max_new_tokens == 8
    mixed = resolve(["--task.mixture", "countdown", "1", "chain_sum", "1", "--task.name", "countdown"]).config
    assert mixed.task.mixture == {"countdown": 1.0, "chain_sum": 1.0}
