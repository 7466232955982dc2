"""Whole runs of a tiny model: what they leave behind, and that a run that was stopped ends like one that was not."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlcore.engine import checkpoint
from rlcore.engine.checkpoint import found
from rlcore.engine.config import Config
from rlcore.engine.config_file import load_toml
from rlcore.engine.errors import Interrupted, SaveError, UserError
from rlcore.engine.logging import RunLog, read
from rlcore.engine.model import fingerprint
from rlcore.engine.run import RunDirectory, name_run
from rlcore.engine.schedule import learning_rate
from rlcore.engine.trainer import StopSignal, repeatable, train


def path_of(config: Config) -> Path:
    return Path(config.dir) / config.name


def outcome(config: Config) -> tuple:
    """Everything of a finished run that must not depend on interruptions."""
    path = path_of(config)
    last = found(path / "checkpoints")[-1]
    files = {str(f.relative_to(last)): f.read_bytes() for f in sorted(last.rglob("*")) if f.is_file()}
    metrics = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read(path / "metrics.jsonl")]
    return last.name, files, metrics, (path / "samples.jsonl").read_bytes()


def assert_learned_from(config: Config) -> None:
    """Equal bytes say something only where there were rewards, gradients and other weights in the end."""
    records = read(path_of(config) / "metrics.jsonl")[1:]
    assert all(record["reward"] > 0 and record["policy/grad_norm"] > 0 for record in records)
    first, *_, last = found(path_of(config) / "checkpoints")
    a, b = (load_file(checkpoint / "model" / "model.safetensors") for checkpoint in (first, last))
    assert all(not torch.equal(a[name], b[name]) for name in a if "embed" in name or "proj" in name)


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
            assert_learned_from(twin_run)
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
    assert load_toml(path / "config.toml", Config(name=config.name, dir=config.dir)) == config
    assert {"policy/loss", "policy/tokens", "policy/ratio_min", "policy/ess"} <= records[1].keys()
    assert not {"policy/policy_loss", "policy/weight_sum", "policy/weight_sq_sum"} & records[1].keys()
    assert records[1]["policy/tokens"] == records[1]["length"] * 36
    assert len((path / "samples.jsonl").read_text().splitlines()) == 4 * config.log_samples
    assert json.loads((path / "samples.jsonl").read_text().splitlines()[0]).keys() == {
        "step", "prompt", "answer", "reference", "reward", "tokens", "logp", "entropy", "advantage",
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
    trees = tiny(name="tree", steps=3, keep=9)
    train(trees)
    beginning = found(path_of(trees) / "checkpoints")[0] / "model"
    padded = tiny(name="padded", steps=3, update__layout="padded", model__path=str(beginning))
    train(padded)
    a, b = (load_file(found(path_of(c) / "checkpoints")[-1] / "model" / "model.safetensors") for c in (trees, padded))
    start = load_file(beginning / "model.safetensors")
    assert beginning.parent.name == "step-000000"
    for name in a:
        moved = (a[name] - start[name]).norm()
        assert (a[name] - b[name]).norm() <= 0.02 * moved + 1e-5


def test_two_runs_with_one_seed_are_equal(tiny, uninterrupted):
    reference, _ = uninterrupted(tiny())
    config = tiny()
    train(config)
    assert_same_outcome(config, reference)


def stopper(after: int, write=RunLog.step):
    """A RunLog.step that sends the stop signal after a step."""

    def step_and_stop(log, step, record):
        write(log, step, record)
        if step == after:
            os.kill(os.getpid(), signal.SIGINT)

    return step_and_stop


def test_resume_from_every_checkpoint(tiny, uninterrupted):
    """Stopped after each step in turn, by the stop signal, and taken up again."""
    reference, _ = uninterrupted(tiny())
    for last in (1, 2, 3):
        config = tiny(name=f"stopped-{last}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunLog, "step", stopper(after=last))
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


def test_resume_of_a_finished_run_changes_nothing(tiny, uninterrupted, capsys):
    reference, _ = uninterrupted(tiny())
    config = tiny()
    train(config)
    capsys.readouterr()
    train(config, resume=True)
    assert_same_outcome(config, reference)
    out = capsys.readouterr().out
    assert "finished already" in out and "from step" not in out and "changes" not in out


def test_damaged_checkpoints_do_not_push_good_ones_out(tiny, uninterrupted):
    """Two newer ones that can not be loaded, and room for one: the resumed run's own is what stays."""
    config = tiny(keep=3)
    train(config)
    path = path_of(config) / "checkpoints"
    for step in (2, 4):
        (path / f"step-{step:06d}" / "optimizer.safetensors").write_bytes(b"")
    config = dataclasses.replace(config, keep=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "step", stopper(after=1))
        with pytest.raises(Interrupted):
            train(config, resume=True)
    assert [directory.name for directory in found(path)] == ["step-000001"]
    assert len(list(path.glob("*.damaged"))) == 2
    train(config, resume=True)
    assert [directory.name for directory in found(path)] == ["step-000004"]
    metrics = outcome(config)[2]
    assert metrics == uninterrupted(tiny())[0][2]


def test_metrics_without_a_checkpoint_are_kept(tiny, uninterrupted, capsys):
    """All checkpoints of a finished run are lost: it starts again, says so, and overwrites nothing."""
    reference, _ = uninterrupted(tiny())
    config = tiny()
    for number in (1, 2):
        train(config, resume=number > 1)
        old = {name: (path_of(config) / f"{name}.jsonl").read_bytes() for name in ("metrics", "samples")}
        for directory in found(path_of(config) / "checkpoints"):
            (directory / "manifest.json").unlink()
    capsys.readouterr()
    train(config, resume=True)
    assert "steps up to 4 but no usable checkpoint" in capsys.readouterr().out
    for name, content in old.items():
        assert (path_of(config) / f"{name}.jsonl.old2").read_bytes() == content
        assert (path_of(config) / f"{name}.jsonl.old1").exists()
    assert_same_outcome(config, reference)


def test_finished_run_without_metrics(tiny, capsys):
    config = tiny(steps=1)
    train(config)
    (path_of(config) / "metrics.jsonl").unlink()
    capsys.readouterr()
    train(config, resume=True)
    assert "held-out accuracy: unknown before, unknown after" in capsys.readouterr().out


def test_changes_on_resume(tiny, capsys):
    """What can change is named and stored; what would make it another run is refused and spoils nothing."""
    config = tiny(steps=1)
    train(config)
    path = path_of(config)
    before = (path / "config.toml").read_bytes()
    for changes, named in (
        ({"seed": 5}, "seed 0 -> 5"),
        ({"task__name": "chain_smu"}, "task.name 'chain_sum' -> 'chain_smu'"),
        ({"model__layers": 3}, "model.layers 2 -> 3"),
        ({"device": "cuda:99"}, "device"),
        ({"update__layout": "tree", "rollout__max_new_tokens": 5000}, "context"),
    ):
        with pytest.raises(UserError, match=named):
            train(tiny(**{"steps": 1, **changes}), resume=True)
        assert (path / "config.toml").read_bytes() == before
    capsys.readouterr()
    changed = tiny(steps=2, update__lr=1e-3, model__cache="elsewhere")
    train(changed, resume=True)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed with changes: "))
    assert "steps 1 -> 2" in line and "update.lr 0.0015 -> 0.001" in line and "model.cache" in line
    assert load_toml(path / "config.toml", Config(name=changed.name, dir=changed.dir)) == changed
    # A damaged checkpoint and a mistake at once: the config stays, so that the run can still be taken up.
    path.joinpath("metrics.jsonl").unlink()
    with pytest.raises(UserError, match="context"):
        train(tiny(steps=2, rollout__max_new_tokens=5000), resume=True)
    train(changed, resume=True)


def test_stopping_is_decided_once_per_step(tiny, monkeypatch):
    """Whenever the signal comes, the step that it stops after is the one that was saved."""

    class Late(StopSignal):
        reads = 0

        @property
        def requested(self) -> bool:
            self.reads += 1
            return self.reads >= 3

    monkeypatch.setattr("rlcore.engine.trainer.StopSignal", Late)
    config = tiny(checkpoint_every=1000)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    newest = found(path_of(config) / "checkpoints")[-1]
    assert f"after step {int(newest.name[-6:])}." in str(stopped.value)


@pytest.mark.parametrize("step", [None, 1])
def test_stopped_at_once(tiny, monkeypatch, step):
    """The message names the run, and the last checkpoint where there is one."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    where = "rlcore.engine.trainer." + ("load_start" if step is None else "roll_out")
    monkeypatch.setattr(where, interrupt)
    config = tiny(name="a run")
    known = "no checkpoint yet" if step is None else "step-000000"
    with pytest.raises(Interrupted, match=f"{known}.*--resume '.*a run'"):
        train(config)


def test_two_runs_in_one_directory_are_refused(tiny):
    config = tiny()
    with RunDirectory(path_of(config), config, resume=False), pytest.raises(UserError, match="in use"):
        train(config, resume=True)
    with pytest.raises(UserError, match="--resume"):
        train(config)
    other = tiny(name="other", steps=1)
    train(other)
    (path_of(other) / "config.toml").unlink()
    with pytest.raises(UserError, match="holds a run already"):
        train(other)


def test_where_locks_do_not_work(tiny, monkeypatch):
    """Not every refusal of a lock is another process."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(SaveError, match="No locks available"):
        train(tiny())


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
    assert "GPT2LMHeadModel" in out and "warm start" not in out and "prefix trees" in out
    assert read(path_of(config) / "metrics.jsonl")[-1]["mismatch_max"] < 5e-5


@pytest.mark.parametrize(("shape", "named"), [({"n_positions": 16}, "24.*16"), ({"vocab_size": 50}, "99.*50")])
def test_models_that_do_not_fit_are_refused(tiny, small, tmp_path, shape, named):
    """Prompt and answer beyond the context, and tokens without an embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_positions": 64, "vocab_size": 99, **shape}
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, **shape)).save_pretrained(tmp_path / "gpt2")
    small[1].save_pretrained(tmp_path / "gpt2")
    config = tiny(model__path=str(tmp_path / "gpt2"), rollout__max_new_tokens=17)
    with pytest.raises(UserError, match=named):
        train(config)


def test_a_model_that_is_nowhere_is_refused_at_once(tiny, monkeypatch):
    """One question to the hub, not a minute of retries."""
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network\nmany lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'nope'.*: no network$"):
        train(tiny(model__path="nope"))
    assert time.monotonic() - start < 20


def test_a_warm_start_that_falls_short_says_so(tiny, tmp_path, capsys):
    config = tiny(steps=1, model__warm_steps=3, model__cache=str(tmp_path / "cache"))
    train(config)
    assert re.search(r"stopped at 3 steps with [\d.]+%, target 40%", capsys.readouterr().out)


def test_fingerprint(tiny, monkeypatch):
    """Another layout or another version of what makes the weights: another warm start."""
    cpu = torch.device("cpu")
    names = {fingerprint(config, cpu) for config in (tiny(), tiny(update__layout="padded"), tiny(seed=1))}
    monkeypatch.setattr(torch, "__version__", "0")
    names.add(fingerprint(tiny(), cpu))
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 0")
    names.add(fingerprint(tiny(), cpu))
    assert len(names) == 5
    assert fingerprint(tiny(update__lr=1.0), cpu) in names


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
