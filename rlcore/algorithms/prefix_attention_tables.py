"""Tables of a tree on its device: made once per stream that reads them, and kept for as long as a CUDA graph may."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Tables = TypeVar("Tables")

# A CUDA graph reads the tables that it was captured with whenever it runs: they are never freed.
_captured: dict[int, Any] = {}


def kept(make: Callable[..., Tables], node_table: Tensor, device: torch.device, *numbers: int | None) -> Tables:
    """make(nodes [K, 4] int64, device, *numbers), or what it returned before. A GPU has to be the current device.

    Every layer of a step has the same tree, and under recomputation not the same tensor: its content is the key.
    Tables are copied without waiting, into memory that their stream may have again once they are dropped: another
    stream has tables of its own. A graph under capture takes those of a run before it, since what is copied while
    capturing is not there until the graph runs; RuntimeError where there are none.
    """
    by_stream = _by_stream(make, node_table.numpy().tobytes(), device, *numbers)
    arguments = node_table.numpy(), device, *numbers
    if device.type != "cuda":
        if not by_stream:
            by_stream[0] = make(*arguments)
        return by_stream[0]
    if torch.cuda.is_current_stream_capturing():
        return _held(by_stream)
    stream = torch.cuda.current_stream(device)
    if stream.cuda_stream not in by_stream:
        by_stream[stream.cuda_stream] = _on_another_thread(stream, make, *arguments)
    return by_stream[stream.cuda_stream]


@lru_cache(maxsize=128)
def _by_stream(
    make: Callable[..., Tables], nodes: bytes, device: torch.device, *numbers: int | None
) -> dict[int, Tables]:
    """The tables made so far."""
    return {}


def _held(by_stream: dict[int, Tables]) -> Tables:
    if not by_stream:
        raise RuntimeError(
            "prefix_attention: expected a run with this tree before a CUDA graph is captured, as that run copies its "
            "tables to the GPU; got none"
        )
    tables = next(iter(by_stream.values()))
    _captured[id(tables)] = tables
    return tables


def _on_another_thread(stream: torch.cuda.Stream, make: Callable[..., Tables], *arguments: Any) -> Tables:
    """torch.compile's CUDA graphs have what their own thread allocates overwritten one day."""

    def run() -> Tables:
        with torch.cuda.stream(stream):
            return make(*arguments)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def moved(x: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    host = torch.from_numpy(x)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
