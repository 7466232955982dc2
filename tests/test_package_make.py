"""`make` on machines that lack something: it says what, and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None or os.name == "nt", reason="needs make and bash")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def interpreter(tmp_path: Path, broken: str) -> str:
    """A python that fails where its command holds `broken`."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\ncase "$*" in *{broken}*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_help_lists_the_commands() -> None:
    out = make("help").stdout
    targets = ["train", "test", "test-full", "test-peers", "asan", "tsan", "bench", "bench-peers", "grid"]
    for target in [*targets, "lint", "types", "clean", "help"]:
        assert f"make {target} " in out


def test_missing_ensurepip_is_named(tmp_path: Path) -> None:
    done = make("train", f"VENV={tmp_path / 'env'}", f"PYTHON={interpreter(tmp_path, 'ensurepip')}")
    assert done.returncode != 0
    assert "python3-venv" in done.stderr and "make PYTHON=" in done.stderr
    assert not (tmp_path / "env").exists()


def test_old_python_is_named(tmp_path: Path) -> None:
    done = make("train", f"VENV={tmp_path / 'env'}", f"PYTHON={interpreter(tmp_path, 'version_info')}")
    assert done.returncode != 0
    assert "Python 3.10 or newer is needed" in done.stderr
    assert not (tmp_path / "env").exists()
