"""Reward channels: what each kind gives, weights, failures that are named and survived, hostile programs."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rlcore.cli import main
from rlcore.engine.config import Config, RewardConfig, TaskConfig
from rlcore.engine.config_file import to_toml
from rlcore.engine.errors import UserError
from rlcore.engine.logging import read
from rlcore.engine.problem import Problem
from rlcore.engine.reward_kinds import run_program
from rlcore.engine.rewards import Rewards, Scores
from rlcore.engine.tasks import Task
from rlcore.engine.time_limit import TimeUp, time_limit
from rlcore.engine.trainer import train


def problem(answer: str = "4", prompt: str = "2 + 2 =", **row: object) -> Problem:
    return Problem(prompt, answer, {"question": prompt, "answer": answer, "metadata": row}, "data")


def score(kind: str, texts: list[str], one: Problem | None = None, **config: object) -> Scores:
    """The scores of texts in a single channel `a`."""
    settings = RewardConfig(channels={"a": kind}, **config)  # type: ignore[arg-type]
    return Rewards(settings, lambda p, text: float(text == p.answer))([one or problem()] * len(texts), texts, step=7)


def user_file(tmp_path: Path, body: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(body)
    return f"{path}:f"


@pytest.mark.parametrize(
    ("kind", "answer", "right", "wrong"),
    [
        ("verifier", "4", ["4"], [" 4", "5"]),
        ("exact", "New  York", ["new york.", " New\nYork "], ["New York City", "", "NewYork"]),
        ("regex:\\bfour\\b", "4", ["it is four", "four"], ["fourteen", ""]),
        ("regex:answer: (\\S+)", "4", ["answer: 4", "answer: 3, no\nanswer: 4."], ["4", "answer: 4 answer: 5"]),
        ("regex:^a.*b$", "4", ["a\nb"], ["ab\nc"]),
        ("regex:answer:(?: (4))?", "4", ["answer: 4"], ["answer: 5", "answer:"]),
        ("math", "1/2", ["$\\frac{1}{2}$", "so it is 0.5", "\\boxed{\\frac{2}{4}}"], ["1/3", "no idea", ""]),
        ("math", "\\frac{\\sqrt{2}}{2}", ["$\\frac{1}{\\sqrt{2}}$"], ["$\\sqrt{2}$"]),
        ("math", "yes", ["Yes"], ["no"]),
    ],
)
def test_kinds(kind, answer, right, wrong):
    scores = score(kind, right + wrong, problem(answer))
    assert scores.total.tolist() == [1.0] * len(right) + [0.0] * len(wrong)
    assert scores.correct.tolist() == [True] * len(right) + [False] * len(wrong) and not scores.failures


def test_channels_are_weighted_and_kept(tmp_path):
    place = user_file(tmp_path, "def f(response): return len(response)")
    config = RewardConfig(
        channels={"right": "exact", "form": "regex:^\\d+$", "length": place}, weights={"length": -0.25}
    )
    texts = ["4", "5", "four"]
    scores = Rewards(config, lambda p, text: 0.0)([problem()] * 3, texts)
    assert {k: v.tolist() for k, v in scores.channels.items()} == {
        "right": [1, 0, 0], "form": [1, 1, 0], "length": [1, 1, 4],
    }  # fmt: skip
    assert scores.total.tolist() == [1.75, 0.75, -1.0] and scores.correct.tolist() == [True, False, False]
    other = Rewards(dataclasses.replace(config, correct="form"), lambda p, text: 0.0)([problem()] * 3, texts)
    assert other.correct.tolist() == [True, True, False]


def test_the_default_is_the_verifier_bit_by_bit():
    task = Task(TaskConfig(pool=300, held_out=10, partial_credit=True))
    problems = [p for p in task.train[:20] for _ in range(3)]
    texts = [text for p in task.train[:20] for text in (p.answer, p.answer + "7", "no")]
    scores = task.scores(problems, texts)
    assert torch.equal(scores.total, torch.tensor([task.score(p, t) for p, t in zip(problems, texts)]))
    assert list(scores.channels) == ["correct"] and torch.equal(scores.correct, scores.total >= 1)


def test_user_functions(tmp_path, monkeypatch):
    """Of lists or of one answer, with the arguments that they name; from a file or a module in the directory."""
    of_lists = (
        "def f(responses, answers, entries):\n"
        "    return [float(r == a) + e['metadata']['k'] for r, a, e in zip(responses, answers, entries)]"
    )
    assert score(user_file(tmp_path, of_lists), ["4", "5"], problem(k=2)).total.tolist() == [3.0, 2.0]
    of_one = "def f(prompt, response, scale=2): return scale * (response in prompt)"
    assert score(user_file(tmp_path, of_one), ["2", "5"]).total.tolist() == [2.0, 0.0]
    of_all = "import torch\ndef f(**columns): return torch.tensor([len(c) for c in columns['prompts']])"
    assert score(user_file(tmp_path, of_all), ["2", "5"]).total.tolist() == [7.0, 7.0]
    of_data = (
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Mark:\n    value: float\n"
        "def f(response): return Mark(float(response)).value"
    )
    assert score(user_file(tmp_path, of_data), ["2", "5"]).total.tolist() == [2.0, 5.0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rewards_of_this_test.py").write_text("def g(responses): return [1] * len(responses)")
    assert score("my_rewards_of_this_test:g", ["2", "5"]).total.tolist() == [1.0, 1.0]
    for body, named in (
        ("def f(text): return 1", "it takes text"),
        ("f = 3", "is not a function"),
        ("def g(): pass", "AttributeError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(: pass", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("f = max", "does not say what it takes"),
    ):
        with pytest.raises(UserError, match=named):
            score(user_file(tmp_path, body), ["4"])


BAD = {
    "raises": ("def f(response): return 1 / (response != 'bad')", "ZeroDivisionError: division by zero"),
    "raises in a list": ("def f(responses): return [1 / (r != 'bad') for r in responses]", "ZeroDivisionError"),
    "gives NaN": ("def f(response): return float('nan') if response == 'bad' else 1", "a finite number, got nan"),
    "gives NaN in a list": (
        "def f(responses): return [float('nan') if r == 'bad' else 1 for r in responses]",
        "got nan",
    ),
    "gives infinity": ("def f(response): return 1e999 if response == 'bad' else 1", "got inf"),
    "gives a text": ("def f(response): return '1' if response == 'bad' else 1", "a number, got '1'"),
    "gives too long an integer": ("def f(response): return 10**400 if response == 'bad' else 1", "a number, got 1000"),
    "gives two numbers": (
        "import torch\ndef f(responses): return [torch.ones(1 + (r == 'bad')) for r in responses]",
        "a number, got tensor",
    ),
    "gives no number": ("def f(response): return None if response == 'bad' else 1", "a number, got None"),
    "exits": ("import sys\ndef f(response): sys.exit() if response == 'bad' else None; return 1", "SystemExit"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_failure_names_its_sample(tmp_path, name):
    """Stop: one sentence with step, prompt and response. Zero: the others keep their scores."""
    place, (body, reason) = "", BAD[name]
    place = user_file(tmp_path, body)
    with pytest.raises(UserError) as error:
        score(place, ["ok", "bad", "ok"])
    message = str(error.value)
    assert "\n" not in message and reason in message
    for part in ("reward.channels.a failed in step 7", "prompt '2 + 2 ='", "response 'bad'", "reward.on_error"):
        assert part in message
    scores = score(place, ["ok", "bad", "ok"], on_error="zero")
    assert scores.total.tolist() == [1.0, 0.0, 1.0] and len(scores.failures) == 1 and "'bad'" in scores.failures[0]


@pytest.mark.parametrize("given", ["[1.0]", "3", "[1] * 4", "'11'", "{1: 2, 3: 4}", "{1, 2}"])
def test_a_list_of_another_length(tmp_path, given):
    place = user_file(tmp_path, f"def f(responses): return {given}")
    with pytest.raises(UserError, match="expected"):
        score(place, ["a", "b"])
    scores = score(place, ["a", "b"], on_error="zero")
    assert scores.total.tolist() == [0.0, 0.0] and len(scores.failures) == 2


@pytest.mark.parametrize(
    "body",
    [
        "import time\ndef f(response):\n    if response == 'bad': time.sleep(60)\n    return 1",
        "def f(response):\n    while response == 'bad': pass\n    return 1",
        # What swallows every exception is interrupted again.
        "def f(response):\n    n = 0\n    while response == 'bad' and n < 1:\n        try:\n"
        "            while True: pass\n        except BaseException: n += 1\n"
        "    while response == 'bad': pass\n    return 1",
    ],
)
def test_a_reward_that_hangs(tmp_path, body):
    start = time.monotonic()
    scores = score(user_file(tmp_path, body), ["ok", "bad", "late"], on_error="zero", seconds=0.3)
    assert time.monotonic() - start < 10
    assert scores.total.tolist() == [1.0, 0.0, 0.0]
    assert "not done after 0.3 s" in scores.failures[0] and "'bad'" in scores.failures[0]
    with pytest.raises(UserError, match="response 'bad'"):
        score(user_file(tmp_path, body), ["ok", "bad", "late"], seconds=0.3)


def test_a_list_function_that_hangs(tmp_path):
    place = user_file(tmp_path, "import time\ndef f(responses): time.sleep(60)")
    scores = score(place, ["a", "b"], on_error="zero", seconds=0.2)
    assert scores.total.tolist() == [0.0, 0.0] and "not done with 2 answers after 0.2 s" in scores.failures[0]


def test_a_reward_that_changes_what_it_gets(tmp_path):
    """The problem is the same for the next answer and the next step."""
    one = "def f(response, entry): entry['metadata']['k'] += 1; return entry['metadata']['k']"
    many = "def f(responses, entries): return [e['metadata'].pop('k') for e in entries]"
    for body, expected in ((one, 3.0), (many, 2.0)):
        mine = problem(k=2)
        for _ in range(2):
            assert score(user_file(tmp_path, body), ["4", "4"], mine).total.tolist() == [expected] * 2
        assert mine.entry["metadata"] == {"k": 2}


@pytest.mark.parametrize("end", ["return 1", "raise SystemExit", "raise ValueError('x')"])
def test_a_reward_that_forks_and_comes_back(tmp_path, end):
    """The child ends with the reward: one process goes on with the run."""
    body = f"import os\ndef f(response):\n    if os.fork() == 0: {end}\n    return 2"
    own = os.getpid()
    try:
        scores = score(user_file(tmp_path, body), ["4"])
    finally:
        if os.getpid() != own:
            os._exit(42)
    assert scores.total.tolist() == [2.0]
    assert os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) == 1


def test_time_limits_nest():
    """The inner limit ends the inner block alone; the outer one still counts; other threads are left alone."""
    start = time.monotonic()
    with pytest.raises(TimeUp), time_limit(0.4):
        with pytest.raises(TimeUp), time_limit(0.1):
            time.sleep(30)
        assert time.monotonic() - start < 0.4
        time.sleep(30)
    assert time.monotonic() - start < 5

    def work() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        done.append(1)

    done: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


TESTS = "assert add(1, 2) == 3"
GOOD = "def add(a, b): return a + b"
needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")


def passes(program: str, seconds: float = 1.0, **tests: object) -> bool:
    return run_program({"program": program, "seconds": seconds, "memory": 2**30, **(tests or {"tests": TESTS})}) == 1.0


def test_programs():
    assert passes(GOOD) and not passes("def add(a, b): return a - b") and not passes("def add(") and not passes("")
    double, cases = "print(int(input()) * 2)", [["3\n", "6\n"], ["4", "8"]]
    assert passes(double, cases=cases) and passes(double + "\nimport sys; sys.exit()", cases=cases)
    assert not passes("print(6)", cases=cases) and not passes(double + "\nraise SystemExit(1)", cases=cases)
    assert passes("import json, re, collections, random\n" + GOOD)


@needs_limits
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "x = 'a' * 10**11",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "while True: print('x' * 10000)",
        "import os\nwhile True:\n    try: os.write(1, b'x' * 10000)\n    except OSError: pass",
        "input()",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
        "raise KeyboardInterrupt",
        "def f(): f()\nf()",
        "import sys; sys.stdout.close(); sys.stderr.close()\nraise SystemExit",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'1' * 16)\n    except OSError: pass\nos._exit(0)",
    ],
)
def test_hostile_programs(program):
    """Each ends in time, is worth nothing, and the next one is scored as ever."""
    start = time.monotonic()
    assert not passes(program + "\n" + GOOD.replace("+", "-"), seconds=1.0)
    assert time.monotonic() - start < 12
    assert passes(GOOD)


@needs_limits
def test_processes_that_are_left_behind_are_killed(tmp_path):
    """Also those in a session of their own, whose parent has ended."""
    note = tmp_path / "pid"
    os.chmod(tmp_path, 0o777)
    program = (
        "import os, time\n"
        "try:\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        f"            open({str(note)!r}, 'w').write(str(os.getpid()))\n"
        "            time.sleep(100)\n"
        "        os._exit(0)\n"
        "    time.sleep(0.5)\n"
        "except OSError: pass\n" + GOOD
    )
    assert passes(program)
    # Where processes are limited there was no child to begin with.
    assert not note.exists() or not Path(f"/proc/{note.read_text()}").exists()


def test_the_next_run_writes_through_no_link_that_a_program_left(tmp_path):
    """The supervisor has more rights than the programs: it opens no file that they could have put there."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    program = (
        "import os\n"
        "for name in os.listdir():\n"
        "    os.remove(name)\n"
        "for name in ('stdin', 'stdout'):\n"
        f"    os.symlink({str(victim)!r}, name)\n"
        "print(input())"
    )
    passes(program, cases=[["a", "a"], ["b", "b"]])
    assert victim.read_text() == "kept"


def test_programs_see_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert passes("import os\nassert 'SECRET_TOKEN' not in os.environ\n" + GOOD)


def test_code_channel():
    """Fenced or bare programs; tests in a field, as text, as pairs, or in the answer; none is a failure."""
    fenced = f"I think\n```python\nx = 1\n```\nno:\n```python\n{GOOD}\n```\nDone."
    texts = [GOOD, fenced, "no program", GOOD.replace("+", "*")]
    for one in (problem(TESTS), problem("", tests=TESTS)):
        assert score("code", texts, one).total.tolist() == [1.0, 1.0, 0.0, 0.0]
    pairs = [{"input": "3", "output": "6"}]
    for tests in (pairs, '[["3", "6"]]'):
        assert score("code:cases", ["print(int(input()) * 2)", "print(1)"], problem(cases=tests)).total.tolist() == [
            1,
            0,
        ]
    both = problem(tests=[["3", "6"], ["4", "8"]])
    assert score("code", ["print(int(input()) * 2)", "print(6)"], both).total.tolist() == [1, 0]
    with pytest.raises(UserError, match="no field 'cases' with tests"):
        score("code:cases", [GOOD], problem())
    with pytest.raises(UserError, match="there are no tests"):
        score("code", [GOOD], problem(""))
    with pytest.raises(UserError, match="a pair of texts"):
        score("code", [GOOD], problem("", tests=[3]))


def test_programs_get_the_configured_limits(monkeypatch):
    jobs: list[dict] = []
    monkeypatch.setattr("rlcore.engine.reward_kinds.run_program", lambda job: jobs.append(job) or 1.0)
    score("code", [GOOD], problem(TESTS), code_seconds=0.25, code_memory=64)
    assert jobs == [{"program": GOOD, "tests": TESTS, "seconds": 0.25, "memory": 64 * 2**20}]


@pytest.mark.parametrize("tests", ["", [3]])
def test_a_row_without_tests_leaves_the_others_side_by_side(monkeypatch, tests):
    """Two programs that each wait until the other has started: one after the other they would wait in vain."""
    both = threading.Barrier(2)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})

    def started_together(job: dict) -> float:
        both.wait(timeout=10)
        return 1.0

    monkeypatch.setattr("rlcore.engine.reward_kinds.run_program", started_together)
    rows = [problem("", tests=tests), problem("a = 1"), problem("b = 2")]
    settings = RewardConfig(channels={"a": "code"}, on_error="zero")
    scores = Rewards(settings, lambda p, text: 0.0)(rows, [GOOD] * 3)
    assert scores.total.tolist() == [0.0, 1.0, 1.0] and len(scores.failures) == 1
    assert ("a pair of texts" if tests else "there are no tests") in scores.failures[0]


@pytest.mark.parametrize("body", ["def f(response): assert response != 'bad'; return 1", "raise KeyError"])
def test_an_exception_without_a_message(tmp_path, body):
    with pytest.raises(UserError, match=r"(AssertionError|KeyError)(;|$)"):
        score(user_file(tmp_path, body), ["ok", "bad"])


def test_a_run_survives_failures(tiny, tmp_path, capsys):
    """reward.on_error = zero: counted, told, logged per channel; the run goes on to its last step."""
    body = "def f(responses):\n    return [1.0] * len(responses)\ndef g(response): raise KeyError(response)"
    user_file(tmp_path, body)
    channels = {"correct": "verifier", "fine": f"{tmp_path}/mine.py:f", "broken": f"{tmp_path}/mine.py:g"}
    reward = RewardConfig(channels=channels, weights={"fine": 0.5}, on_error="zero")
    config = dataclasses.replace(tiny(steps=2), reward=reward)
    train(config)
    out = capsys.readouterr().out
    assert "reward.channels.broken failed in step 1: KeyError" in out
    records = [r for r in read(tmp_path / "run" / "metrics.jsonl") if r["step"] > 0]
    assert len(records) == 2
    for record in records:
        assert record["reward_errors"] == 36 and record["reward/fine"] == 1.0 and record["reward/broken"] == 0.0
        assert math.isclose(record["reward"], record["reward/correct"] + 0.5, abs_tol=1e-6)
        assert record["accuracy"] == record["reward/correct"]


def test_a_run_stops_at_a_failure(tiny, tmp_path, capsys):
    """reward.on_error = stop: exit code 2, one sentence, the checkpoint stays, and the corrected reward goes on."""
    place = user_file(tmp_path, "def f(prompts, responses): return [float('nan')] * len(prompts)")
    config: Config = dataclasses.replace(tiny(steps=2), reward=RewardConfig(channels={"mine": place}))
    file = tmp_path / "given.toml"
    file.write_text(to_toml(config))
    # The evaluation before the first step is scored too.
    assert main(["train", "--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("rlcore: reward.channels.mine failed") and message.count("\n") == 1
    assert "got nan" in message and "response '" in message
