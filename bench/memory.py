"""Peak memory of one case in a process of its own: `python bench/memory.py CASE DTYPE N H V THREADS` prints JSON.

growth = peak resident set while the case runs - resident set before it - bytes of its outputs and gradients

Large blocks come straight from the system and go back to it: in a hole that the inputs left in the heap they would lie
or not as chance has it, and not go back. Free memory that the allocator still holds is given back first, for the case
would grow into it unseen. The kernel may take back pages of code that were not used for a while; so anonymous memory is
sampled beside VmHWM, and the larger growth of the two counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from vocab_head_cases import Cases

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found, field
    return int(found[1]) * 1024


class AnonymousPeak(threading.Thread):
    """Samples the process's anonymous memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = status("RssAnon"), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, status("RssAnon"))


def large_blocks_from_the_system() -> None:
    """To be called before anything large is made."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)


def growth(run: Callable[[], Iterable[Tensor]], hidden: float) -> tuple[float, float]:
    """Peak memory in MiB that `run` needs beside its results, and its seconds. Ends the program where the peak before
    lies so high that more than `hidden` bytes would not be seen.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew where the kernel allows it
    before, anonymous = status("VmRSS"), status("RssAnon")
    if status("VmHWM") - before > hidden:
        raise SystemExit("memory: the peak of making the inputs hides that of the case")
    sampler = AnonymousPeak()
    sampler.start()
    start = perf_counter()
    results = run()
    seconds = perf_counter() - start
    peak = status("VmHWM") - before
    sampler.done.set()
    sampler.join()
    made = sum(x.numel() * x.element_size() for x in results)
    return (max(peak, sampler.peak - anonymous) - made) / MIB, seconds


def main(case: str, dtype: str, N: int, H: int, V: int, threads: int) -> None:
    large_blocks_from_the_system()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # Code, threads and the buffers of the matrix library are no part of the case.
    Cases(64, 64, 512, getattr(torch, dtype)).function(case)()
    run = Cases(N, H, V, getattr(torch, dtype)).function(case)
    mib, seconds = growth(run, MIB * N / 64)
    print(json.dumps({"growth_mib": mib, "logits_mib": N * V * 4 / MIB, "seconds": seconds}))


if __name__ == "__main__":
    name, kind, *numbers = sys.argv[1:]
    main(name, kind, *map(int, numbers))
