"""Bad input through the command line: one sentence, the documented exit code, and a saved run that keeps every byte."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlcore as rl
from rlcore.cli import main
from rlcore.engine import checkpoint, trainer
from rlcore.engine.checkpoint import found
from rlcore.engine.config import Config
from rlcore.engine.config_file import flatten, load_toml, to_toml
from rlcore.engine.config_rules import validate
from rlcore.engine.errors import UserError
from rlcore.engine.records import read
from rlcore.engine.run import RunDirectory

Command = Callable[..., int]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model_cache_of_module) -> Path:
    """A run of two steps, as it lies on the disk; tests work on copies."""
    at = tmp_path_factory.mktemp("saved")
    assert main(["train", *options(at, model_cache_of_module)]) == 0
    return at / "run"


@pytest.fixture(scope="module")
def model_cache_of_module(model_cache) -> Path:
    return model_cache


def options(directory: Path, cache: Path, *more: str) -> list[str]:
    """A run of a second or two."""
    given = {
        "dir": directory, "name": "run", "device": "cpu", "threads": 1, "steps": 2, "checkpoint-every": 1,
        "task.pool": 2000, "task.held-out": 10, "model.hidden-size": 32, "model.heads": 2, "model.warm-steps": 60,
        "model.warm-batch": 32, "model.warm-lr": 1e-2, "model.cache": cache, "rollout.prompts": 4,
        "rollout.samples": 4, "update.micro-tokens": 40, "eval.samples": 2,
    }  # fmt: skip
    return [*(text for key, value in given.items() for text in (f"--{key}", str(value))), *more]


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def digests(run: Path) -> dict[str, str]:
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def refused(capsys, *arguments: object, code: int = 2, command: str = "train") -> str:
    """The one sentence of a command that ends with this exit code."""
    capsys.readouterr()
    assert main([command, *map(str, arguments)]) == code
    message = capsys.readouterr().err
    assert message.startswith("rlcore: ") and message.count("\n") == 1 and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--seed", "5"], "seed 0 -> 5"),
        (["--model.hidden-size", "64"], "model.hidden_size 32 -> 64"),
        (["--model.path", "/nope"], "model.path"),
        (["--task.name", "spell_backward"], "task.name"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "many"], "--steps must be an integer"),
        (["--stepz", "3"], "--steps"),
        (["--method", "gpro"], "grpo"),
        (["--name", "other"], "leave --dir and --name out"),
        (["--config", "/nope.toml"], "/nope.toml"),
        (["--device", "cuda:99"], "device"),
        (["--rollout.max-new-tokens", "5000", "--steps", "3"], "context"),
    ],
)
def test_a_mistake_on_resume_costs_nothing(capsys, run, arguments, part):
    before = digests(run)
    assert part in refused(capsys, "--resume", run, *arguments)
    assert digests(run) == before


@pytest.mark.parametrize("content", ["steps = 'x'\n", "stepz = 1\n", "[update]\nlr = -1\n", "steps = \n", "[[\n"])
def test_a_mistake_in_a_file_costs_nothing(capsys, run, tmp_path, content):
    """In a file of the user's, and in the run's own config.toml that somebody edited."""
    (tmp_path / "mine.toml").write_text(content)
    before = digests(run)
    assert "mine.toml" in refused(capsys, "--resume", run, "--config", tmp_path / "mine.toml")
    assert digests(run) == before
    (run / "config.toml").write_text(content)
    before = digests(run)
    assert "config.toml" in refused(capsys, "--resume", run)
    assert digests(run) == before


def test_resume_of_what_is_no_run(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "file", tmp_path / "empty", tmp_path / "nothing", ""):
        assert "is not the directory of a run" in refused(capsys, "--resume", path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_finished_run_says_so(capsys, run):
    before = digests(run / "checkpoints")
    assert main(["train", "--resume", str(run)]) == 0
    assert "finished already" in capsys.readouterr().out
    assert digests(run / "checkpoints") == before and len(read(run / "metrics.jsonl")) == 3


def test_a_second_run_under_one_name(capsys, run, model_cache):
    before = digests(run)
    assert "holds a run already" in refused(capsys, *options(run.parent, model_cache))
    with RunDirectory(run, load_toml(run / "config.toml", Config(dir=str(run.parent), name="run")), resume=True):
        assert "in use by another process" in refused(capsys, "--resume", run)
    assert digests(run) == before


def test_a_checkpoint_of_another_version(capsys, run):
    manifest = found(run / "checkpoints")[-1] / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    before = digests(run)
    message = refused(capsys, "--resume", run, "--steps", "3")
    assert "format 99" in message and f"reads {checkpoint.VERSION}" in message
    assert digests(run) == before


def test_a_checkpoint_of_another_model(capsys, run):
    """config.toml was edited; the keys that differ are named."""
    config = run / "config.toml"
    config.write_text(
        config.read_text().replace("hidden_size = 32", "hidden_size = 64").replace("layers = 2", "layers = 3")
    )
    before = digests(run)
    message = refused(capsys, "--resume", run, "--steps", "3")
    assert (
        "model.hidden_size is 32 there and 64 in the config" in message and "model.layers is 2 there and 3" in message
    )
    assert digests(run) == before


def test_a_config_edited_between_resumes(capsys, run):
    """What a run is stands in its checkpoints too: another seed, task or kind of model is told, not trained on."""
    text = (run / "config.toml").read_text()
    for old, new, told in (
        ("seed = 0\ndevice", "seed = 1\ndevice", "seed is 0 there and 1 in the config"),
        ("lora_rank = 0", "lora_rank = 4", "model.lora_rank is 0 there and 4"),
        ('options = {}', 'options = { "max_digits" = "1" }', "task.options is {} there and {'max_digits': '1'}"),
    ):
        assert text.count(old) == 1
        (run / "config.toml").write_text(text.replace(old, new))
        before = digests(run)
        assert told in refused(capsys, "--resume", run, "--steps", "3")
        assert told in refused(capsys, run, command="eval")
        assert digests(run) == before
    (run / "config.toml").write_text(text.replace("lr = 0.0015", "lr = 0.002"))
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0


def test_a_full_disk(capsys, run, monkeypatch):
    """The first write that fails ends the run; what was saved before stays, and the run goes on once there is room."""
    before = digests(run / "checkpoints")

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_model", full)
        assert "No space left" in refused(capsys, "--resume", run, "--steps", "3", code=3)
    assert before.items() <= digests(run / "checkpoints").items()
    assert main(["train", "--resume", str(run)]) == 0
    assert [record["step"] for record in read(run / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_directory_for_reading_only(capsys, run, model_cache, monkeypatch):
    open_ = Path.open

    def locked(path, mode="r", *arguments, **named):
        if set(mode) & set("wa+") and run in path.parents:
            raise PermissionError(errno.EROFS, "Read-only file system")
        return open_(path, mode, *arguments, **named)

    before = digests(run)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", locked)
        assert "Read-only file system" in refused(capsys, "--resume", run, "--steps", "3", code=3)
    assert digests(run) == before
    (run.parent / "file").write_text("x")
    assert "cannot write" in refused(capsys, *options(run.parent / "file", model_cache), code=3)
    if Path("/proc/self").exists():
        assert "cannot write" in refused(capsys, *options(Path("/proc"), model_cache), code=3)


def test_no_tokens_are_an_error():
    """N = 0: there is nothing to take a mean of."""
    empty = torch.zeros(0)
    with pytest.raises(ValueError, match=r"target: expected at least one token; got shape \(0,\)"):
        rl.TokenBatch(empty.long(), torch.zeros(1, dtype=torch.int64), advantage=empty)


def test_an_all_masked_micro_batch_is_no_error():
    """Loss 0 and gradient 0, alone and beside a micro-batch that counts."""
    logp = torch.randn(4, requires_grad=True)
    batch = rl.TokenBatch(
        torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4]), mask=torch.zeros(4, dtype=torch.bool),
        advantage=torch.ones(4),
    )  # fmt: skip
    loss, _ = rl.policy_loss(logp, batch, rl.Objective())
    loss.backward()
    assert loss == 0 and torch.equal(logp.grad, torch.zeros(4))


def test_masked_answers_in_a_run(capsys, tmp_path, model_cache, monkeypatch):
    """Every answer of one token is cut short; with the filter on, nothing is left that counts, and nothing moves."""
    filtered = ["--rollout.overlong-filter", "--rollout.max-new-tokens", "1", "--task.options", "max_digits", "1"]
    assert main(["train", *options(tmp_path, model_cache, *filtered)]) == 0
    last = read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["finished"] < 1


def test_a_group_of_one_is_no_error(capsys, tmp_path, model_cache):
    """Its centred advantage is 0; a method without groups learns from it."""
    single = ["--rollout.samples", "1"]
    assert main(["train", *options(tmp_path, model_cache, *single, "--method", "reinforce_pp")]) == 0
    assert [record["step"] for record in read(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    advantage = rl.group_advantage(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]))
    assert advantage[2] == 0 and advantage[0] > 0


PHASES = ("roll_out", "evaluate", "checkpoint.save", "learn", "warm_start")


def interrupt_in(monkeypatch, phase: str, number: int, times: int) -> None:
    """Signals to this process when a phase is entered for the first time."""
    from rlcore.engine import model as models
    from rlcore.engine import update

    owner, name = {
        "roll_out": (trainer, "answers_of_step"),
        "evaluate": (trainer, "evaluate"),
        "checkpoint.save": (checkpoint, "save_model"),
        "learn": (update.Learner, "learn"),
        "warm_start": (models, "warm_start"),
    }[phase]  # fmt: skip
    original, calls = getattr(owner, name), []
    # A shell's background job starts with SIGINT ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def entered(*arguments, **named):
        calls.append(1)
        if len(calls) == 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, entered)


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(capsys, saved, tmp_path, model_cache, monkeypatch, phase, number, times):
    """Exit code 130, a command that goes on, and then the very run that nothing interrupted; at once if sent twice."""
    cache = tmp_path / "cache" if phase == "warm_start" else model_cache
    with monkeypatch.context() as patch:
        interrupt_in(patch, phase, number, times)
        arguments = options(tmp_path, cache)
        assert main(["train", *arguments]) == 130
    message = capsys.readouterr().err
    assert f"rlcore train --resume {tmp_path / 'run'}" in message and "Traceback" not in message
    assert main(["train", "--resume", str(tmp_path / "run"), "--model.cache", str(model_cache)]) == 0
    ours, theirs = (found(at / "checkpoints")[-1] for at in (tmp_path / "run", saved))
    assert ours.name == theirs.name == "step-000002"
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    assert [record["step"] for record in read(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


KEYS = [*flatten(Config()), "task", "update", "updat", "lr", "x.y.z", ""]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 300) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["auto", "tree", "grpo", "none", "k3", "/", "~x", "{question}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def spelled(value: object) -> str:
    """A value as TOML; None as text, since TOML has none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{spelled(key)} = {spelled(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(spelled, value)) + "]"
    if isinstance(value, float):
        return repr(value).replace("e", "e" if "." in repr(value) else ".0e") if value - value == 0 else repr(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else json.dumps(str(value)).replace("\x7f", "\\u007f")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_value_at_any_key(tmp_path, values):
    """A valid config that reads back equal, or a UserError of one line; never another exception."""
    lines = [f"{'.'.join(spelled(part) for part in key.split('.'))} = {spelled(v)}" for key, v in values.items()]
    path = tmp_path / "any.toml"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        config = validate(load_toml(path))
    except UserError as error:
        assert "\n" not in str(error)
        return
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_toml(path) == config


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60) | st.text(alphabet="[]{}=.'\"#\n\r\\ \ufeffabsteup1-+einf_:TZ", max_size=60).map(str.encode)
)
def test_any_bytes(tmp_path, content):
    path = tmp_path / "any.toml"
    path.write_bytes(content)
    try:
        validate(load_toml(path))
    except UserError as error:
        assert "any.toml" in str(error)
