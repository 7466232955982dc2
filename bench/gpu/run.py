"""bench/gpu.sh: builds, tests and measures in parts that have a time each, and writes gpu.json and gpu.md.

A part that fails or runs over its time is written down as that and the rest goes on; what it had is kept. The exit
status is 0 if every part was done and every test passed, 1 if not. --quick takes tiny shapes and the rlcore that is
installed, and runs without a GPU; its files never go where measured results are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SITE, PEERS, WHEELS = BUILD / "site", BUILD / "peers", ROOT / "bench" / "peers"
IN_ALL = 470  # seconds
# What the tests use where it is there.
OPTIONAL = ("hypothesis", "pytest_timeout", "xdist", "pytest_benchmark", "transformers")
# The static records hold what another version of the compiler made; they are checked where they were made.
KERNEL_TESTS = ("tests/kernels", "tests/cuda", "--ignore=tests/kernels/test_static.py",
                "--ignore=tests/cuda/test_static.py")  # fmt: skip
OTHER_TESTS = ("tests/algorithms", "tests/ops", "-m", "gpu")


@dataclass
class Part:
    name: str
    state: str  # done, failed, out of time, left out
    seconds: float = 0.0
    note: str = ""


class Run:
    """One run: where it writes, what time is left, how each part went."""

    def __init__(self, out: Path, quick: bool) -> None:
        self.out, self.quick, self.start = out, quick, perf_counter()
        self.log = out / "gpu.log"
        self.log.write_text("")
        self.parts: list[Part] = []

    def command(self, name: str, command: Sequence[Any], seconds: float, env: Mapping[str, str] | None = None) -> str:
        """Runs a command as a part, its output in the log; ends it and what it started where its time is over."""
        start = perf_counter()
        allowed = max(1.0, min(seconds, IN_ALL - (start - self.start)))
        print(f"--- {name} (at most {allowed:.0f} s)", flush=True)
        part = Part(name, "done")
        with self.log.open("ab") as file:
            file.write(f"\n--- {name}\n".encode())
            begin = file.tell()
            file.flush()
            process = subprocess.Popen(
                [str(x) for x in command], cwd=ROOT, env={**os.environ, **(env or {})}, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                if process.wait(timeout=allowed):
                    part.state, part.note = "failed", f"exit status {process.returncode}"
            except subprocess.TimeoutExpired:
                part.state, part.note = "out of time", f"{allowed:.0f} s were allowed"
                end(process)
        part.seconds = perf_counter() - start
        self.parts.append(part)
        output = self.log.read_bytes()[begin:].decode(errors="replace")
        if part.state != "done":
            print("\n".join(output.splitlines()[-15:]))
        print(f"    {part.state}, {part.seconds:.0f} s {part.note}", flush=True)
        return output

    def left_out(self, name: str, why: str) -> None:
        self.parts.append(Part(name, "left out", note=why))
        print(f"--- {name}: left out, {why}", flush=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started; pytest takes the interrupt as the moment to write its summary."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def build(run: Run) -> dict[str, str]:
    """The variables under which `import rlcore` is what was built here, with both extensions."""
    if run.quick:
        run.left_out("build", "--quick takes the rlcore that is installed")
        return {}
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation",
               "--no-compile", "--target", SITE, "-C", f"build-dir={BUILD / 'cmake'}", "."]  # fmt: skip
    jobs = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    run.command("build", command, 110, {"RLCORE_CUDA": "1", **jobs})
    if run.parts[-1].state != "done":
        # Without nvcc, or with one that refuses: what there is in Triton can still be tested and measured.
        run.command("build without CUDA", command, 60, jobs)
    return built()


def built() -> dict[str, str]:
    """Python's own rule would put the source tree, which has no extensions, before what was built."""
    return {"PYTHONPATH": str(SITE), "PYTHONSAFEPATH": "1"} if SITE.exists() else {}


def peers(run: Run, env: Mapping[str, str]) -> dict[str, str]:
    """With the wheels of bench/peers, for the process that compares with them."""
    wheels = sorted(WHEELS.glob("*.whl"))
    if run.quick or not wheels:
        run.left_out("peers", "--quick" if run.quick else f"no wheels in {WHEELS.relative_to(ROOT)}")
        return dict(env)
    shutil.rmtree(PEERS, ignore_errors=True)
    run.command("peers", [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile",
                          "--target", PEERS, *wheels], 30)  # fmt: skip
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, [env.get("PYTHONPATH", ""), str(PEERS)]))}


def tests(run: Run, name: str, selection: Sequence[str], seconds: float, env: Mapping[str, str]) -> dict[str, Any]:
    """Runs these tests, or with --quick only collects them; pytest's last line, and what went wrong."""
    # pyproject.toml's own options name plugins that may be missing.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider",
               "-q", "-ra", "--continue-on-collection-errors", *selection]  # fmt: skip
    command += ["--collect-only"] if run.quick else []
    if has("xdist") and not run.quick:  # most of the time goes into compiling kernels, on the CPU
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    command += ["--timeout", "120"] if has("pytest_timeout") else []
    # Matrix products are deterministic under this setting alone, and the tests ask for that.
    lines = run.command(name, command, seconds, {**env, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}).splitlines()
    part, last = run.parts[-1], lines[-1].strip("= ") if lines else ""
    part.note = last if part.state == "done" else f"{part.note}; {last}"
    return {"name": name, "result": last, "wrong": [x for x in lines if x.startswith(("FAILED ", "ERROR "))]}


def measure(run: Run, family: str, seconds: float, env: Mapping[str, str]) -> list[dict[str, Any]]:
    file = run.out / f"{family}.jsonl"
    file.unlink(missing_ok=True)
    script = Path(__file__).with_name("family.py")
    run.command(family, [sys.executable, script, family, file, *["--quick"] * run.quick], seconds, env)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    missing, part = sum("reason" in row for row in rows), run.parts[-1]
    part.note = "; ".join(filter(None, [part.note, f"{len(rows) - missing} rows", f"{missing} without a figure"]))
    return rows


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def environment() -> tuple[dict[str, Any], bool]:
    """What the numbers depend on, nothing that names a machine; whether there is a GPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which(query[0]) else []
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout if shutil.which("nvcc") else ""
    release = re.search(r"release ([\d.]+)", nvcc)
    facts = {
        "gpu": torch.cuda.get_device_name() if on_gpu else "cpu, not a measurement",
        "driver": driver[0] if driver else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": __import__("triton").__version__ if has("triton") else "none",
        "nvcc": release[1] if release else "none",
        "python": platform.python_version(),
        "missing": [name for name in OPTIONAL if not has(name)],
    }
    return facts, on_gpu


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, without a build; runs on the CPU too")
    parser.add_argument("--out", type=Path, help="where the files go (default: $OUT, or bench/results/<gpu>)")
    parser.add_argument("--only", default="", metavar="PARTS", help="build, tests, families, with commas between")
    parser.add_argument("--list", action="store_true", help="print the rows without measuring any")
    given = parser.parse_args()
    if not has("torch"):
        parser.error(f"{sys.executable} has no torch; PYTHON names another interpreter")
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    if given.list:
        from table import rows_without_figures

        print(rows_without_figures())
        return 0
    facts, on_gpu = environment()
    if not on_gpu and not given.quick:
        parser.error("torch finds no GPU here; --quick runs without one")
    run = Run(folder(given.out, given.quick, facts["gpu"]), given.quick)
    print(f"--- {facts['gpu']}, torch {facts['torch']}, triton {facts['triton']}; to {run.out}", flush=True)
    if facts["missing"]:
        print(f"    not installed: {', '.join(facts['missing'])}; tests that import them can not be collected")
    rows, tested = parts(run, set(filter(None, given.only.split(","))))
    write(run, facts, on_gpu and not given.quick, rows, tested)
    return int(any(part.state in ("failed", "out of time") for part in run.parts))


def folder(asked: Path | None, quick: bool, gpu: str) -> Path:
    if asked is None and quick:
        asked = BUILD / "quick"
    elif asked is None and os.environ.get("OUT"):
        asked = Path(os.environ["OUT"])
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    out = (asked or ROOT / "bench" / "results" / slug).resolve()
    out.mkdir(parents=True, exist_ok=True)
    return out


def parts(run: Run, only: set[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measured before tested: where time runs out, a test can be run again more cheaply than a figure."""
    wanted: Callable[[str], bool] = lambda name: not only or name in only  # noqa: E731
    env = build(run) if wanted("build") else {} if run.quick else built()
    beside = peers(run, env) if wanted("vocab_head") else {}
    rows: list[dict[str, Any]] = []
    for family, seconds in (("segments", 30), ("policy_loss", 60), ("prefix_attention", 50), ("vocab_head", 110)):
        if wanted(family):
            rows += measure(run, family, seconds, beside if family == "vocab_head" else env)
    tested = []
    if wanted("tests"):
        tested = [tests(run, "tests of kernels", KERNEL_TESTS, 150, env),
                  tests(run, "tests elsewhere", OTHER_TESTS, 60, env)]  # fmt: skip
    return rows, tested


def write(run: Run, facts: dict[str, Any], measurement: bool, rows: list[dict[str, Any]],
          tested: list[dict[str, Any]]) -> None:  # fmt: skip
    from table import markdown
    from targets import all_targets

    listed = [asdict(part) for part in run.parts]
    by_key = {row["key"]: row for row in rows}
    content = {"environment": facts, "measurement": measurement, "parts": listed, "tests": tested, "rows": rows}
    (run.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    text = markdown(facts, listed, all_targets(), by_key, measurement)
    (run.out / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
