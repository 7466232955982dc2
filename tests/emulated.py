"""`rlcore._cuda` on the CPU: the kernels' sources over csrc/emulate/cuda.h, built into build/emulated.

Never installed: what the tests of the CUDA kernels run where there is no GPU.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
# No contraction into fused multiply-adds: the compiler of the CPU would choose other places for it than nvcc.
OPTIONS = [
    "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unknown-pragmas", "-DRLCORE_EMULATE",
    "-U_FORTIFY_SOURCE",  # it takes a jump to another stack for an attack
]  # fmt: skip


SOURCES = (CSRC / "bindings_cuda.cpp", *sorted((CSRC / "cuda").glob("*.cu")))
FOLDER = ROOT / "build" / "emulated"


def build(*more: str, sources: tuple[Path, ...] = SOURCES) -> Path:
    """The module, of objects that are made where their source, a header or the options are new.

    Skips the test where it can not be built.
    """
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    FOLDER.mkdir(parents=True, exist_ok=True)
    headers = "".join(file.read_text() for file in sorted(CSRC.rglob("*.h")))
    includes = ["-I", str(CSRC), "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    compile_ = [compiler, *OPTIONS, *more, *includes, "-c", "-x", "c++"]
    objects = [
        made(f"{source.stem}.o", [*compile_, str(source)], headers + source.read_text()) for source in sources
    ]
    link = [compiler, "-shared", *more, *map(str, objects)]
    return made("_cuda.so", link, "")


def made(name: str, command: list[str], content: str) -> Path:
    """What a command makes of some content, kept under a name that has both in it."""
    key = hashlib.sha256("\0".join([*command, content]).encode()).hexdigest()[:16]
    out = FOLDER / f"{key}-{name}"
    if not out.exists():
        partial = FOLDER / f"{os.getpid()}-{out.name}"
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.replace(out)
    return out


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def module() -> ModuleType:
    return load(Path(os.environ["RLCORE_EMULATED"]) if "RLCORE_EMULATED" in os.environ else build())
