"""Config: precedence, exact round trip, and errors that name file, line, key and the nearest name."""

from __future__ import annotations

import dataclasses

import pytest

from rlcore.engine.config import Config, TaskConfig
from rlcore.engine.config_file import flatten, load_toml, to_toml
from rlcore.engine.config_rules import validate
from rlcore.engine.errors import UserError
from rlcore.engine.resolve import resolve


def write(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_round_trip(tmp_path):
    config = Config(
        method="rloo", shuffle_rewards=True, name='a "name"\nwith\tall\x7f', task=TaskConfig(options={"a\x7f": "\x1f"})
    )
    config = dataclasses.replace(config, update=dataclasses.replace(config.update, clip_high=0.28, lr=1e-7))
    assert load_toml(write(tmp_path, to_toml(config))) == config
    assert load_toml(write(tmp_path, to_toml(Config()))) == Config()


def test_file_over_defaults(tmp_path):
    config = load_toml(write(tmp_path, "steps = 7\n[update]\nlr = 1\n[task.options]\nmax_digits = 1\n"))
    assert (config.steps, config.update.lr, config.task.options) == (7, 1.0, {"max_digits": "1"})
    assert isinstance(config.update.lr, float)
    assert config.rollout == Config().rollout
    again = load_toml(write(tmp_path, "[update]\nepochs = 2\n"), config)
    assert (again.steps, again.update.lr, again.update.epochs) == (7, 1.0, 2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("step = 7\n", ["line 1", "'step'", "'steps'"]),
        ("\n[update]\n\nlearning = 1\n", ["line 4", "'update.learning'"]),
        ("[update]\nepoch = 1\n", ["line 2", "'epochs'"]),
        ("lr = 1\n", ["line 1", "'update.lr'"]),
        ("[updates]\nlr = 1\n", ["line 1", "'update'"]),
        ("[rollout]\nsamples = 'eight'\n", ["line 2", "rollout.samples", "an integer", "'eight'"]),
        ("[rollout]\nsamples = 8.0\n", ["line 2", "an integer"]),
        ("[rollout]\nsamples = true\n", ["line 2", "an integer"]),
        ("[update]\nlayout = 'trees'\n", ["line 2", "auto, tree, padded", "'trees'"]),
        ("steps = 1\nupdate = 3\n", ["line 2", "[update]"]),
        ("shuffle_rewards = 1\n", ["true or false"]),
        ("steps = \n", ["not valid TOML", "line 1"]),
        ("steps = 0\n", ["line 1", "steps", "at least 1", "got 0"]),
        ("# lr\n[update]\nlr = -1\n", ["line 3", "update.lr", "greater than 0"]),
        ("[update]\nlr = inf\n", ["line 2", "update.lr", "finite"]),
        ("[update]\nlr = nan\n", ["line 2", "update.lr", "nan"]),
        (f"[update]\nlr = {'9' * 400}\n", ["line 2", "update.lr", "finite"]),
        ("seed = 99999999999999999999\n", ["line 1", "seed", "64 bits"]),
        (f"steps = 0x{'f' * 5000}\n", ["line 1", "steps", "64 bits"]),
        (f"steps = {'9' * 5000}\n", ["not valid TOML"]),
        (f"steps = {'[' * 50000}\n", ["not valid TOML"]),
        ("steps = 1\nupdate.lr = 'x'\n", ["line 2", "update.lr", "a number"]),
        ("steps = 1\nupdate = {lr = 'x'}\n", ["line 2", "update.lr", "a number"]),
        ("[ 'update' ]\n'lr' = 'x'\n", ["line 2", "update.lr", "a number"]),
        ("[[update]]\nlr = 1\n", ["line 1", "is a table"]),
        ("steps = 1\r\n[update]\r\nepochs = 'x'\r\n", ["line 3", "update.epochs"]),
        ('name = "a\\u0000b"\n', ["line 1", "name", "null"]),
        ("steps = 1979-05-27\n", ["line 1", "steps", "an integer"]),
        ("steps = [1]\n", ["line 1", "steps", "an integer", "[1]"]),
    ],
)
def test_errors_in_a_file(tmp_path, text, parts):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_toml(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_files_from_other_systems(tmp_path):
    """A byte order mark and Windows line ends are no mistake; another encoding, a directory and a null are."""
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbfsteps = 7\r\n[update]\r\nlr = 0.5\r\n")
    assert (load_toml(path).steps, load_toml(path).update.lr) == (7, 0.5)
    path.write_bytes("name = 'ä'\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.toml is not UTF-8 text: byte 8"):
        load_toml(path)
    path.write_bytes("steps = 7\n".encode("utf-16"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_toml(path)
    with pytest.raises(UserError, match="Is a directory"):
        load_toml(tmp_path)
    with pytest.raises(UserError, match="null"):
        load_toml(tmp_path / "a\0b")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_toml(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("keep", 0),
        ("rollout.temperature", 0.0),
        ("rollout.top_p", 1.5),
        ("rollout.top_k", -1),
        ("update.lr", -1.0),
        ("update.clip_low", -0.1),
        ("update.beta2", 1.0),
        ("task.held_out_fraction", 1.0),
        ("task.template", "no place for it"),
        ("model.heads", 3),
        ("update.minibatches", 10_000),
    ],
)
def test_ranges(key, value):
    section, _, name = key.rpartition(".")
    config = Config()
    setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        validate(config)


def test_defaults_are_valid_and_every_field_has_help():
    import inspect

    from rlcore.engine import config as module

    validate(Config())
    source = inspect.getsource(module)
    for name in flatten(Config()):
        field = name.rpartition(".")[2]
        lines = source.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {field}: "))
        assert lines[at + 1].strip().startswith('"""'), name


def test_pairs_on_the_command_line_take_the_place_of_those_of_a_file(tmp_path):
    path = write(tmp_path, '[reward.channels]\ncorrect = "verifier"\n[task.options]\nmax_digits = 1\n')
    command = ["--config", str(path), "--reward.channels", "form", "regex:a+", "right", "verifier"]
    config = resolve(command).config
    assert config.reward.channels == {"form": "regex:a+", "right": "verifier"}
    assert config.task.options == {"max_digits": "1"}
    assert resolve(command[:2]).config.reward.channels == {"correct": "verifier"}
