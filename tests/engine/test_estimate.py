"""The dry run: nothing on the disk, numbers that a real run bears out."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlcore as rl
from rlcore.cli import main
from rlcore.engine.config_file import load_toml, to_toml
from rlcore.engine.estimate import estimate, largest_pack, of_folded_head, of_forward_pass, shape_of
from rlcore.engine.policy import Policy


def dry(capsys, tmp_path, config, *arguments: str) -> str:
    (tmp_path / "given.toml").write_text(to_toml(config))
    assert main(["train", "--config", str(tmp_path / "given.toml"), "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("most", [1, 60, 100, 300, 1000])
def test_the_fullest_pack(tiny, most, padded):
    """That of a packing of 12 prompts of 11 tokens with 6 answers of 19, also where a group is over the budget."""
    config = tiny(rollout__prompts=23, rollout__samples=6, rollout__max_new_tokens=19,
                  update__minibatches=2, update__micro_tokens=most)  # fmt: skip
    prompt, each = (0, 30) if padded else (11, 19)
    packs = rl.pack_groups([prompt] * 12, [[each] * 6] * 12, most)
    tokens = [prompt * len({s // 6 for s in pack}) + each * len(pack) for pack in packs]
    answers, found = largest_pack(config, 11.0, padded)
    assert answers == 19 * max(map(len, packs))
    # Parts of two groups may share a pack of a tree, which is not counted.
    assert found <= max(tokens) <= (found if padded else found / 0.85)


def test_it_prints_the_config_and_writes_nothing(capsys, tiny, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    config = tiny(dir=str(tmp_path / "runs"), name="new", model__cache=str(cache))
    text = dry(capsys, tmp_path, config, "--update.lr", "1e-3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.toml"]
    (tmp_path / "printed.toml").write_text(text)
    expected = dataclasses.replace(config, update=dataclasses.replace(config.update, lr=1e-3))
    assert load_toml(tmp_path / "printed.toml") == expected
    lines = text.splitlines()
    assert "lr = 0.001  # the command line; default 0.0015" in lines
    assert f"steps = 4  # {tmp_path / 'given.toml'}; default 400" in lines
    assert "keep = 2" in lines and "beta1 = 0.9" in lines


def test_the_methods_own_values_are_marked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = next(method for method in rl.methods().values() if method.defaults)
    options = ["--task.pool", "2000", "--task.held-out", "10"]
    assert main(["train", "--dry-run", "--method", method.key, *options]) == 0
    text = capsys.readouterr().out
    for key, value in method.defaults.items():
        line = next(line for line in text.splitlines() if line.startswith(key.rpartition(".")[2] + " ="))
        assert f"# the method {method.key}" in line and str(value).lower() in line
    assert not list(tmp_path.iterdir())


def test_sizes_of_a_step(capsys, tiny, tmp_path):
    """6 prompts of 7 tokens ("1 + 2 =", "1 - 2 ="), 6 answers of at most 8 tokens, and the parameters of the model."""
    config = tiny()
    text = dry(capsys, tmp_path, config)
    _, model = shape_of(config)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters" in text
    assert f"up to {6 * (6 * 8 + 7)} tokens" in text
    from rlcore.engine.tasks import Task

    train = len(Task(config.task).train)
    assert f"{train} for training, 10 held out" in text
    assert f"{-(-train // 6)} steps; 4 steps are {4 / -(-train // 6):.2f} epochs" in text


def test_a_run_that_can_not_be_is_refused(capsys, tiny, tmp_path):
    (tmp_path / "given.toml").write_text(to_toml(tiny()))
    for options in (["--rollout.max-new-tokens", "5000"], ["--model.path", "/nope/x"], ["--task.name", "chainsum"]):
        assert main(["train", "--config", str(tmp_path / "given.toml"), "--dry-run", *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("rows", [8192, 32768])
def test_the_head_of_a_large_model(tiny, rows):
    """On a GPU a float32 d hidden beside one in 16 bits is part of the 157 * 2^24 bytes for logits."""
    head = torch.empty(151936, 4096, device="meta")
    d_weight, d_hidden = 4 * 151936 * 4096, 4 * rows * 4096
    for device, dtype, expected in (
        ("cuda", "bfloat16", 157 * 2**24), ("cuda:1", "float32", 157 * 2**24 + d_hidden),
        ("cpu", "bfloat16", 51 * 2**20 + d_hidden),
    ):  # fmt: skip
        config = tiny(device=device, model__dtype=dtype)
        assert of_folded_head(config, head, rows) == expected
        assert of_folded_head(config, head.requires_grad_(), rows) == expected + d_weight
        head = head.detach()
    assert of_folded_head(tiny(), head, 2) == 2 * 4 * (151936 + 4096)


def test_what_is_kept_for_the_backward_pass(tiny, small):
    """The count on fake tensors against the same count in a real forward pass through the packed trees."""
    model, tokenizer, _ = small
    policy = Policy(model, tokenizer.pad_token_id, "tree")
    prompts, responses = [[5] * 20] * 4, [[[6 + i] * 30 for i in range(6)]] * 4
    from rlcore.engine.packs import Pack

    seen = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    before = len(seen)

    def keep(x):
        seen.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    tree = Pack(prompts, responses, torch.device("cpu")).tree
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        rl.trunk(policy.model, tree)
    real = sum(x.untyped_storage().nbytes() for x in list(seen.values())[before:]) / tree.M
    assert of_forward_pass(shape_of(tiny())[1], tiny()).activations == pytest.approx(real, rel=0.15)


MEASURE = """
import dataclasses
import gc
import sys
from pathlib import Path
import torch
import rlcore as rl
from rlcore.engine.config import Config
from rlcore.engine.config_file import load_toml
from rlcore.engine import evaluate, rollout, sampler
from rlcore.engine.policy import Policy
from rlcore.engine.seeding import generator
from rlcore.engine.tasks import Task
from rlcore.engine.timing import Stopwatch
from rlcore.engine.update import Learner
from rlcore.engine import lora
from rlcore.engine.model import base_dtype, character_tokenizer, prepare, small_model

def endless(*arguments, **options):  # no answer ends early: a step at its fullest
    return sample(*arguments, **{**options, "eos_id": -1})

sample = sampler.sample
for module in (rollout, evaluate):
    if hasattr(module, "sample"):
        module.sample = endless

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def growth(config):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in memory now
    before = kilobytes("VmRSS")
    step(config)
    return (kilobytes("VmHWM") - before) * 1024

def step(config):
    tokenizer = character_tokenizer()
    model = small_model(config, len(tokenizer)).to(base_dtype(config)).eval()
    if config.model.lora_rank:
        model = lora.add(model, config.model, 0)
    model = prepare(model, config)
    policy = Policy(model, tokenizer.pad_token_id, config.update.layout)
    learner = Learner(config, rl.methods()[config.method], policy, None)
    for k in (1, 2):
        stream = generator(0, "rollout", k)
        problems = task.prompts(k - 1, config.rollout.prompts, 0)
        drawn = rollout.roll_out(model, tokenizer, task, problems, config.rollout, stream)
        learner.learn(drawn, drawn.reward, k, Stopwatch())
    with learner.evaluated():
        evaluate.evaluate(model, tokenizer, task, config, torch.device("cpu"), print)

torch.set_num_threads(1)
configs = [load_toml(Path(path)) for path in sys.argv[1:]]
task = Task(configs[0].task)

def little(config):
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, prompts=2, samples=2, max_new_tokens=2),
        eval=dataclasses.replace(config.eval, batch=1, samples=1),
        model=dataclasses.replace(config.model, hidden_size=32, heads=2, layers=1),
    )

for config in configs:
    step(little(config))  # what is imported and set up at first use
print(*map(growth, configs))
"""
LARGER = {
    "model__hidden_size": 128,
    "model__layers": 4,
    "model__heads": 4,
    "rollout__prompts": 16,
    "rollout__samples": 8,
    "rollout__max_new_tokens": 32,
    "update__minibatches": 2,
    "eval__batch": 2,
}
CASES = {
    "activations": {"update__micro_tokens": 2048},
    "critic": {"update__micro_tokens": 1024, "update__layout": "padded", "method": "ppo"},
    "sampling": {
        "update__micro_tokens": 128,
        "rollout__samples": 2,
        "rollout__prompts": 8,
        "eval__batch": 10,
        "eval__samples": 150,
    },
    "adapters": {"update__micro_tokens": 1024, "model__lora_rank": 8},
    "bfloat16": {"update__micro_tokens": 2048, "model__dtype": "bfloat16"},
    "checkpointing": {"update__micro_tokens": 2048, "model__gradient_checkpointing": True},
    "average": {"update__micro_tokens": 128, "update__ema": 0.9, "model__hidden_size": 384, "rollout__prompts": 2},
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
def test_measured_peak(tiny, tmp_path):
    """Growth of the peak resident set over real steps, one after the other in a process of their own, within 1.5."""
    configs = [tiny(**{**LARGER, **changes}) for changes in CASES.values()]
    paths = [tmp_path / f"{name}.toml" for name in CASES]
    for path, config in zip(paths, configs):
        path.write_text(to_toml(config))
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    ).stdout  # fmt: skip
    guesses = [estimate(config, shape_of(config)[1], 7, 7).peak for config in configs]
    ratios = {name: guess / int(measured) for name, guess, measured in zip(CASES, guesses, out.split())}
    print(f"estimate / measured: {ratios}")
    assert all(1 / 1.5 < ratio < 1.5 for ratio in ratios.values()), ratios
