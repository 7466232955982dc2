"""Data files: what is kept, what is named, what is split, and prompts as the model gets them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlcore.cli import main
from rlcore.engine.config import Config, TaskConfig
from rlcore.engine.config_file import load_toml, to_toml
from rlcore.engine.config_rules import validate
from rlcore.engine.data import Rows
from rlcore.engine.errors import UserError
from rlcore.engine.logging import read
from rlcore.engine.model import fingerprint
from rlcore.engine.rollout import encode
from rlcore.engine.tasks import Task
from rlcore.engine.trainer import train

TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<a>{% endif %}"


def write(path: Path, rows: list[object]) -> Path:
    """A file of rows: texts as they are, everything else as JSON."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def sums(count: int, start: int = 0) -> list[object]:
    return [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(start, start + count)]


def task_of(path: Path, **changes: object) -> Task:
    return Task(TaskConfig(**{"data": [str(path)], "held_out": 20, **changes}))  # type: ignore[arg-type]


def test_rows_are_read_in_any_order(tmp_path):
    """Rows come back as they were written: other alphabets, escapes, CRLF, a byte-order mark, no newline at the end."""
    path = tmp_path / "a.jsonl"
    text = '\ufeff{"prompt": "первый", "answer": "\\u00e9"}\r\n\r\n{"prompt": "b\\nb", "answer": 2}\n'
    path.write_text(text + '{"prompt": "c", "answer": [1, {"k": null}]}', encoding="utf-8", newline="")
    rows = Rows(TaskConfig(), "task.data", [str(path)])
    assert not rows.report and len(rows) == 3
    found = [(rows[i].prompt, rows[i].answer) for i in (2, 0, 1, 2, -1)]
    c = ("c", '[1, {"k": null}]')
    assert found == [c, ("первый", "é"), ("b\nb", "2"), c, c]
    assert [p.prompt for p in rows] == ["первый", "b\nb", "c"] and rows[1].entry["metadata"]["answer"] == 2


def test_endings_in_capitals(tmp_path):
    path = write(tmp_path / "A.JSONL", sums(9))
    for place in (path, tmp_path):
        assert len(Rows(TaskConfig(), "task.data", [str(place)])) == 9


def test_half_valid_files_keep_their_good_lines(tmp_path):
    bad = ['{"prompt": "x", "answer":', "[1]", {"prompt": "y"}, {"answer": 1}, {"prompt": "", "answer": 1}]
    bad += [
        {"prompt": 5, "answer": 1},
        {"prompt": "z", "answer": None},
        '{"prompt": "\\ud800", "answer": "1"}',
        "[" * 10**5,
    ]
    path = write(tmp_path / "a.jsonl", [*sums(50), *bad, *sums(50, 50)])
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff\xfe", "answer": 1}\n')
    rows = Rows(TaskConfig(), "task.data", [str(path)])
    assert len(rows) == 100 and rows.bad == len(bad) + 1
    assert [str(i) in error for i, error in zip((51, 52, 53), rows.errors)] == [True] * 3
    note = task_of(path).notes[0]
    assert "10 unusable rows left out, 100 kept" in note and "a.jsonl line 51: not valid JSON" in note
    assert "no field 'answer'; there are prompt" in note and "and 7 more" in note
    with pytest.raises(UserError, match=r"a\.jsonl line 51: not valid JSON.*task\.strict"):
        task_of(path, strict=True)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": 5, "answer": 1}, "'prompt' must be a text or a list of messages with role and content, got 5"),
        ({"prompt": [{"role": "user", "content": "q"}], "answer": 1}, "needs task.chat"),
        ({"prompt": " ", "answer": 1}, "'prompt' is empty"),
        ({"prompt": "z", "answer": None}, "'answer' is null"),
        ('{"prompt": "\\ud800", "answer": "1"}', "half of a surrogate pair"),
        ("[" * 10**5, "line 1"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path, row, named):
    with pytest.raises(UserError) as error:
        Rows(TaskConfig(strict=True), "task.data", [str(write(tmp_path / "a.jsonl", [row]))])
    assert named in str(error.value)


def test_user_mistakes_are_one_sentence(capsys, tmp_path):
    """Through the command line: exit code 2, the file or key named, no traceback, the name not taken."""

    def fails(*arguments: object) -> str:
        at = ["--dir", str(tmp_path / "runs"), "--name", "run"]
        assert main(["train", *at, *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("rlcore: ") and message.count("\n") == 1 and "Traceback" not in message
        assert not (tmp_path / "runs" / "run" / "config.toml").exists()
        return message

    good, empty = write(tmp_path / "good.jsonl", sums(200)), write(tmp_path / "empty.jsonl", [])
    array = write(tmp_path / "array.jsonl", ["[", *(json.dumps(row) + "," for row in sums(3)), "]"])
    (tmp_path / "folder").mkdir()
    assert "no file 'nowhere.jsonl'" in fails("--task.data", "nowhere.jsonl")
    assert "no usable row in" in fails("--task.data", empty)
    assert "array.jsonl line 1: not valid JSON" in fails("--task.data", array)
    assert "ends with .jsonl" in fails("--task.data", tmp_path / "folder")
    assert "end with .jsonl" in fails("--task.data", write(tmp_path / "a.csv", ["prompt,answer"]))
    (tmp_path / "deep").mkdir()
    os.mkfifo(tmp_path / "deep" / "pipe.jsonl")
    assert "is no regular file" in fails("--task.data", tmp_path / "deep" / "pipe.jsonl")
    assert "File name too long" in fails("--task.data", "x" * 300 + ".jsonl")
    assert "no user whose home" in fails("--task.data", "~nobody-of-this-name/x.jsonl")
    assert "there is no file ''" in fails("--task.data", "")
    (tmp_path / "wide.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in sums(9)).encode("utf-16"))
    assert "line 1: not UTF-8 text" in fails("--task.data", tmp_path / "wide.jsonl")
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(good.read_bytes()))
    assert "line 1: not UTF-8 text" in fails("--task.data", tmp_path / "packed.jsonl")
    (tmp_path / "false.parquet").write_bytes(good.read_bytes())
    assert "not readable as Parquet" in fails("--task.data", tmp_path / "false.parquet")
    assert "no field 'question'; there are prompt, answer" in fails(
        "--task.data", good, "--task.prompt-field", "question"
    )
    assert "too few to split" in fails("--task.data", write(tmp_path / "one.jsonl", sums(1)))
    assert "task.held_out_data needs task.data" in fails("--task.held-out-data", good)
    assert "task.system needs task.chat" in fails("--task.system", "Be brief.")
    assert "task.mixture.chain_sum must be greater than 0" in fails("--task.mixture", "chain_sum", 0)
    assert "task.data names no file" in fails("--task.mixture", "data", 1)
    assert "does not name data" in fails("--task.mixture", "chain_sum", 1, "--task.data", good)
    assert "no task 'chain_summ'; did you mean 'chain_sum'" in fails("--task.mixture", "chain_summ", 1)
    assert "no channel 'b'; there are correct" in fails("--reward.weights", "b", 2)
    assert "reward.channels.a must be verifier" in fails("--reward.channels", "a", "verifyer")
    assert "is not a regular expression" in fails("--reward.channels", "a", "regex:(")
    assert "cannot load nomodule:f: ModuleNotFoundError" in fails("--reward.channels", "a", "nomodule:f")
    assert "there is no file 'no.py'" in fails("--reward.channels", "a", "no.py:f")


def test_directories_and_repeated_prompts(tmp_path):
    """Two files of a directory in order; a prompt that was there before is left out, also across files."""
    write(tmp_path / "b.jsonl", sums(60, 40))
    write(tmp_path / "a.jsonl", sums(50))
    (tmp_path / "notes.txt").write_text("no data")
    rows = Rows(TaskConfig(), "task.data", [str(tmp_path)])
    assert [p.answer for p in rows] == [str(i + 1) for i in range(100)]
    assert rows.repeated == 10 and "10 rows left out whose prompt was there before" in rows.report[0]


def test_the_split(tmp_path):
    """No prompt on both sides; the same sides whatever the order of the rows; a file of its own for held-out rows."""
    forward, backward = (task_of(write(tmp_path / f"{d}.jsonl", sums(400)[::d])) for d in (1, -1))
    for task in (forward, backward):
        assert not {p.prompt for p in task.train} & {p.prompt for p in task.held_out}
    assert {p.prompt for p in forward.train} == {p.prompt for p in backward.train}
    assert len(forward.held_out) == 20 and 300 < len(forward.train) < 390
    own = write(tmp_path / "own.jsonl", sums(30, 390))
    task = task_of(tmp_path / "1.jsonl", held_out_data=[str(own)], held_out=500)
    assert [p.prompt for p in task.held_out] == [f"{i} + 1 =" for i in range(390, 420)]
    assert len(task.train) == 390 and "10 rows left out that are held-out problems" in task.notes[0]
    epoch = [p.prompt for step in range(39) for p in task.prompts(step, 10, seed=3)]
    assert sorted(epoch) == sorted(p.prompt for p in task.train) and epoch == [
        p.prompt for step in range(13) for p in task.prompts(step, 30, seed=3)
    ]


def test_templates_and_nested_fields(tmp_path):
    rows = [{"q": {"text": f"{i}?"}, "hint": f"h{i}", "a": {"b": i}} for i in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    task = task_of(path, prompt_field="q.text", answer_field="a.b", template="{hint}: {question} {other}")
    problem = task.train[0]
    i = problem.answer
    assert problem.prompt == f"h{i}: {i}? {{other}}" and problem.entry["metadata"]["hint"] == f"h{i}"
    assert task.score(problem, f" {i}.\n") == 1.0 and task.score(problem, f"{i}1") == 0.0
    assert task_of(path, prompt_field="q.text", answer_field="").train[0].answer == ""


def test_names_in_a_template_and_in_a_field(tmp_path):
    """{question} is the prompt field, whatever a row calls question; a list has spaces; a.b may be one name."""
    row = {"prompt": "P", "question": "Q", "a.b": "own", "a": {"b": "nested"}, "n": [1, [2, 3]]}
    config = TaskConfig(answer_field="a.b", template="{question} {n}")
    problem = Rows(config, "task.data", [str(write(tmp_path / "a.jsonl", [row]))])[0]
    assert (problem.prompt, problem.answer) == ("P 1 2 3", "own")


def test_what_is_in_the_files_is_known_by_its_hash(tmp_path):
    """A model warmed up on some rows is not taken for others."""
    digests = [task_of(write(tmp_path / "a.jsonl", sums(200, start))).digest for start in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2] and digests[0]


def test_parquet(tmp_path):
    """The rows of a Parquet file are those of the same JSON lines; a damaged file keeps the rest of the data."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet_of = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1, "tests": [{"input": "a", "output": "ü"}]} for i in range(300)]
    parquet_of.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=64)
    lines = Rows(TaskConfig(), "task.data", [str(write(tmp_path / "a.jsonl", rows))])
    parquet = Rows(TaskConfig(), "task.data", [str(tmp_path / "a.parquet")])
    assert [p.entry for p in lines] == [p.entry for p in parquet] and not parquet.report
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"cut\.parquet: not readable as Parquet after row 0"):
        task_of(tmp_path / "cut.parquet")
    both = TaskConfig(data=[str(tmp_path / "cut.parquet"), str(tmp_path / "a.jsonl")])
    assert "cut.parquet: not readable as Parquet" in Task(both).notes[0]


def test_parquet_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs the package 'pyarrow': pip install 'rlcore\[parquet\]'"):
        task_of(tmp_path / "a.parquet")


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path / "a.jsonl", sums(200))
    task = task_of(path)
    path.write_text(path.read_text().replace("+", "-"))
    with pytest.raises(UserError, match=r"a\.jsonl has changed since"):
        task.prompts(0, 8, seed=0)


def test_memory_does_not_hold_the_rows(tmp_path):
    """A file of 64 MB: the index takes tens of bytes a row, not the rows."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(16_000):
            file.write(json.dumps({"prompt": f"{i} " + "x" * 4000, "answer": "1"}) + "\n")
    code = (
        "import resource, sys\n"
        "from rlcore.engine.config import TaskConfig\n"
        "from rlcore.engine.tasks import Task\n"
        "unit = 1024 if sys.platform == 'linux' else 1 << 20\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit\n"
        "before = peak()\n"
        f"task = Task(TaskConfig(data=[{str(path)!r}], held_out=10))\n"
        "assert len(task.train) > 14_000 and len(task.prompts(3, 64, 0)) == 64\n"
        "print(peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 25


def test_prompts_longer_than_the_context(tmp_path, small):
    """Stopped at, left out or cut, as configured; what is left has room for the answer."""
    tokenizer = small[1]
    rows = [{"prompt": "a" * (i % 50) + f" {i} =", "answer": "1"} for i in range(300)]
    path = write(tmp_path / "a.jsonl", rows)
    long = {row["prompt"] for row in rows if len(row["prompt"]) > 32}
    with pytest.raises(UserError, match=r"the longest prompt has 55 tokens and an answer up to 8: 63 .* context is 40"):
        task_of(path).fit(tokenizer, 40, 8)
    skip, cut, whole = (task_of(path, too_long=how, held_out=500) for how in ("skip", "cut", "error"))
    for task, done in ((skip, "left out"), (cut, "cut at their start")):
        task.fit(tokenizer, 40, 8)
        assert f"{len(long)} prompts of more than 32 tokens are {done}" in task.notes[-1]
        prompts = [p.prompt for p in [*task.train, *task.held_out]]
        assert max(map(len, encode(tokenizer, prompts))) == 32
    everything = [p.prompt for p in [*whole.train, *whole.held_out]]
    assert [p.prompt for p in [*skip.train, *skip.held_out]] == [p for p in everything if p not in long]
    assert [p.prompt for p in [*cut.train, *cut.held_out]] == [p[-32:] for p in everything]
    with pytest.raises(UserError, match="no prompts of 'data' are left"):
        task_of(path, too_long="skip").fit(tokenizer, 9, 8)


def test_chat_templates(tmp_path, small):
    tokenizer = small[1]
    path = write(tmp_path / "a.jsonl", [{"prompt": "q" * (i % 50) + str(i), "answer": "1"} for i in range(300)])
    with pytest.raises(UserError, match=r"task\.chat needs a chat template"):
        task_of(path, chat=True).fit(tokenizer, None, 8)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    raw, task = task_of(path), task_of(path, chat=True, system="Be brief.")
    task.fit(tokenizer, 1000, 8)
    assert [p.prompt for p in task.train] == [f"<s>Be brief.\n<u>{p.prompt}\n<a>" for p in raw.train]
    assert task.prompts(0, 1, 0)[0].prompt.startswith("<s>") and task.held_out[0].prompt.startswith("<s>")
    cut = task_of(path, chat=True, too_long="cut")
    cut.fit(tokenizer, 40, 8)
    expected = [f"<u>{p.prompt[-25:]}\n<a>" for p in raw.train]
    assert [p.prompt for p in cut.train] == expected
    hopeless = task_of(path, chat=True, too_long="cut", system="x" * 50)
    with pytest.raises(UserError, match="puts around a question"):
        hopeless.fit(tokenizer, 40, 8)


def test_chats_in_the_data(tmp_path, small):
    """A row may hold the chat itself; its own system message stays."""
    tokenizer = type(small[1])(tokenizer_object=small[1]._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    chat = [[{"role": "system", "content": "S"}] * (i % 2) + [{"role": "user", "content": str(i)}] for i in range(100)]
    path = write(tmp_path / "a.jsonl", [{"prompt": messages, "answer": "1"} for messages in chat])
    assert Rows(TaskConfig(chat=True), "", [str(path)]).repeated == 0
    swapped = [{"content": message["content"], "role": message["role"]} for message in chat[1]]
    again = write(tmp_path / "again.jsonl", [{"prompt": messages, "answer": "1"} for messages in (chat[1], swapped)])
    assert Rows(TaskConfig(chat=True), "", [str(again)]).repeated == 1
    task = task_of(path, chat=True, system="D", held_out=100)
    task.fit(tokenizer, 60, 8)
    expected = {f"<s>{'S' if i % 2 else 'D'}\n<u>{i}\n<a>" for i in range(100)}
    assert {p.prompt for p in [*task.train, *task.held_out]} == expected


def test_the_beginning_of_text_is_not_doubled(tmp_path, small):
    from tokenizers.processors import TemplateProcessing

    tokenizer = type(small[1])(
        tokenizer_object=small[1]._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    backend = tokenizer.backend_tokenizer
    before, backend.post_processor = (
        backend.post_processor,
        TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]),
    )
    task = task_of(write(tmp_path / "a.jsonl", sums(100)), chat=True)
    task.fit(tokenizer, 100, 8)
    ids = encode(tokenizer, [task.train[0].prompt])[0]
    backend.post_processor = before
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[0] == tokenizer.eos_token_id
    # Where the tokenizer adds none the template's stays.
    task = task_of(tmp_path / "a.jsonl", chat=True)
    task.fit(tokenizer, 100, 8)
    assert encode(tokenizer, [task.train[0].prompt])[0][0] == tokenizer.eos_token_id


def test_config_round_trip(tmp_path):
    config = Config(task=TaskConfig(data=["a.jsonl", 'b "c".parquet'], mixture={"data": 1.0, "chain_sum": 2.5}))
    config.reward.channels, config.reward.weights = {"f": r"regex:^\d+\s$"}, {"f": -0.5}
    (tmp_path / "c.toml").write_text(to_toml(validate(config)))
    assert load_toml(tmp_path / "c.toml") == config
    (tmp_path / "d.toml").write_text('[task]\ndata = "one.jsonl"\n[task.mixture]\ndata = 2\n')
    assert load_toml(tmp_path / "d.toml").task.data == ["one.jsonl"]
    (tmp_path / "e.toml").write_text('[task]\nmixture = {chain_sum = "2"}\n')
    with pytest.raises(UserError, match=r"line 2: task\.mixture\.chain_sum must be a number"):
        load_toml(tmp_path / "e.toml")


def test_a_run_on_files_resumes_bit_by_bit(tiny, tmp_path):
    """With warm start, chat-free prompts, a mixture and a user's reward; and another file is another warm start."""
    rows = [
        {"prompt": f"{i % 10}+{j % 10}=", "answer": str((i + j) % 10), "id": 1} for i in range(10) for j in range(10)
    ]
    path = write(tmp_path / "a.jsonl", [*rows, "broken"])
    changes = {
        "task__data": [str(path)], "task__mixture": {"data": 1.0, "chain_sum": 1.0}, "task__options": {},
        "reward__channels": {"correct": "verifier", "short": "regex:^.{1,2}$"}, "reward__weights": {"short": 0.5},
    }  # fmt: skip
    whole = tiny(steps=4, name="whole", **changes)
    train(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000004")
    train(tiny(steps=4, name="parts", **changes), resume=True)
    a, b = (
        [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    )
    assert a == b and [r["step"] for r in b] == list(range(5))
    assert all(math.isclose(r["reward"], r["reward/correct"] + 0.5 * r["reward/short"], abs_tol=1e-5) for r in a[1:])
    other = Task(dataclasses.replace(whole.task, data=[str(write(tmp_path / "b.jsonl", rows[:50]))]))
    assert other.digest != Task(whole.task).digest
    cpu = torch.device("cpu")
    assert fingerprint(whole, cpu, other.digest) != fingerprint(whole, cpu, Task(whole.task).digest)
