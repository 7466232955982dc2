"""Peak memory of one case in a process of its own: `python bench/memory.py CASE DTYPE N H V THREADS` prints JSON.

growth = peak resident set while the case runs - resident set before it - bytes of its outputs and gradients
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from time import perf_counter

import torch
from vocab_head_cases import Cases

MIB = 2**20


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found, field
    return int(found[1]) * 1024


def main(case: str, dtype: str, N: int, H: int, V: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # Code, threads and the buffers of the matrix library are no part of the case.
    Cases(64, 64, 512, getattr(torch, dtype)).function(case)()
    run = Cases(N, H, V, getattr(torch, dtype)).function(case)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew where the kernel allows it
    before = status("VmRSS")
    if status("VmHWM") - before > MIB * N / 64:
        raise SystemExit("memory: the peak of making the inputs hides that of the case")
    start = perf_counter()
    results = run()
    seconds = perf_counter() - start
    made = sum(x.numel() * x.element_size() for x in results)
    growth = (status("VmHWM") - before - made) / MIB
    print(json.dumps({"growth_mib": growth, "logits_mib": N * V * 4 / MIB, "seconds": seconds}))


if __name__ == "__main__":
    name, kind, *numbers = sys.argv[1:]
    main(name, kind, *map(int, numbers))
