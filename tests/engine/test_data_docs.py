"""The examples of docs/data.md do what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlcore.engine.config import RewardConfig, TaskConfig
from rlcore.engine.config_file import load_toml
from rlcore.engine.config_rules import validate
from rlcore.engine.data import Rows
from rlcore.engine.rewards import Rewards

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_toml(tmp_path):
    for text in examples("toml"):
        (tmp_path / "a.toml").write_text(text, encoding="utf-8")
        validate(load_toml(tmp_path / "a.toml"))


def test_rows_and_programs(tmp_path):
    rows, programs = examples("json")
    (tmp_path / "rows.jsonl").write_text(rows)
    assert [p.answer for p in Rows(TaskConfig(strict=True), "task.data", [str(tmp_path / "rows.jsonl")])] == ["4", "8"]
    (tmp_path / "programs.jsonl").write_text(programs)
    problems = list(Rows(TaskConfig(strict=True), "task.data", [str(tmp_path / "programs.jsonl")]))
    texts = ["```python\ndef add(a, b):\n    return a + b\n```", "print(2 * int(input()))"]
    score = Rewards(RewardConfig(channels={"tests": "code"}), lambda p, text: 0.0)
    assert score(problems, texts).total.tolist() == [1.0, 1.0]
    assert score(problems, texts[::-1]).total.tolist() == [0.0, 0.0]


def test_channels(tmp_path, monkeypatch):
    """The channels of the page, its functions and its weights."""
    monkeypatch.chdir(tmp_path)
    (source,) = examples("python")
    (tmp_path / "my_rewards.py").write_text(source)
    text = next(text for text in examples("toml") if "[reward" in text)
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "rows.jsonl").write_text(examples("json")[0])
    problem = Rows(TaskConfig(), "task.data", ["rows.jsonl"])[0]
    texts = ["\\boxed{4}", "it is 4, and that is all that I know", "5"]
    scores = Rewards(load_toml(tmp_path / "a.toml").reward, lambda p, text: 0.0)([problem] * 3, texts)
    assert {name: score.tolist() for name, score in scores.channels.items()} == {
        "correct": [1, 1, 0], "format": [1, 0, 0], "short": [1, 0, 1],
    }  # fmt: skip
    assert scores.total.tolist() == pytest.approx([1.15, 1.0, 0.05])
    other = Rewards(RewardConfig(channels={"a": "my_rewards.py:starts_alike"}), lambda p, text: 0.0)
    assert other([problem] * 2, ["40", "5"]).total.tolist() == [1.0, 0.0]
