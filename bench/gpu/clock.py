"""How the GPU benchmark measures: device time by events, call time by the host's clock, memory, launches.

Device time: a wait is queued first, so that the host is ahead and the kernels of a call run back to back however long
their launches take; then the L2 cache is flushed; events stand around one call. Call time: calls in a row, then one
wait for the device, per call. The two of all contestants are taken in turn, in an order that changes from round to
round; the minimum of medians counts, as on the CPU. Without a GPU both are the host's clock, and no measurement.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from measure import SHORTEST, TRIAL, Race
from targets import GpuRace
from torch import Tensor

Function = Callable[[], Any]
FLUSHED = 256 * 2**20  # bytes, above the L2 cache of every GPU so far
CYCLES = 2e9  # per second, of torch.cuda._sleep: near the boost clock; a little too many is no harm
LONGEST_WAIT = 0.05  # seconds


class Bench:
    """Where and with what shapes the rows are measured."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick, self.on_gpu = device, quick, device == "cuda"
        self._flushed = torch.empty(FLUSHED if self.on_gpu else 0, dtype=torch.uint8, device=device)

    def race(self, contestants: Mapping[str, Function], seconds: float = 4.0) -> GpuRace:
        """The caller has run each of them before, to check its result."""
        names = list(contestants)
        issue = {name: self._issue(contestants[name]) for name in names}
        loops = {name: self._loops(contestants[name]) for name in names}
        device: dict[str, list[float]] = {name: [] for name in names}
        call: dict[str, list[float]] = {name: [] for name in names}
        gc.collect()
        gc.disable()
        try:
            start, i = perf_counter(), 0
            while i < (2 if self.quick else 2 * TRIAL) or (
                not self.quick and i < 60 and (perf_counter() - start) * (1 + 1 / i) < seconds
            ):
                for name in names[i % len(names) :] + names[: i % len(names)]:
                    device[name].append(self._device_seconds(contestants[name], issue[name]))
                    call[name].append(self._call_seconds(contestants[name], loops[name]))
                i += 1
        finally:
            gc.enable()
        whole = i if i % TRIAL == 0 or self.quick else i - i % TRIAL
        return GpuRace(*(Race({k: v[:whole] for k, v in times.items()}) for times in (device, call)))

    def _issue(self, function: Function) -> float:
        """Seconds that the host needs to launch all of a call, while nothing else is queued."""
        self.synchronize()
        start = perf_counter()
        function()
        issued = perf_counter() - start
        self.synchronize()
        return issued

    def _loops(self, function: Function) -> int:
        return 1 if self.quick else min(1000, math.ceil(SHORTEST / self._call_seconds(function, 2)))

    def _device_seconds(self, function: Function, issue: float) -> float:
        if not self.on_gpu:
            return self._call_seconds(function, 1)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(CYCLES * 2 * min(issue, LONGEST_WAIT)))
        self._flushed.zero_()
        before.record()
        function()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1000

    def _call_seconds(self, function: Function, loops: int) -> float:
        self.synchronize()
        start = perf_counter()
        for _ in range(loops):
            function()
        self.synchronize()
        return max(perf_counter() - start, 1e-9) / loops

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def growth(self, function: Callable[[], tuple[Tensor, ...]]) -> float:
        """Peak bytes of a call above what was there before and above its results; 0 on the CPU.

        It ran before, so that code and the matrix library's workspace are not counted.
        """
        if not self.on_gpu:
            function()
            return 0.0
        gc.collect()
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)

    def launches(self, function: Function) -> int:
        """Kernels, copies and fills of one call; 0 on the CPU."""
        if not self.on_gpu:
            return 0
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            function()
            self.synchronize()
        return sum(x.device_type == DeviceType.CUDA and not x.is_user_annotation for x in found.events())
