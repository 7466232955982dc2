"""`make asan` and `make tsan`: the native tests on a module that was built under a sanitizer.

As a program (`sanitizers.py address|thread`) it builds csrc into build/, beside the installed module and not in its
place, makes sure that planted faults are reported, and runs the tests once per instruction set; `address` also runs the
CUDA kernels, emulated. Any report ends the run with an error. As a pytest plugin of these runs it puts the built module
in the place of `rlcore._native`, and spreads the tests over numbers of threads.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = {"address": "libasan.so", "thread": "libtsan.so"}
FAULTS = {
    "address": {"bounds": "heap-buffer-overflow", "overflow": "signed integer overflow"},
    "thread": {"race-static": "data race", "race-dynamic": "data race"},
}
# The interpreter never frees all it allocates. Code that was not built here is not followed: torch's own threads
# synchronize where ThreadSanitizer does not look.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:second_deadlock_stack=1",
}
# Of the emulated CUDA kernels; csrc/CMakeLists.txt has the same for the others.
ADDRESS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# torch.compile has no part in the native code; the instruction sets have runs of their own.
LEFT_OUT = ("compile", "every_instruction_set")
ISAS = ["avx512", "avx2", "baseline"]
VECTOR_FAMILIES = "vocab_head or policy_loss or prefix_attention"  # RLCORE_VECTOR_SOURCES of csrc/CMakeLists.txt


# ---- the plugin


def pytest_configure() -> None:
    import rlcore  # noqa: F401  (a submodule needs its package)

    (path,) = Path(os.environ["RLCORE_SANITIZED"]).glob("_native*.so")
    spec = importlib.util.spec_from_file_location("rlcore._native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["rlcore._native"] = module
    assert module.features()["isa"] == os.environ["RLCORE_ISA"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not any(name in item.nodeid for name in LEFT_OUT)]


@pytest.fixture(autouse=True)
def one_to_four_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 + request.session.items.index(request.node) % 4)
    yield
    torch.set_num_threads(before)


# ---- the program


def run(command: list[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout + done.stderr)


def must(command: list[str | Path]) -> str:
    done = run(command)
    if done.returncode != 0:
        sys.exit(done.stdout + f"\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def tool(name: str) -> Path | str:
    beside = Path(sys.executable).parent / name
    return beside if beside.exists() else name


def build(kind: str, compiler: str) -> Path:
    """The module and the planted faults, in a directory of their own."""
    out = ROOT / "build" / f"sanitize-{kind}"
    pybind11 = must([sys.executable, "-m", "pybind11", "--cmakedir"]).strip()
    must([
        tool("cmake"), "-S", ROOT / "csrc", "-B", out, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DRLCORE_SANITIZE={kind}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}",
    ])  # fmt: skip
    must([tool("cmake"), "--build", out])
    (module,) = out.glob("_native*.so")
    if kind == "thread":
        symbols = must(["nm", "-D", "--undefined-only", module]).split()
        taken = sorted(name for name in symbols if name.startswith(("GOMP_", "omp_")))
        if taken:
            sys.exit(f"csrc/sanitize/openmp.cpp has no {', '.join(taken)}: add it, or races there go unseen")
    return out


def start_of(planted: Path) -> tuple[list[str | Path], list[str]] | None:
    """What to put before a command so that the sanitizer can place its memory, and the instruction sets to run.

    None where nothing helps. The faultless program must pass."""
    starts: list[list[str | Path]] = [[], ["setarch", "-R"]]
    for start in starts if shutil.which("setarch") else starts[:1]:
        done = run([*start, planted, "clean"], **OPTIONS)
        if done.returncode == 0:
            best = done.stdout.split()[-1]
            return start, ISAS[ISAS.index(best) :]
        if "unexpected memory mapping" not in done.stdout and not start:
            sys.exit(done.stdout + "\na program without a fault was reported")
    return None


def check_planted(kind: str, planted: Path, start: list[str | Path]) -> None:
    for fault, report in FAULTS[kind].items():
        done = run([*start, planted, fault], **OPTIONS)
        if done.returncode == 0 or report not in done.stdout:
            sys.exit(done.stdout + f"\nthe planted fault '{fault}' was not reported")
        print(f"planted {fault}: reported", flush=True)


def main(kind: str) -> int:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    library = compiler and Path(must([compiler, f"-print-file-name={LIBRARY[kind]}"]).strip())
    if compiler is None or not library or not library.is_absolute():
        print(f"skipped: needs GCC with {LIBRARY[kind]}; {compiler or 'g++'} has none (choose with CXX=)")
        return 0
    out = build(kind, compiler)
    found = start_of(out / "planted")
    if found is None:
        print("skipped: ThreadSanitizer can not place its memory on this machine")
        return 0
    start, isas = found
    check_planted(kind, out / "planted", start)

    # libstdc++ must be there when the runtime looks for __cxa_throw; the interpreter does not bring it.
    standard = Path(must([compiler, "-print-file-name=libstdc++.so.6"]).strip())
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": f"{library.resolve()} {standard}",
        "PYTHONPATH": str(ROOT / "tests"),
        "RLCORE_SANITIZED": str(out),
    }
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "sanitizers", "-p", "no:cacheprovider",
                      "--capture=sys", "-W", "ignore", "-m", "not slow and not peers"]  # fmt: skip
    for isa in isas:
        began = time.monotonic()
        chosen = "" if isa == isas[0] else VECTOR_FAMILIES
        done = subprocess.run(
            [*start, *pytest_command, "-k", chosen, "tests/test_package_native.py", "tests/ops", *sys.argv[2:]],
            cwd=ROOT, env={**environment, "RLCORE_ISA": isa},
        )  # fmt: skip
        print(f"{kind} {isa}: exit status {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode != 0:
            return done.returncode
    if kind == "address":
        return check_emulated([*start, *pytest_command], {**environment, "RLCORE_ISA": isas[0]})
    return 0


def check_emulated(command: list[str | Path], environment: dict[str, str]) -> int:
    """The tests of the CUDA kernels, emulated under the sanitizers."""
    began = time.monotonic()
    chosen = ["-k", "not static and not emulation", "tests/cuda", *sys.argv[2:]]
    module = {"RLCORE_EMULATED": str(emulated.build(*ADDRESS)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *chosen], cwd=ROOT, env={**environment, **module})
    print(f"address, CUDA emulated: exit status {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
