"""Which implementation runs: the choice of backend, and what is live on this machine.

Without a choice ("auto") every op takes the fastest implementation that exists for its device: chunked or fused
forms with native or Triton row passes where they are built, torch elsewhere. `backend("reference")` makes every op
call the plain differentiable functions of `rlcore.algorithms`; it is the only choice that can be differentiated twice.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from rlcore.algorithms.prefix_attention_varlen import package

BACKENDS = ("reference", "native", "triton", "cuda")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# A plain module global rather than a context variable: torch.compile guards on its value. What differentiates stores
# it in its forward pass: a backward pass may run outside of the block.
_requested: str | None = None
_batch_invariant = False


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend: "reference", "native", "triton" or "cuda" (process-wide).

    Raises ValueError for an unknown name, RuntimeError for a backend that is not live here (with the reason).
    """
    global _requested
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {name!r}")
    state = backends()[name]
    if state != "live":
        raise RuntimeError(f"backend {name!r} is not live: {state}")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def requested() -> str | None:
    """The backend named by the innermost `with rl.backend(...)`, or None for automatic choice."""
    return _requested


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside the block a row's log-prob and entropy are the same bits in any batch, at any place in it (process-wide).

    `linear_logprob`, `linear_policy_loss` and `vocab_parallel_logprob` then run the fused Triton kernel, whose tiles do
    not depend on the batch, and raise RuntimeError on a device without Triton. Gradients are as ever, and `logprob`
    needs no such help.
    """
    global _batch_invariant
    previous, _batch_invariant = _batch_invariant, True
    try:
        yield
    finally:
        _batch_invariant = previous


def is_batch_invariant(x: Tensor) -> bool:
    """Whether an op on x must be batch-invariant; RuntimeError where it can not be."""
    if _batch_invariant and not (runs_triton(x, _requested) and x.dtype != torch.float64):
        why = "float64 has no such kernel" if x.dtype == torch.float64 else f"triton: {_triton_state()}"
        asked = f", backend {_requested!r} is asked for" if _requested else ""
        raise RuntimeError(f"batch_invariant: needs the Triton backend; {x.device}{asked}, {why}")
    return _batch_invariant


def backends() -> dict[str, str]:
    """Every backend with "live", or the reason why it is not; under "flash" what attention on a GPU is composed of."""
    return {
        "reference": "live",
        "native": _native_state(),
        "triton": _triton_state(),
        "cuda": _cuda_state(),
        "flash": _flash_state(),
    }


@functools.cache
def native() -> ModuleType | None:
    """The C++ extension `rlcore._native`, or None where it was not built."""
    try:
        return importlib.import_module("rlcore._native")
    except ImportError:
        return None


def _native_state() -> str:
    if native() is not None:
        return "live"
    if importlib.util.find_spec("rlcore._native") is None:
        return "rlcore._native was not built (no C++ compiler or Python headers at install time)"
    return "rlcore._native was built but can not be loaded here"


def runs_triton(x: Tensor, requested: str | None) -> bool:
    """Whether an op on x runs in Triton: on CUDA by itself, on the CPU in the interpreter where that is asked for."""
    takes = x.is_cuda if not requested else requested == "triton" and (x.is_cuda or _interprets())
    return takes and _triton_state() == "live"


def on_device(f: Callable[Concatenate[Tensor, Arguments], Result]) -> Callable[Concatenate[Tensor, Arguments], Result]:
    """f on the device of its first argument: kernels are launched on the current one, wherever their arguments lie.

    Not for what torch.compile looks into.
    """

    @functools.wraps(f)
    def run(x: Tensor, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.cuda.device_of(x):
            return f(x, *args, **kwargs)

    return run


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_state() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interprets():
        return "live"  # in its interpreter, for tensors of any device: what the tests use
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    return "live"


@functools.cache
def _cuda() -> ModuleType | None:
    try:
        return importlib.import_module("rlcore._cuda")
    except ImportError:
        return None


def cuda() -> ModuleType:
    """The CUDA C++ extension `rlcore._cuda`, where `runs_cuda` allows it."""
    module = _cuda()
    assert module is not None
    return module


def runs_cuda(x: Tensor) -> bool:
    """Whether an op on x runs in CUDA C++: only where that is asked for, since nothing was measured."""
    return _requested == "cuda" and takes_cuda(x)


def takes_cuda(x: Tensor) -> bool:
    """Whether the kernels of `rlcore._cuda` can run on x.

    The tests put an emulation in its place, which takes tensors of the CPU.
    """
    return (module := _cuda()) is not None and x.is_cuda == (module.features()["cuda"] > 0)


def cuda_stream(x: Tensor) -> int:
    """The stream that torch runs on, as an address."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


@functools.cache
def _cuda_state() -> str:
    if importlib.util.find_spec("rlcore._cuda") is None:
        return "rlcore._cuda was not built (set RLCORE_CUDA=1 at install time; it needs nvcc)"
    if _cuda() is None:
        return "rlcore._cuda was built but can not be loaded here"
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    return "live"


@functools.cache
def _flash_state() -> str:
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if package() is not None:
        return f"flash-attn {importlib.metadata.version('flash-attn')}"
    if importlib.util.find_spec("flash_attn") is None:
        return "torch's own flash attention (flash-attn is not installed: extra `flash`)"
    return "torch's own flash attention (flash-attn can not be loaded here, or is older than 2.7)"
