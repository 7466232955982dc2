"""The command line: exit codes, one sentence for a user's mistake, kill -9 and --resume through real processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlcore
from rlcore.cli import COMMANDS, main
from rlcore.engine.checkpoint import found
from rlcore.engine.config import Config
from rlcore.engine.config_file import load_toml, to_toml
from rlcore.engine.logging import read

COMMAND = [sys.executable, "-m", "rlcore.cli"]


def fails(capsys, *arguments: str, command: str = "train") -> str:
    """The message of a command that ends with exit code 2: one sentence, no traceback."""
    assert main([command, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("rlcore: ") and message.count("\n") == 1 and "Traceback" not in message
    return message


def test_user_mistakes(capsys, tiny, tmp_path):
    assert "--resume" in fails(capsys, "--resume", str(tmp_path / "nothing"))
    assert "nothing.toml" in fails(capsys, "--config", str(tmp_path / "nothing.toml"))
    bad = tmp_path / "bad.toml"
    bad.write_text("[update]\nlearning_rates = 3\n")
    assert "line 2" in fails(capsys, "--config", str(bad))
    assert "steps must be at least 1" in fails(capsys, "--steps", "0")
    at = ["--dir", str(tmp_path / "runs")]
    assert "grpo, rloo, reinforce_pp" in fails(capsys, *at, "--method", "grop")
    assert "chain_sum" in fails(capsys, *at, "--task.name", "chainsum", "--name", "a")
    assert "model.path" in fails(capsys, *at, "--model.path", str(tmp_path / "no-model"), "--name", "b")
    assert "device" in fails(capsys, *at, "--device", "cuda:99", "--name", "c")
    assert len(fails(capsys, *at, "--device", "mps", "--name", "c")) < 300
    assert "there is no directory" in fails(capsys, *at, "--model.path", "/nope/model", "--name", "d")
    assert "{question}" in fails(capsys, *at, "--task.template", "{foo}", "--name", "e")
    assert "plain name" in fails(capsys, *at, "--name", "../../escape")
    for method in ("grpo", "rloo"):
        assert "rollout.samples" in fails(capsys, *at, "--method", method, "--rollout.samples", "1")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/config.toml"))


def test_a_mistake_does_not_take_the_name(capsys, tmp_path):
    """A run that never started leaves no directory that the corrected command would trip over."""
    at = ["--dir", str(tmp_path), "--name", "run"]
    fails(capsys, *at, "--task.name", "chainsum")
    fails(capsys, *at, "--model.path", str(tmp_path / "no-model"))
    assert not (tmp_path / "run" / "config.toml").exists()


def test_commands(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["--help"]) == 0
    assert "rlcore train --help" in capsys.readouterr().out
    assert main([]) == 0
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err
    assert "did you mean train?" in fails(capsys, command="trian")
    assert main(["backends"]) == 0
    assert "reference" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    assert f"rlcore {command}" in capsys.readouterr().out
    assert "--nonsense" in fails(capsys, "--nonsense", command=command)


def test_methods(capsys):
    import rlcore

    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for method in rlcore.methods().values():
        for part in (method.key, method.title, method.paper, method.formula, *method.needs, *method.defaults):
            assert part in text


def test_exit_codes_are_in_the_help(capsys):
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("exit codes: 0 done", "2 a mistake", "3 the machine could not", "130 interrupted", *COMMANDS):
        assert part in text


def test_a_reader_that_leaves(tmp_path):
    """`rlcore methods | head -0`: one sentence, no traceback."""
    process = subprocess.run(
        f"{sys.executable} -m rlcore.cli methods | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert process.returncode in (0, 3) and "Traceback" not in process.stderr and "Exception" not in process.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_is_full():
    process = subprocess.run(
        f"{sys.executable} -m rlcore.cli methods > /dev/full",
        shell=True, capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert process.returncode == 3 and "No space left" in process.stderr and "Traceback" not in process.stderr


def test_out_of_memory_is_one_sentence(capsys, monkeypatch):
    import torch

    from rlcore.engine import trainer

    def allocate(config, resume):
        torch.empty(2**62, dtype=torch.int8)

    monkeypatch.setattr(trainer, "train", allocate)
    assert main(["train", "--name", "x"]) == 3
    assert "not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--update.epoch 2", ["--update.epoch;", "--update.epochs"]),
        ("--lr 3", ["--update.lr", "--lr;"]),
        ("--rollout.lr 3", ["--update.lr"]),
        ("--updates.epochs 3", ["--update.epochs"]),
        ("--no-shuffle-reward", ["--no-shuffle-rewards"]),
        ("--zzz", ["--zzz", "--help"]),
        ("--steps x", ["--steps must be an integer, got 'x'"]),
        ("--steps 1.5", ["--steps must be an integer, got '1.5'"]),
        ("--update.lr=fast", ["--update.lr must be a number, got 'fast'"]),
        ("--update.clip_low low", ["--update.clip-low must be a number, got 'low'"]),
        ("--steps", ["--steps"]),
        ("--update.layout tre", ["auto", "tree", "padded", "'tre'"]),
        ("--task.options alone", ["--task.options must be KEY VALUE pairs, got 'alone'"]),
        ("here there", ["here, there"]),
        ("--update.lr nan", ["update.lr", "greater than 0"]),
        ("--update.lr inf", ["update.lr", "finite", "inf"]),
        ("--steps 3 --steps x", ["--steps must be an integer, got 'x'"]),
        (f"--resume {'x' * 300}", ["--resume", "not the directory of a run"]),
        (f"--model.path {'x' * 300}", ["model.path"]),
        ("--device meta", ["device: 'meta' can not be used"]),
        ("--threads 100000", ["threads", "1024"]),
        ("--seed 99999999999999999999", ["seed", "64 bits"]),
        ("--model.cache ~nobody-of-this-name/x", ["model.cache", "home"]),
        ("--config=", ["config"]),
        ("--resume=", ["--resume", "not the directory of a run"]),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, parts):
    message = fails(capsys, *arguments.split())
    for part in parts:
        assert part in message


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_reason_is_found_in_every_box(encoding):
    """tyro draws its boxes with other characters where the terminal has no better ones."""
    process = subprocess.run(
        [*COMMAND, "train", "--steps", "x"],
        capture_output=True, text=True, env={**environment(), "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr == "rlcore: --steps must be an integer, got 'x' (rlcore train --help lists all options)\n"


def test_text_that_no_file_can_hold(capsys):
    assert "name must be text without" in fails(capsys, "--name", "a\udcff")
    assert "task.options must be text without" in fails(capsys, "--task.options", "a", "b\0")


def test_help_is_the_docstrings(capsys):
    with pytest.raises(SystemExit) as error:
        main(["train", "--help"])
    assert error.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Peak learning rate of AdamW." in text and "--rollout.top-p" in text


def test_precedence(tiny, tmp_path, monkeypatch):
    """Defaults < TOML < command line; a resumed run starts from its own config."""
    from rlcore.engine import trainer

    runs: list[tuple[Config, bool]] = []
    monkeypatch.setattr(trainer, "train", lambda config, resume: runs.append((config, resume)))
    file = tmp_path / "mine.toml"
    file.write_text("steps = 5\nseed = 4\n[update]\nlr = 0.5\n")
    assert main(["train", "--config", str(file), "--seed", "9", "--name", "x", "--update.epochs", "2"]) == 0
    config, resume = runs[0]
    assert (config.steps, config.seed, config.update.lr, config.update.epochs, resume) == (5, 9, 0.5, 2, False)
    stored = tmp_path / "runs" / "old"
    stored.mkdir(parents=True)
    (stored / "config.toml").write_text(to_toml(config))
    assert main(["train", f"--resume={stored}", "--steps", "50"]) == 0
    again, resume = runs[1]
    assert (again.steps, again.seed, again.update.lr, resume) == (50, 9, 0.5, True)
    assert Path(again.dir) / again.name == stored
    monkeypatch.chdir(stored)
    assert main(["train", "--resume", "."]) == 0
    assert Path(runs[2][0].dir) / runs[2][0].name == stored
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "runs/old"]) == 0
    assert (runs[3][0].dir, runs[3][0].name) == ("runs", "old")


def test_another_method_on_resume_brings_its_settings(tiny, tmp_path, capsys):
    """Told with all other changes; what belongs to no method stays, and the command line goes before all."""
    from rlcore.engine.resolve import resolve
    from rlcore.engine.trainer import train

    grpo = tiny(steps=2, update__epochs=3)
    train(grpo)
    run = str(tmp_path / "run")
    dapo = resolve(["--resume", run, "--method", "dapo", "--steps", "3", "--rollout.overlong-buffer", "0.5"]).config
    capsys.readouterr()
    train(dapo, resume=True)
    out = capsys.readouterr().out
    for change in ("method 'grpo' -> 'dapo'", "rollout.dynamic_sampling False -> True", "overlong_buffer 0.0 -> 0.5"):
        assert change in out
    same = resolve(["--resume", run]).config
    assert same == dapo and same.update.epochs == 3 and same.update.lr == grpo.update.lr
    loop = resolve(["--resume", run, "--method", "loop"]).config
    assert (loop.rollout.dynamic_sampling, loop.rollout.overlong_buffer, loop.update.epochs) == (False, 0.0, 2)


def test_a_stored_config_serves_another_run(tiny, tmp_path, monkeypatch):
    """runs/NAME/config.toml as --config: a name and a place of its own."""
    from rlcore.engine import trainer
    from rlcore.engine.run import RunDirectory

    runs: list[Config] = []
    monkeypatch.setattr(trainer, "train", lambda config, resume: runs.append(config))
    first = tiny(name="first")
    with RunDirectory(tmp_path / "first", first, resume=False):
        pass
    assert main(["train", "--config", str(tmp_path / "first" / "config.toml")]) == 0
    assert runs[0].name.startswith("chain_sum-grpo-seed0") and runs[0].dir == "runs"
    assert dataclasses.replace(runs[0], name=first.name, dir=first.dir) == first


def test_a_run_keeps_its_place(capsys, tiny, tmp_path):
    config = tiny(name="old")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.toml").write_text(to_toml(config))
    for flag in ("--name", "--dir"):
        assert "leave --dir and --name out" in fails(capsys, "--resume", str(tmp_path / "old"), flag, "other")


@pytest.mark.parametrize("package", ["tyro", "matplotlib", "reasoning_gym"])
def test_missing_packages_are_named(capsys, monkeypatch, package):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    message = fails(capsys)
    assert repr(package) in message and "pip install '.[train]'" in message


def test_the_command_needs_torch_and_numpy_alone():
    """`rlcore --version` where nothing of the training extra is installed, nor a TOML reader."""
    code = (
        "import sys\n"
        "for name in 'tyro transformers reasoning_gym rich tomli tomllib matplotlib safetensors'.split():\n"
        "    sys.modules[name] = None\n"
        "from rlcore.cli import main\n"
        "sys.exit(main(['--version']) + main(['backends']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment())


def test_termination_in_the_warm_start(tiny, tmp_path):
    config = tiny(model__warm_steps=100_000, model__warm_accuracy=1.0, model__cache=str(tmp_path / "cache"))
    process = subprocess.Popen(
        arguments(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    assert any("warm start: step 0" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "no checkpoint yet" in error and f"rlcore train --resume {tmp_path / 'run'}" in error


def arguments(config: Config) -> list[str]:
    file = Path(config.dir) / "given.toml"
    file.write_text(to_toml(config))
    return [*COMMAND, "train", "--config", str(file)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for_step(process: subprocess.Popen, path: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in read(path / "metrics.jsonl")):
            return
        time.sleep(0.01)


def test_kill_9_and_resume(tiny, tmp_path):
    """The real command, killed in the middle, resumed: the same bytes as the command that was left alone."""
    whole, killed = tiny(name="whole", steps=6), tiny(name="killed", steps=6)
    subprocess.run(arguments(whole), check=True, capture_output=True, env=environment())
    process = subprocess.Popen(arguments(killed), stdout=subprocess.DEVNULL, env=environment())
    wait_for_step(process, tmp_path / "killed", 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = subprocess.run(
        [*COMMAND, "train", "--resume", str(tmp_path / "killed")], capture_output=True, text=True, env=environment()
    )
    assert resumed.returncode == 0, resumed.stderr
    a, b = (found(tmp_path / name / "checkpoints")[-1] for name in ("whole", "killed"))
    assert a.name == b.name == "step-000006"
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    metrics = [
        [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    ]
    assert metrics[0] == metrics[1] and [r["step"] for r in metrics[0]] == list(range(7))


INTERRUPTS_ITSELF = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(1)
"""


@pytest.mark.parametrize("command", [["-m", "rlcore.cli", "train"], ["SCRIPT", "train"]], ids=["module", "script"])
def test_ctrl_c_while_torch_is_imported(tmp_path, command):
    """One sentence; in a program that only imports the library, the exception that it expects."""
    (tmp_path / "torch.py").write_text(INTERRUPTS_ITSELF)
    (tmp_path / "rlcore").write_text("from rlcore.cli import main\nraise SystemExit(main())\n")
    (tmp_path / "other.py").write_text("try:\n    import rlcore\nexcept KeyboardInterrupt:\n    print('mine')\n")
    path = os.pathsep.join([str(tmp_path), str(Path(rlcore.__file__).parents[1])])

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env={**environment(), "PYTHONPATH": path},
            # A shell's background job starts with SIGINT ignored, and Python then leaves it so.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    done = run(*(part.replace("SCRIPT", str(tmp_path / "rlcore")) for part in command))
    assert (done.returncode, done.stderr) == (130, "rlcore: interrupted\n")
    assert run(str(tmp_path / "other.py")).stdout == "mine\n"


def test_ctrl_c_saves_and_says_how_to_go_on(tiny, tmp_path):
    config = tiny(steps=500, checkpoint_every=1000)
    process = subprocess.Popen(
        arguments(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130
    assert f"rlcore train --resume {tmp_path / 'run'}" in error and "Traceback" not in error
    step = read(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert found(tmp_path / "run" / "checkpoints")[-1].name == f"step-{step:06d}"
    stored = load_toml(tmp_path / "run" / "config.toml", Config(name=config.name, dir=config.dir))
    assert stored == config
