"""Compiles the CUDA kernels for every target, no GPU needed: `python bench/compile_cuda.py`, or `make static`.

Recorded per target and kernel in bench/static/cuda.json, as ptxas says it: registers per thread, bytes of stack (what
did not fit in registers), shared memory per block. tests/cuda/test_static.py holds them. Needs nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
RECORD = ROOT / "bench" / "static" / "cuda.json"
SOURCES = tuple(sorted(file.stem for file in (CSRC / "cuda").glob("*.cu")))
TARGETS = ("sm_80", "sm_90", "sm_100")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '\w+'.*?(?P<stack>\d+) bytes stack frame"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Facts:
    """Registers per thread, bytes of stack per thread, bytes of shared memory per block of one kernel."""

    kernel: str
    registers: int
    stack: int
    shared: int


def compiler() -> str | None:
    return shutil.which("nvcc")


def version() -> str:
    text = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else "unknown"


def compile_source(source: str, target: str) -> list[Facts]:
    """The facts of all kernels of csrc/cuda/SOURCE.cu, compiled as the install does; warnings are errors."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(compiler()), "-std=c++17", "-O3", "-cubin", f"-arch={target}", "-Xptxas=-v",
                   "-Werror=all-warnings", f"-I{CSRC}", "-o", os.path.join(folder, "out.cubin"),
                   str(CSRC / "cuda" / f"{source}.cu")]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    found = [
        Facts(readable(m["name"]), int(m["registers"]), int(m["stack"]), shared_of(m["rest"]))
        for m in ENTRY.finditer(done.stderr)
    ]
    assert found and len(found) == done.stderr.count("Compiling entry function"), done.stderr
    return sorted(found, key=lambda facts: facts.kernel)


def shared_of(rest: str) -> int:
    match = re.search(r"(\d+) bytes smem", rest)
    return int(match[1]) if match else 0


def readable(mangled: str) -> str:
    """`gradient_kernel<float, Half, true>` of a mangled name."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\w+::|\(anonymous namespace\)::", "", plain.removeprefix("void "))
    depth, end = 0, len(plain)
    for i, c in enumerate(plain):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    return plain[:end]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), metavar="NAME")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="replace what bench/static has recorded")
    options = parser.parse_args()
    if compiler() is None:
        print("skipped: no nvcc")
        return
    stored = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for target in options.targets:
        for source in options.sources:
            facts = compile_source(source, target)
            stored.setdefault(target, {})[source] = [asdict(f) for f in facts]
            for f in facts:
                print(f"{target:7} {source:12} {f.kernel:48} {f.registers:4} registers {f.stack:4} stack"
                      f" {f.shared:6} shared", flush=True)  # fmt: skip
    if options.write:
        RECORD.parent.mkdir(exist_ok=True)
        content = {"nvcc": version()} | {t: dict(sorted(stored[t].items())) for t in TARGETS if t in stored}
        RECORD.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
