"""Looking at answers: what is logged per token, what is shown of it, and that no answer acts on the reader's screen."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

import rlcore as rl
from rlcore.cli import main
from rlcore.engine.config import Config, RolloutConfig, UpdateConfig
from rlcore.engine.policy import Policy
from rlcore.engine.records import read
from rlcore.engine.rollout import roll_out
from rlcore.engine.samples import lines, pieces
from rlcore.engine.seeding import generator
from rlcore.engine.show import MEASURES, Show, choose, colour, load, visible
from rlcore.engine.show_html import page
from rlcore.engine.show_terminal import print_samples
from rlcore.engine.timing import Stopwatch
from rlcore.engine.update import Learner

EVIL = "<script>alert(1)</script>\x1b[2J\x1b]0;owned\x07\x9b31m[bold]\u202e&amp;\r\ndone\ud800"


def write(run: Path, *records: dict) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def record(step: int, reward: float | None = 1.0, answer: str = "42", **changes) -> dict:
    whole = {"step": step, "prompt": "6 * 7 =", "answer": answer, "reference": "42", "reward": reward}
    lists = {"tokens": list(answer), "logp": [-0.5] * len(answer), "entropy": [0.25] * len(answer)}
    return {**whole, **lists, "advantage": [0.75] * len(answer), **changes}


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_logged_values_are_those_of_the_model(small, layout):
    """Log-prob and entropy of every token from the logits of one answer at a time, at the rollout's temperature.

    They are those before the update, here of a learning rate that changes them beyond recognition.
    """
    model, tokenizer, task = small
    temperature = 0.7
    rollout_config = RolloutConfig(samples=3, temperature=temperature)
    rollout = roll_out(model, tokenizer, task, task.held_out[:2], rollout_config, generator(0))
    config = Config(rollout=rollout_config, update=UpdateConfig(lr=0.1, warmup=0, micro_tokens=16, minibatches=1))
    policy = Policy(copy.deepcopy(model), tokenizer.pad_token_id, layout, temperature)
    reward = torch.arange(6.0)
    seen, _ = Learner(config, rl.methods()["grpo"], policy, None).learn(rollout, reward, 1, Stopwatch())
    logged = list(lines(7, rollout, seen, tokenizer, 5))
    assert len(logged) == 5
    advantage = rl.group_advantage(reward, rollout.batch.group)
    for s, one in enumerate(logged):
        prompt, answer = rollout.prompts[s // 3], rollout.responses[s // 3][s % 3]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1)
        got = json.loads(one)
        assert got["logp"] == pytest.approx(logp[range(len(answer)), answer].tolist(), abs=2e-4)
        assert got["entropy"] == pytest.approx((-(logp.exp() * logp).sum(-1)).tolist(), abs=2e-4)
        assert got["advantage"] == pytest.approx([advantage[s].item()] * len(answer), abs=1e-4)
        assert got["tokens"] == [tokenizer.decode([token]) for token in answer]
        assert got["answer"] == rollout.texts[s] and got["step"] == 7 and got["reward"] == rollout.reward[s]
    assert list(lines(7, rollout, seen, tokenizer, 0)) == []


def test_pieces_keep_spaces_that_a_lone_token_loses():
    class Spaces:
        words = ("Hello", "world", "!")

        def decode(self, ids):
            return " ".join(self.words[i] for i in ids).replace(" !", "!")

    assert pieces(Spaces(), [0, 1, 2]) == ["Hello", " world", "!"]
    assert pieces(Spaces(), [2]) == ["!"]


def test_entropy_is_that_before_the_update(finished):
    """A run's log-probs are the sampler's at the same weights; after the update they would be others."""
    logged = read(finished / "samples.jsonl")
    assert {len(r["tokens"]) == len(r["logp"]) == len(r["entropy"]) == len(r["advantage"]) for r in logged} == {True}
    assert all("".join(r["tokens"]).removesuffix("<eos>") == r["answer"] for r in logged)
    first = {}
    for r in logged:
        # The first token of all answers to one prompt is drawn from one distribution.
        first.setdefault((r["step"], r["prompt"]), set()).add(r["entropy"][0])
    assert all(max(values) - min(values) < 2e-4 for values in first.values())


def test_nothing_in_an_answer_acts_on_the_terminal(tmp_path):
    samples = load(write(tmp_path, record(1, answer=EVIL, prompt=EVIL, reference=EVIL)))
    for colours in ("truecolor", None):
        out = io.StringIO()
        console = Console(file=out, force_terminal=colours is not None, color_system=colours, width=200)
        print_samples(samples, console)
        text = out.getvalue()
        assert not re.sub(r"\x1b\[[0-9;]*m", "", text).encode().translate(None, b"\n").count(b"\x1b")
        for harmful in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\u202e", "\r", "\ud800"):
            assert harmful not in text
        if colours is None:
            continue
        shown = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert "␛[2J" in shown and "\\u202e" in shown and "[bold]" in shown and "<script>" in shown


def test_visible():
    assert visible("a\tb\n\x7f\u200bé漢👍") == "a␉b↵\n␡\\u200bé漢👍"
    assert visible("\u2028\ue000\ufeff") == "\\u2028\\ue000\\ufeff"


def test_terminal_shows_values(tmp_path):
    samples = load(write(tmp_path, record(3, advantage=[-1.5, 0.5], logp=[-0.125, -2.0], entropy=[0.0, None])))
    out = io.StringIO()
    print_samples(samples, Console(file=out, color_system=None, width=120))
    assert "step 3, reward 1, reference 42" in out.getvalue() and "6 * 7 =" in out.getvalue()
    rows = [row.split() for row in out.getvalue().splitlines() if row.startswith((" 4", " 2"))]
    assert rows == [["4", "-1.500", "-0.125", "0.000"], ["2", "0.500", "-2.000", "unknown"]]
    out = io.StringIO()
    print_samples(samples, Console(file=out, force_terminal=True, color_system="truecolor", width=120))
    assert "48;2;230;120;20" in out.getvalue()  # the strongest negative advantage in full orange
    assert "48;2;140;60;170" in out.getvalue()  # the lowest log-prob in full purple


class Page(HTMLParser):
    """Every token with its style and tooltip, and the names of all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tokens: list[tuple[str, str, str]] = []
        self.open: dict | None = None
        self.all = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open = dict(attrs) if tag == "span" and "title" in dict(attrs) else None
        if self.open is not None:
            self.tokens.append((self.open["style"], self.open["title"], ""))

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        self.all += data
        if self.open is not None:
            style, title, text = self.tokens[-1]
            self.tokens[-1] = (style, title, text + data)


def test_page_holds_every_value(tmp_path, capsys):
    run = write(tmp_path / "run", record(3, advantage=[-1.5, 0.5], logp=[-0.125, -2.0], entropy=[0.0, 0.7]))
    assert main(["show", str(run), "--html", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    parsed = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    values = ["advantage -1.500, log-prob -0.125, entropy 0.000", "advantage 0.500, log-prob -2.000, entropy 0.700"]
    assert [(title, text) for _, title, text in parsed.tokens] == list(zip(values, "42")) * 3
    styles = [style for style, _, _ in parsed.tokens]
    assert styles[0] == "background:rgb(230,120,20)" and styles[3] == "background:rgb(140,60,170)"
    assert styles[4] == "background:rgb(255,255,255)" and styles[5] == "background:rgb(20,150,110)"
    assert "step 3, reward 1, reference 42" in parsed.all


def test_page_of_a_hostile_answer(tmp_path):
    run = write(tmp_path, record(1, answer=EVIL, tokens=[EVIL, '" onmouseover="alert(1)'], prompt=EVIL, reference=EVIL))
    text = page(EVIL, load(run))
    parsed = Page(text)
    assert not parsed.tags & {"script", "img", "iframe", "link", "a", "object"}
    assert parsed.attributes <= {"lang", "charset", "http-equiv", "content", "style", "title", "class"}
    assert "http://" not in text and "https://" not in text
    assert parsed.tokens[0][2] == visible(EVIL) and "<script>alert(1)</script>␛[2J" in parsed.tokens[0][2]
    assert '" onmouseover' in parsed.tokens[-1][2]
    body = page("run", load(run))
    assert not [c for c in body if ord(c) < 32 and c != "\n" or c in "\x7f\x9b\u202e\ud800"]
    body.encode()


def test_old_and_odd_lines(tmp_path):
    old = {"step": 1, "prompt": "p", "answer": "42", "reference": "42", "reward": 0.5, "advantage": -0.25}
    odd = record(2, reward=None, logp=[1.0], entropy="x", advantage=[True, float("inf")], tokens=["4", 2])
    run = write(tmp_path, old, {"step": 1, "answer": 5}, odd)
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "ans')
    first, second = load(run)
    assert first.tokens == ["42"] and first.values == {"advantage": [-0.25], "logp": [None], "entropy": [None]}
    assert second.tokens == ["4", "2"] and second.reward is None
    assert second.values == {"advantage": [None, None], "logp": [None, None], "entropy": [None, None]}


def test_choice(tmp_path):
    rewards = {1: (0.0, 0.5), 2: (1.0, 0.25), 3: (1.0, 0.0)}
    samples = load(write(tmp_path, *(record(step, reward) for step, pair in rewards.items() for reward in pair)))

    def chosen(**options) -> list[tuple[int, float | None]]:
        return [(s.step, s.reward) for s in choose(samples, Show(tmp_path, **options))]

    assert chosen() == [(3, 1.0), (3, 0.0)]
    assert chosen(step=1, count=1) == [(1, 0.0)]
    assert chosen(best=True, count=3) == [(3, 1.0), (2, 1.0), (1, 0.5)]
    assert chosen(worst=True, count=3) == [(3, 0.0), (1, 0.0), (2, 0.25)]
    assert chosen(best=True, step=2) == [(2, 1.0), (2, 0.25)]
    assert chosen(random=True, count=4) == chosen(random=True, count=4)
    assert len({tuple(chosen(random=True, count=2, seed=seed)) for seed in range(8)}) > 1
    assert sorted(chosen(random=True, count=99)) == sorted((step, r) for step, pair in rewards.items() for r in pair)


def test_colours():
    advantage, logp, _ = MEASURES
    assert colour(advantage, 0.0, 2.0) == colour(advantage, None, 2.0) == colour(logp, -1.0, 0.0) == (255, 255, 255)
    assert colour(advantage, 2.0, 2.0) == (40, 120, 220) and colour(advantage, -2.0, 2.0) == (230, 120, 20)
    assert colour(logp, -1.0, 2.0) == (198, 158, 212)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "9"], "steps 1 to 2, got 9"),
        (["--best", "--worst"], "exclude each other"),
        (["--count", "0"], "--count must be at least 1"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, words):
    run = write(tmp_path, record(1), record(2))
    assert main(["show", str(run), *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_runs_without_samples(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2
    assert "no samples.jsonl" in capsys.readouterr().err
    assert main(["show", str(write(tmp_path))]) == 2
    assert "holds no answers" in capsys.readouterr().err


def test_dataclass_of_the_command_is_what_the_command_line_gives(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("rlcore.engine.show.show", seen.append)
    assert main(["show", str(tmp_path), "--worst", "--step", "3", "--count", "2"]) == 0
    assert seen == [dataclasses.replace(Show(tmp_path), worst=True, step=3, count=2)]
