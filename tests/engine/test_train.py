"""Whole runs of a tiny model: what they leave behind, and that a run that was stopped ends like one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlcore.engine import checkpoint
from rlcore.engine.checkpoint import found
from rlcore.engine.config import Config, load_toml
from rlcore.engine.errors import Interrupted, SaveError, UserError
from rlcore.engine.logging import RunLog, read
from rlcore.engine.run import RunDirectory, name_run
from rlcore.engine.trainer import StopSignal, learning_rate, repeatable, train


def path_of(config: Config) -> Path:
    return Path(config.dir) / config.name


def outcome(config: Config) -> tuple:
    """Everything of a finished run that must not depend on interruptions."""
    path = path_of(config)
    last = found(path / "checkpoints")[-1]
    files = {str(f.relative_to(last)): f.read_bytes() for f in sorted(last.rglob("*")) if f.is_file()}
    metrics = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read(path / "metrics.jsonl")]
    return last.name, files, metrics, (path / "samples.jsonl").read_bytes()


def assert_same_outcome(config: Config, reference: tuple) -> None:
    name, files, metrics, samples = outcome(config)
    assert name == reference[0]
    # The names of what differs: pytest prints whole files otherwise.
    differ = {path for path in files.keys() | reference[1].keys() if files.get(path) != reference[1].get(path)}
    assert not differ
    assert [record["step"] for record in metrics] == list(range(config.steps + 1))
    assert metrics == reference[2]
    assert samples == reference[3]


@pytest.fixture(scope="module")
def uninterrupted(model_cache, tmp_path_factory):
    """Runs a config once without interruption and keeps the outcome."""
    known: dict[str, tuple[tuple, float]] = {}

    def run(config: Config) -> tuple[tuple, float]:
        twin = dataclasses.replace(config, dir="", name="twin")
        if repr(twin) not in known:
            twin_run = dataclasses.replace(twin, dir=str(tmp_path_factory.mktemp("twin")))
            start = time.monotonic()
            train(twin_run)
            known[repr(twin)] = outcome(twin_run), time.monotonic() - start
        return known[repr(twin)]

    return run


def in_child(config: Config, resume: bool, kill_after: float | None = None) -> int:
    """Trains in a forked process, killed with SIGKILL after a time; its exit code, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            train(config, resume)
            code = 0
        except SaveError:
            code = 3
        except Interrupted:
            code = 130
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def started(config: Config) -> bool:
    return (path_of(config) / "config.toml").exists()


def test_files_of_a_run(tiny, capsys):
    config = tiny()
    train(config)
    path = path_of(config)
    records = read(path / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in records if "eval/accuracy" in record] == [0, 2, 4]
    for record in records[1:]:
        assert record["mismatch_max"] < 5e-5
        assert record["policy/tokens"] > 0 and record["policy/grad_norm"] >= 0
        assert record["lr"] == learning_rate(config, record["step"])
    assert load_toml(path / "config.toml") == config
    assert len((path / "samples.jsonl").read_text().splitlines()) == 4 * config.log_samples
    assert json.loads((path / "samples.jsonl").read_text().splitlines()[0]).keys() == {
        "step", "prompt", "answer", "reference", "reward", "advantage",
    }  # fmt: skip
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((path / "tensorboard").glob("events.*"))
    assert [c.name for c in found(path / "checkpoints")] == ["step-000002", "step-000004"]
    out = capsys.readouterr().out
    assert "before" in out and "after" in out and "curves.png" in out and "prefix trees" in out


@pytest.mark.parametrize("method", ["rloo", "reinforce_pp"])
def test_other_methods_run(tiny, method):
    config = tiny(method=method, steps=2)
    train(config)
    assert len(read(path_of(config) / "metrics.jsonl")) == 3


def test_layouts_train_alike(tiny):
    """Three steps through trees and through padded rows: the same samples and nearly the same weights."""
    trees, padded = tiny(name="tree", steps=3), tiny(name="padded", steps=3, update__layout="padded")
    for config in (trees, padded):
        train(config)
    a, b = (load_file(found(path_of(c) / "checkpoints")[-1] / "model" / "model.safetensors") for c in (trees, padded))
    start = load_file(found(path_of(trees) / "checkpoints")[0] / "model" / "model.safetensors")
    for name in a:
        moved = (a[name] - start[name]).norm()
        assert (a[name] - b[name]).norm() <= 0.02 * moved + 1e-5


def test_two_runs_with_one_seed_are_equal(tiny, uninterrupted):
    reference, _ = uninterrupted(tiny())
    config = tiny()
    train(config)
    assert_same_outcome(config, reference)


def test_resume_from_every_checkpoint(tiny, uninterrupted):
    """Stopped after each step in turn, by the stop signal, and taken up again."""
    reference, _ = uninterrupted(tiny())
    for last in (1, 2, 3):
        config = tiny(name=f"stopped-{last}")

        def stop_at(log, step, record, last=last, write=RunLog.step):
            write(log, step, record)
            if step == last:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunLog, "step", stop_at)
            with pytest.raises(Interrupted, match=f"after step {last}.*--resume"):
                train(config)
        train(config, resume=True)
        assert_same_outcome(config, reference)


def kill_and_resume(config: Config, reference: tuple, duration: float, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        if in_child(config, resume=started(config), kill_after=rng.uniform(0.0, duration)) == 0:
            break
    train(config, resume=started(config))
    assert_same_outcome(config, reference)
    assert not list(path_of(config).rglob("*.tmp*"))


@pytest.mark.parametrize("seed", range(3))
def test_kill_at_random_moments(tiny, uninterrupted, seed, tmp_path):
    """Nothing is cached here: the warm start may be what is killed."""
    reference, duration = uninterrupted(tiny())
    config = tiny(model__cache=str(tmp_path / "cache"))
    kill_and_resume(config, reference, duration, kills=3, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 125))
def test_kill_at_many_random_moments(tiny, uninterrupted, seed):
    config = tiny(steps=8, checkpoint_every=3, method=("grpo", "reinforce_pp")[seed % 2])
    reference, duration = uninterrupted(config)
    kill_and_resume(config, reference, duration, kills=5, seed=seed)


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14, 23, 24, 25, 37])
def test_kill_at_a_write(tiny, uninterrupted, at):
    """The process dies at its n-th sync or rename, wherever that is, and the run is taken up again."""
    reference, _ = uninterrupted(tiny())
    config = tiny()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        count = 0

        def deadly(call):
            def counted(*args):
                nonlocal count
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)

            return counted

        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        try:
            train(config)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    train(config, resume=started(config))
    assert_same_outcome(config, reference)


def test_half_written_last_lines_are_cut_off(tiny, uninterrupted):
    reference, _ = uninterrupted(tiny())
    config = tiny()
    train(config)
    path = path_of(config)
    checkpoint.shutil.rmtree(path / "checkpoints" / "step-000004")
    for name in ("metrics.jsonl", "samples.jsonl"):
        text = (path / name).read_bytes()
        (path / name).write_bytes(text[: -len(text) // 9])
    train(config, resume=True)
    assert_same_outcome(config, reference)


def test_damaged_checkpoint_is_passed_over(tiny, uninterrupted, capsys):
    reference, _ = uninterrupted(tiny())
    config = tiny()
    train(config)
    newest = found(path_of(config) / "checkpoints")[-1]
    (newest / "model" / "model.safetensors").write_bytes(b"short")
    train(config, resume=True)
    assert f"skipping {newest}: model/model.safetensors is cut short" in capsys.readouterr().out
    assert_same_outcome(config, reference)


def test_resume_of_a_finished_run_changes_nothing(tiny, uninterrupted):
    reference, _ = uninterrupted(tiny())
    config = tiny()
    train(config)
    train(config, resume=True)
    assert_same_outcome(config, reference)


def test_two_runs_in_one_directory_are_refused(tiny):
    config = tiny()
    with RunDirectory(path_of(config), config, resume=False), pytest.raises(UserError, match="in use"):
        train(config, resume=True)
    with pytest.raises(UserError, match="--resume"):
        train(config)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_any_model_by_path(tiny, small, tmp_path, capsys, dropout):
    """A model of another architecture, stored with its tokenizer in Hugging Face format."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "attn_pdrop": dropout, "embd_pdrop": dropout}
    GPT2LMHeadModel(GPT2Config(vocab_size=99, **shape)).save_pretrained(tmp_path / "gpt2")
    small[1].save_pretrained(tmp_path / "gpt2")
    config = tiny(steps=2, model__path=str(tmp_path / "gpt2"))
    train(config)
    out = capsys.readouterr().out
    assert "GPT2LMHeadModel" in out and "warm start" not in out
    assert read(path_of(config) / "metrics.jsonl")[-1]["mismatch_max"] < 5e-5


def test_padded_batches_are_said_aloud(tiny, monkeypatch, capsys):
    def refuse(model):
        raise ValueError("it has a window of seven")

    monkeypatch.setattr("rlcore.attach", refuse)
    train(tiny(steps=1))
    out = capsys.readouterr().out
    assert "padded batches, because prefix trees are not exact for this model: it has a window of seven" in out


def test_names(tiny, tmp_path):
    config = tiny(name="", seed=3)
    first = name_run(config)
    assert first.name == "chain_sum-grpo-seed3"
    (tmp_path / first.name).mkdir()
    assert name_run(config).name == "chain_sum-grpo-seed3-2"
    assert name_run(dataclasses.replace(config, shuffle_rewards=True)).name.endswith("-shuffled")
    assert name_run(tiny(name="mine")).name == "mine"


def test_shuffled_rewards_change_the_update_but_not_what_is_reported(tiny):
    plain, control = tiny(name="plain", steps=1), tiny(name="control", steps=1, shuffle_rewards=True)
    for config in (plain, control):
        train(config)
    a, b = (read(path_of(config) / "metrics.jsonl") for config in (plain, control))
    assert a[0]["eval/accuracy"] == b[0]["eval/accuracy"]
    assert (a[1]["reward"], a[1]["accuracy"]) == (b[1]["reward"], b[1]["accuracy"])


def test_full_disk_in_a_run(tiny):
    """A limit on file size stops the run with a SaveError; the run can be resumed once there is room."""
    import resource

    config = tiny()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        code = 1
        try:
            train(config)
        except SaveError:
            code = 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert in_child(config, resume=True) == 0


def test_read_only_directory(tiny, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SaveError, match="Permission denied"):
        train(tiny())


def test_learning_rate(tiny):
    config = tiny(steps=101, update__lr=1.0, update__warmup=4, update__final_lr=0.1)
    rates = [learning_rate(config, step) for step in range(1, 102)]
    assert rates[0] == 0.25 and rates[-1] == pytest.approx(0.1) and rates[50] == pytest.approx(0.55)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_a_second_signal_stops_at_once():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_torch_settings_come_back(tiny):
    def settings():
        return torch.get_num_threads(), torch.get_deterministic_debug_mode()

    before = settings()
    with repeatable(tiny(threads=2)):
        assert settings()[0] == 2 and settings()[1] > 0
    assert settings() == before
