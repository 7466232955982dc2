"""Evaluation: estimators against brute force, and `rlcore eval` against what the run itself measured."""

from __future__ import annotations

import errno
import json
import math
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcore.cli import main
from rlcore.engine.config import Config, EvalConfig, RolloutConfig
from rlcore.engine.config_file import load_toml, to_toml
from rlcore.engine.eval_run import chosen
from rlcore.engine.evaluate import Evaluation, answer_entropy, majority, measure, pass_at, powers_of_two
from rlcore.engine.records import read
from rlcore.engine.sampler import sample


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_counts_subsets(case):
    n, c, k = case
    subsets = list(combinations([i < c for i in range(n)], k))
    assert pass_at(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_of_many_and_of_nonsense():
    assert pass_at(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at(8, 3, 1) == pytest.approx(3 / 8)
    for n, c, k in ((8, 9, 1), (8, -1, 1), (8, 1, 9), (8, 1, 0)):
        with pytest.raises(ValueError, match="expected 0 <= c <= n"):
            pass_at(n, c, k)


@pytest.mark.parametrize(
    ("texts", "right", "value"),
    [
        (["4", "5", " 4\n"], {"4"}, 1.0),
        (["4", "5", "5"], {"4"}, 0.0),
        (["4", "5"], {"4"}, 0.5),
        (["4", "5", "6", "7"], {"4"}, 0.25),
        (["4", "4", "5", "5", "6"], {"5", "6"}, 0.5),
        (["", "", "4"], {"4"}, 0.0),
        (["4"], {"4"}, 1.0),
    ],
)
def test_majority(texts, right, value):
    """Ties go to each with the same chance, in whatever order the answers came."""
    for order in (texts, texts[::-1], sorted(texts)):
        assert majority(order, [text.strip() in right for text in order]) == pytest.approx(value)


@given(st.lists(st.sampled_from(["a", "b", " b", "c"]), min_size=1, max_size=12))
def test_answer_entropy(texts):
    shares = [sum(text.strip() == x for text in texts) / len(texts) for x in {text.strip() for text in texts}]
    assert answer_entropy(texts) == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)


def test_powers_of_two():
    assert [powers_of_two(k) for k in (1, 2, 3, 8, 9)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8]]


def test_metrics_by_hand():
    metrics = Evaluation(
        failures=["a", "b"],
        texts=[["1", "1", "2", "3"], ["7", "8", "8", "8"]],
        correct=[[True, True, False, False], [True, False, False, False]],
        reward=[[1.0, 1.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0]],
        length=[[2, 2, 2, 2], [2, 2, 4, 8]],
        finished=[[True, True, True, True], [True, True, True, False]],
    ).metrics()
    assert metrics == pytest.approx({
        "accuracy": 3 / 8, "pass_at_1": 3 / 8, "pass_at_2": (5 / 6 + 1 / 2) / 2, "pass_at_4": 1.0, "maj_at_4": 0.5,
        "answer_entropy": (1.5 * math.log(2) + math.log(4) - 0.75 * math.log(3)) / 2, "reward": 3.5 / 8,
        "length": 3.0, "length_p50": 2.0, "length_p95": 6.6, "finished": 7 / 8, "truncated": 1 / 8,
        "reward_errors": 2,
    })  # fmt: skip


def test_greedy_is_the_likeliest_token(small):
    """One answer per problem, and every token of it the argmax of the model's logits."""
    model, tokenizer, task = small
    config = Config(eval=EvalConfig(samples=4, temperature=0.0, batch=3))
    problems = task.held_out[:4]
    evaluation = measure(model, tokenizer, task, problems, config, torch.device("cpu"))
    for problem, texts, lengths in zip(problems, evaluation.texts, evaluation.length):
        prompt = tokenizer(problem.prompt)["input_ids"]
        ids = list(prompt)
        while len(ids) < len(prompt) + config.rollout.max_new_tokens:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        answer = ids[len(prompt) :]
        assert texts == [tokenizer.decode(answer, skip_special_tokens=True)] and lengths == [len(answer)]


def test_what_reaches_the_sampler(small, monkeypatch):
    """Temperature and length of the config; other random numbers for every batch and seed, the same for every call."""
    model, tokenizer, task = small
    seen = []
    monkeypatch.setattr("rlcore.engine.rollout.sample", lambda *args, **kw: (seen.append(kw), sample(*args, **kw))[1])
    settings = EvalConfig(temperature=0.3, batch=1), RolloutConfig(max_new_tokens=3)
    for seed in (0, 0, 1):
        config = Config(seed=seed, eval=settings[0], rollout=settings[1])
        measure(model, tokenizer, task, task.held_out[:2], config, torch.device("cpu"))
    assert {(call["temperature"], call["max_new_tokens"]) for call in seen} == {(0.3, 3)}
    seeds = [call["generator"].initial_seed() for call in seen]
    assert seeds[:2] == seeds[2:4] and len(set(seeds)) == 4


def result_of(run: Path, step: int) -> dict:
    return json.loads((run / f"eval-{step}.json").read_text())


def shares(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name != "accuracy_stderr"}


def test_command_repeats_what_the_run_measured(finished, capsys):
    measured = {
        r["step"]: {k[5:]: v for k, v in r.items() if k.startswith("eval/")} for r in read(finished / "metrics.jsonl")
    }
    for wanted, step in (("last", 4), ("2", 2)):
        assert main(["eval", str(finished), "--checkpoint", wanted]) == 0
        result = result_of(finished, step)
        assert shares(result["metrics"]) == measured[step]
        assert (result["step"], result["samples"], result["temperature"]) == (step, 4, 1.0)
        problems = result["problems"]
        assert len(problems) == 20 and all(sum(p["answers"].values()) == 4 for p in problems)
        assert sum(p["right"] for p in problems) == round(result["metrics"]["accuracy"] * 80)
        spread = torch.tensor([p["right"] / 4 for p in problems], dtype=torch.float64).std() / 20**0.5
        assert result["metrics"]["accuracy_stderr"] == pytest.approx(float(spread))
        out = capsys.readouterr().out
        assert "accuracy (mean@4)" in out and f"{result['metrics']['maj_at_4']:.1%}" in out and "pass@2" in out
        assert f"eval-{step}.json" in out


def test_failures_of_a_reward_are_told(finished, capsys):
    """As in training: the first three by sample, all of them counted; they score 0."""
    (finished / "mine.py").write_text("def f(response): return 1 / 0\n")
    config = load_toml(finished / "config.toml")
    reward = replace(config.reward, channels={"mine": f"{finished / 'mine.py'}:f"}, on_error="zero")
    (finished / "config.toml").write_text(to_toml(replace(config, reward=reward)))
    assert main(["eval", str(finished), "--limit", "2"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "reward.channels.mine failed" in line]
    assert len(told) == 3 and all("ZeroDivisionError" in line and "response" in line for line in told)
    metrics = result_of(finished, 4)["metrics"]
    assert metrics["reward_errors"] == 8 and metrics["reward"] == 0


def test_command_options(finished):
    assert main(["eval", str(finished), "--samples", "2", "--temperature", "0.5", "--limit", "7"]) == 0
    result = result_of(finished, 4)
    assert (result["samples"], result["temperature"], len(result["problems"])) == (2, 0.5, 7)
    assert "pass_at_2" in result["metrics"] and "pass_at_4" not in result["metrics"]
    assert main(["eval", str(finished), "--temperature", "0", "--limit", "1"]) == 0
    assert result_of(finished, 4)["samples"] == 1 and result_of(finished, 4)["metrics"]["accuracy_stderr"] is None


def test_best_is_the_best_that_is_kept(finished):
    path = finished / "metrics.jsonl"
    lines = [{"step": 0, "eval/accuracy": 0.9}, {"step": 2, "eval/accuracy": 0.5}, {"step": 4, "eval/accuracy": 0.4}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert chosen(finished, "best").step == 2
    (finished / "checkpoints" / "step-000002" / "trainer.json").write_text("damaged")
    assert chosen(finished, "best").step == 4


def test_mistakes(finished, tmp_path, capsys):
    def fails(*arguments: str) -> str:
        before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
        assert main(["eval", *arguments]) == 2
        assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "no config.toml" in fails(str(tmp_path))
    assert "steps 2, 4, got '3'" in fails(str(finished), "--checkpoint", "3")
    assert "steps 2, 4, got 'first'" in fails(str(finished), "--checkpoint", "first")
    assert "--limit must be at least 1, got 0" in fails(str(finished), "--limit", "0")
    assert "--samples must be at least 1" in fails(str(finished), "--samples", "0")
    assert "--temperature must be 0 or more" in fails(str(finished), "--temperature", "-1")
    (finished / "metrics.jsonl").write_text("")
    assert "none of the steps 2, 4" in fails(str(finished), "--checkpoint", "best")
    shutil.rmtree(finished / "checkpoints")
    assert "has no whole checkpoint" in fails(str(finished))


def test_a_result_that_can_not_be_written_leaves_the_old_one(finished, monkeypatch, capsys):
    (finished / "eval-4.json").write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["eval", str(finished), "--limit", "1"]) == 3
    assert "No space left" in capsys.readouterr().err
    assert (finished / "eval-4.json").read_text() == "old" and not list(finished.glob(".*.tmp"))
