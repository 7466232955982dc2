"""Curves: what is drawn is what the runs' metrics hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlcore.cli import main
from rlcore.engine.plot import PANELS, Curves, by_seed, draw, metrics, series


def write_run(path: Path, records: list[dict], tail: str = "") -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


def rising(slope: float, steps: int = 4) -> list[dict]:
    return [{"step": 0, "eval/accuracy": 0.25}] + [
        {"step": s, "reward": slope * s, "accuracy": slope * s / 2, "policy/entropy": 1 / s, "length": 3.0 + s}
        for s in range(1, steps + 1)
    ]


def drawn(figure, title: str) -> list[tuple[list[float], list[float]]]:
    """The points of every line in the panel of that title."""
    axis = next(axis for axis in figure.axes if axis.get_title() == title)
    return [([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]) for line in axis.lines]


def test_one_run():
    figure = draw([Curves("a", [rising(0.1)])])
    assert [axis.get_title() for axis in figure.axes] == [
        "held-out accuracy", "reward", "entropy (nats per token)", "answer length (tokens)",
    ]  # fmt: skip
    assert drawn(figure, "held-out accuracy") == [([0], [0.25])]
    reward, accuracy = drawn(figure, "reward")
    assert reward == ([1, 2, 3, 4], pytest.approx([0.1, 0.2, 0.3, 0.4]))
    assert accuracy == ([1, 2, 3, 4], pytest.approx([0.05, 0.1, 0.15, 0.2]))
    legend = next(axis for axis in figure.axes if axis.get_title() == "reward").get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["reward", "accuracy"]


def test_seeds_are_a_mean_and_a_band(tmp_path):
    runs = {tmp_path / f"grpo-seed{seed}": rising(slope) for seed, slope in enumerate((0.1, 0.2, 0.6))}
    runs[tmp_path / "rloo-seed0"] = rising(0.5, steps=2)
    groups = by_seed(runs)
    assert [group.name for group in groups] == ["grpo-seed* (3 runs)", "rloo-seed0"]
    figure = draw(groups)
    axis = next(axis for axis in figure.axes if axis.get_title() == "reward")
    of_grpo, of_rloo = drawn(figure, "reward")[::2]
    assert of_grpo == ([1, 2, 3, 4], pytest.approx([0.3, 0.6, 0.9, 1.2]))
    assert of_rloo == ([1, 2], pytest.approx([0.5, 1.0]))
    band = axis.collections[0].get_paths()[0].vertices
    for step in (1, 4):
        assert band[band[:, 0] == step][:, 1].min() == pytest.approx(0.1 * step)
        assert band[band[:, 0] == step][:, 1].max() == pytest.approx(0.6 * step)
    assert len(axis.collections) == 2  # reward and accuracy of the three; the single run has no band
    assert axis.lines[0].get_color() != axis.lines[2].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["grpo-seed* (3 runs)", "rloo-seed0"]


def test_series_keeps_common_steps_and_finite_numbers():
    runs = [
        [{"step": 1, "x": 1.0}, {"step": 2, "x": None}, {"step": 3, "x": 3}],
        [{"step": 1, "x": 5.0}, {"step": 2, "x": 6.0}, {"step": 3, "x": "7"}],
        [{"step": 1, "y": 1.0}],
    ]
    assert series(runs, "x") == ([1], [[1.0], [5.0]])
    assert series(runs, "z") == ([], [])


def test_runs_of_one_name_are_told_apart_by_their_place(tmp_path):
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert [group.name for group in by_seed({a: rising(1.0), b: rising(1.0)})] == [str(a), str(b)]


def test_every_panel_and_many_runs():
    records = [{"step": s, **{key: s + 0.5 for _, keys in PANELS for key in keys}} for s in (1, 2)]
    figure = draw([Curves(f"run {i}", [records]) for i in range(12)])
    assert [axis.get_title() for axis in figure.axes] == [title for title, _ in PANELS]
    assert all(ys == [1.5, 2.5] for title, _ in PANELS for _, ys in drawn(figure, title))
    assert len({str(line.get_color()) for line in figure.axes[0].lines}) == 12


def test_command(tmp_path, capsys):
    a = write_run(tmp_path / "a", rising(0.1), tail='{"step": 9, "rew')
    b = write_run(tmp_path / "b", rising(0.2))
    assert [r["step"] for r in metrics(a)] == [0, 1, 2, 3, 4]
    for name, magic in (("c.png", b"\x89PNG"), ("c.svg", b"<?xml"), ("c.pdf", b"%PDF")):
        out = tmp_path / name
        assert main(["plot", str(a), str(b), "--out", str(out)]) == 0
        assert out.read_bytes().startswith(magic)
        assert str(out) in capsys.readouterr().out


def test_the_picture_lies_beside_the_first_run(tmp_path, capsys, monkeypatch):
    """Not where the command happens to be started."""
    a, b = (write_run(tmp_path / place, rising(0.1)) for place in ("runs/a", "other/b"))
    (tmp_path / "elsewhere").mkdir()
    for place, given in ((tmp_path / "elsewhere", str(a)), (a, ".")):
        monkeypatch.chdir(place)
        before = set(place.iterdir())
        assert main(["plot", given, str(b)]) == 0
        picture = tmp_path / "runs" / "plot.png"
        assert capsys.readouterr().out == f"{picture}\n"
        assert picture.read_bytes().startswith(b"\x89PNG") and set(place.iterdir()) == before
        picture.unlink()


@pytest.mark.parametrize(
    ("content", "out", "words"),
    [
        (None, "p.png", "is not the directory of a run"),
        ("", "p.png", "no metrics yet"),
        ('{"step": 0, "re', "p.png", "no metrics yet"),
        ('{"step": 0}\n', "p.gif", ".png, .svg, .pdf"),
    ],
)
def test_mistakes(tmp_path, capsys, content, out, words):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    assert main(["plot", str(run), "--out", str(tmp_path / out)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / out).exists()


def test_a_place_that_can_not_be_written(tmp_path, capsys):
    run = write_run(tmp_path / "run", rising(0.1))
    assert main(["plot", str(run), "--out", str(tmp_path / "no" / "p.png")]) == 3
    assert "could not write" in capsys.readouterr().err
