"""Compiles every Triton kernel for every target, no GPU needed: `python bench/compile_kernels.py`, or `make static`.

A case calls a kernel's own launcher, on the CPU, with a launch replaced by a compilation for a target: so what is
compiled is what ships, with its block sizes, warps and specializations. Recorded per target and kernel in
bench/static/FAMILY.json: registers per thread, bytes of stack (what did not fit in registers), shared memory, and how
many instructions of the tensor cores and atomics the assembly has. tests/kernels/test_static.py holds them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

STATIC = Path(__file__).parent / "static"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a block can have, after opting in.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TENSOR_CORE = {
    "sm_80": r"\bmma\.sync", "sm_90": r"\bwgmma\.mma_async", "sm_100": r"\btcgen05\.mma", "gfx942": r"\bv_mfma_",
}  # fmt: skip
ATOMIC = {"cuda": r"\b(?:atom|red)\.", "hip": r"\b(?:global|flat|buffer)_atomic_"}


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one kernel: registers per thread, bytes of stack per thread and of shared memory per
    block, and how many instructions of a kind there are. Registers on AMD are vector registers, with accumulators."""

    kernel: str
    warps: int
    registers: int
    stack: int
    shared: int
    tensor_core: int
    atomics: int


class Offline:
    """A driver of a GPU that is not there. Each is a device of its own: launchers' caches go by device, so none begins
    with what another has compiled."""

    serial = itertools.count()

    def __init__(self, target: str) -> None:
        self.target = target
        self.device = f"{target} number {next(self.serial)}"

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(target: str) -> Iterator[list[Facts]]:
    """Inside the block every launch compiles its kernel for `target` and runs nothing; the list receives the facts."""
    found: list[Facts] = []
    active, run = driver._active, JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append(facts(self.__name__, kernel, target))
        return kernel

    driver._active, JITFunction.run = Offline(target), compile_only
    try:
        yield found
    finally:
        driver._active, JITFunction.run = active, run


def variants(kernel: Any) -> int:
    """How often the launches since the open `compiling` block began have compiled a kernel."""
    return len(kernel.device_caches[driver.active.get_current_device()][0])


def facts(name: str, kernel: Any, target: str) -> Facts:
    if target.startswith("sm_"):
        assembly = kernel.asm["ptx"]
        registers, stack = cubin_usage(kernel.asm["cubin"])
    else:
        assembly = kernel.asm["amdgcn"]
        registers = int(find(r"\.vgpr_count:\s+(\d+)", assembly))
        stack = int(find(r"\.private_segment_fixed_size:\s+(\d+)", assembly))
    count = lambda pattern: len(re.findall(pattern, assembly))  # noqa: E731
    return Facts(name, kernel.metadata.num_warps, registers, stack, kernel.metadata.shared,
                 count(TENSOR_CORE[target]), count(ATOMIC[TARGETS[target].backend]))  # fmt: skip


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) per thread of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = text[text.index("Function") :]
    return int(find(r"REG:(\d+)", usage)), int(find(r"STACK:(\d+)", usage)) + int(find(r"LOCAL:(\d+)", usage))


def find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in {text[:200]}"
    return match[1]


Case = Callable[[], Any]


def compile_family(cases: dict[str, Case], target: str) -> dict[str, list[Facts]]:
    """The facts of all kernels that each case launches."""
    out = {}
    for label, case in cases.items():
        with compiling(target) as found:
            case()
        assert found, f"{label} launched nothing"
        out[label] = list(dict.fromkeys(found))
    return out


def main() -> None:
    from static_cases import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME")
    parser.add_argument("--write", action="store_true", help="replace what bench/static has recorded")
    options = parser.parse_args()
    for family in options.families:
        file = STATIC / f"{family}.json"
        stored = json.loads(file.read_text()) if file.exists() else {}
        for target in options.targets:
            found = compile_family(FAMILIES[family], target)
            stored[target] = {label: [asdict(f) for f in kernels] for label, kernels in found.items()}
            for label, kernels in found.items():
                for f in kernels:
                    print(f"{target:7} {label:40} {f.kernel:32} {f.registers:4} registers {f.stack:5} stack"
                          f" {f.shared:7} shared {f.tensor_core:4} tensor-core {f.atomics:3} atomics", flush=True)
        if options.write:
            STATIC.mkdir(exist_ok=True)
            content = {"triton": triton.__version__} | {t: stored[t] for t in TARGETS if t in stored}
            file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
