"""JSONL files that are cut and taken up again, and the progress bar."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from rlcore.engine import screen as screen_module
from rlcore.engine.errors import SaveError, UserError
from rlcore.engine.logging import RunLog
from rlcore.engine.records import cut, read, write_whole
from rlcore.engine.screen import Screen


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": step, "x": step / 7}).encode() + b"\n" for step in steps)


@pytest.mark.parametrize(
    ("content", "first_step", "kept"),
    [
        (b"", 0, []),
        (lines(0, 1, 2), 0, []),
        (lines(0, 1, 2, 3), 2, [0, 1]),
        (lines(0, 1, 2), 3, [0, 1, 2]),
        (lines(0, 1, 2)[:-3], 3, [0, 1]),
        (lines(0, 1) + b'{"step": 2}', 3, [0, 1]),
        (lines(0, 1) + b"\xff\x00garbage\n" + lines(2), 3, [0, 1]),
        (lines(0, 0, 1, 1, 2, 2), 2, [0, 0, 1, 1]),
    ],
)
def test_cut(tmp_path, content, first_step, kept):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    with cut(path, first_step) as file:
        file.write(json.dumps({"step": 99}) + "\n")
    assert [record["step"] for record in read(path)] == [*kept, 99]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_what_is_no_regular_file_is_refused(tmp_path):
    """A device never ends, a pipe may never begin."""
    for name, target in (("device", "/dev/zero"), ("directory", str(tmp_path))):
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    for name in ("device", "directory", "pipe"):
        for take in (read, lambda path: cut(path, 1)):
            with pytest.raises(UserError, match=rf"{name}: expected a regular file"):
                take(tmp_path / name)
    (tmp_path / "there.jsonl").write_bytes(lines(0, 1))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there.jsonl")
    assert len(read(tmp_path / "link.jsonl")) == 2


def test_read_leaves_a_half_written_line_out(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(lines(0, 1)[:-4])
    assert [record["step"] for record in read(path)] == [0]
    assert read(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("bad", [b"[1]\n", b"7\n", b'{"x": 1}\n', b'{"step": "1"}\n', b"\xff\xfe\n"])
def test_read_ends_at_what_is_no_record(tmp_path, bad):
    path = tmp_path / "file.jsonl"
    path.write_bytes(lines(0) + bad + lines(2))
    assert [record["step"] for record in read(path)] == [0]


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SaveError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_metrics_are_valid_json_and_exact(tmp_path):
    with RunLog(tmp_path, 0, 2) as log:
        log.step(0, {"eval/accuracy": 0.1 + 0.2, "bad": float("nan")})
        log.conclude()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 0, "eval/accuracy": 0.1 + 0.2, "bad": None}
    assert (tmp_path / "curves.png").exists()


def test_progress_bar_on_a_terminal(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.progress.get_console", lambda: Console(file=shown, force_terminal=True, width=120))
    screen = Screen(0, 10)
    screen.say("[hello] reader")
    screen.step(0, {"eval/accuracy": 0.25})
    screen.step(4, {"reward": 0.5, "time/tokens_per_s": 12345.0})
    screen.close()
    text = shown.getvalue()
    for part in ("[hello] reader", "reward 0.500", "held-out 25.0%", "12,345 tokens/s", "left", "4/10"):
        assert part in text


def test_plain_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(screen_module.sys.stdout, "isatty", lambda: False, raising=False)
    screen = Screen(0, 10)
    for step in range(1, 11):
        screen.step(step, {"reward": 0.5, "time/tokens_per_s": 10.0})
    out = capsys.readouterr().out
    assert out.count("\n") == 10 and "step 10/10" in out and "s left" in out and "held-out unknown" in out
