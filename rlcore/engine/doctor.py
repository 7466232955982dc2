"""What this machine is, what is installed, which kernels are live, whether they are right, and how fast they are.

Everything here needs torch and numpy alone: what else is missing is part of the answer.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlcore as rl

PACKAGES = (
    "torch", "numpy", "transformers", "tokenizers", "safetensors", "reasoning-gym", "math-verify", "tyro", "rich",
    "tensorboard", "matplotlib", "triton", "peft", "pyarrow", "wandb", "trackio",
)  # fmt: skip
# Largest difference to the reference in float64, as a share of its largest value: float32 kernels are some 1e-6 away.
TOLERANCE = 1e-4


def report() -> dict[str, Any]:
    """All findings, ready for JSON; `passed` says whether every self-test did."""
    tests = self_test()
    return {
        "rlcore": rl.__version__,
        "machine": machine(),
        "versions": versions(),
        "backends": rl.backends(),
        "native": native_features(),
        "self_test": tests,
        "speed": speed(),
        "passed": all(test["passed"] for test in tests),
    }


def machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def processor() -> str:
    """The processor's name; Linux tells it in /proc alone."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def versions() -> dict[str, str | None]:
    """The version of Python and of every package that rlcore can use; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def native_features() -> dict[str, Any]:
    """Compiler, instruction set and OpenMP of the C++ module, or why it can not be loaded."""
    try:
        return dict(importlib.import_module("rlcore._native").features())
    except ImportError as error:
        return {"error": str(error)}


def self_test() -> list[dict[str, Any]]:
    """Every kernel family on every live backend against the reference in float64: error, and whether it is small."""
    results = []
    for backend, state in rl.backends().items():
        if backend == "reference" or state != "live":
            continue
        device = "cpu" if backend == "native" else "cuda"
        for family, case in FAMILIES.items():
            result: dict[str, Any] = {"family": family, "backend": backend}
            try:
                result["error"] = error_of(case, backend, device)
                result["passed"] = result["error"] <= TOLERANCE
            except Exception as failure:  # whatever a kernel does wrong is a finding
                result |= {"error": None, "passed": False, "why": f"{type(failure).__name__}: {failure}"}
            results.append(result)
    return results


Case = Callable[[torch.Generator, torch.dtype, str], list[Tensor]]


def error_of(case: Case, backend: str, device: str) -> float:
    """The largest difference of a case's results to the reference, each as a share of the largest reference value."""

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        with rl.backend(name):
            return case(torch.Generator().manual_seed(0), dtype, device)

    pairs = zip(run(backend, torch.float32), run("reference", torch.float64), strict=True)
    errors = [
        ((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12)).item() for ours, exact in pairs
    ]
    # NaN compares as smaller than everything: it must not pass.
    return max(errors) if all(error == error for error in errors) else float("inf")


LENGTHS = (7, 1, 0, 40, 3, 13)
N = sum(LENGTHS)


def normal(generator: torch.Generator, dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    """The same numbers in every dtype: drawn in float32."""
    return torch.randn(*shape, generator=generator).to(device, dtype)


def borders(device: str) -> Tensor:
    return torch.tensor([0, *LENGTHS], device=device).cumsum(0)


def vocab_head(generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
    hidden = normal(generator, dtype, device, N, 32).requires_grad_()
    weight = normal(generator, dtype, device, 301, 32).requires_grad_()
    target = torch.randint(301, (N,), generator=generator).to(device)
    out = rl.linear_logprob(hidden, weight, target, temperature=0.7, entropy=True)
    assert out.entropy is not None
    (out.logp.sum() + 0.1 * out.entropy.sum()).backward()
    return [out.logp.detach(), out.entropy.detach(), grad_of(hidden), grad_of(weight)]


def segments(generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
    reward, value = normal(generator, dtype, device, N), normal(generator, dtype, device, N)
    advantage, returns = rl.gae(reward, value, borders(device), gamma=0.99, lam=0.9)
    group = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    total = rl.segment_sum(reward, offsets=borders(device))
    return [advantage, returns, total, rl.group_advantage(total, group)]


def prefix_attention(generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
    tree = rl.PrefixTree.from_groups([range(9), range(4)], [[range(5), range(1), range(12)], [range(3), range(7)]])
    tree = tree.to(device)
    q, k, v = (normal(generator, dtype, device, tree.M, heads, 16).requires_grad_() for heads in (4, 2, 2))
    out = rl.prefix_attention(q, k, v, tree)
    out.square().sum().backward()
    return [out.detach(), grad_of(q), grad_of(k), grad_of(v)]


def policy_loss(generator: torch.Generator, dtype: torch.dtype, device: str) -> list[Tensor]:
    logp = (normal(generator, dtype, device, N) - 2).requires_grad_()
    batch = rl.TokenBatch(
        torch.zeros(N, dtype=torch.int64, device=device),
        borders(device),
        advantage=normal(generator, dtype, device, N),
        old_logp=logp.detach() + 0.3 * normal(generator, dtype, device, N),
    )
    loss, _ = rl.policy_loss(logp, batch, rl.Objective(aggregate="seq_mean_token_mean"))
    loss.backward()
    return [loss.detach(), grad_of(logp)]


FAMILIES: dict[str, Case] = {
    "vocab_head": vocab_head,
    "segments": segments,
    "prefix_attention": prefix_attention,
    "policy_loss": policy_loss,
}


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def speed() -> dict[str, float]:
    """About a second on the default device: the rate of matrix products, and the folded loss beside its own three.

    ratio: time of `linear_policy_loss`, forward and backward, over that of three bare products of its shape, 6NHV.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    N, H, V = (8192, 1024, 32768) if device == "cuda" else (512, 256, 8192)
    generator = torch.Generator().manual_seed(0)
    hidden = normal(generator, torch.float32, device, N, H).requires_grad_()
    weight = (0.02 * normal(generator, torch.float32, device, V, H)).requires_grad_()
    d_logits = normal(generator, torch.float32, device, N, V)
    target = torch.randint(V, (N,), generator=generator).to(device)
    batch = rl.TokenBatch(target, advantage=normal(generator, torch.float32, device, N), offsets=offsets_of(N, device))
    objective = rl.Objective()

    def products() -> None:
        with torch.no_grad():
            hidden @ weight.T
            d_logits @ weight
            d_logits.T @ hidden

    def folded() -> None:
        loss, _ = rl.linear_policy_loss(hidden, weight, batch, objective)
        loss.backward()

    bare, ours = interleaved(products, folded, device)
    return {"gemm_gflops": 6 * N * H * V / bare / 1e9, "linear_policy_loss_ratio": ours / bare}


def offsets_of(rows: int, device: str) -> Tensor:
    return torch.arange(0, rows + 1, 64, device=device)


def interleaved(first: Callable[[], None], second: Callable[[], None], device: str) -> tuple[float, float]:
    """Medians in seconds, the two taking turns so that a busy machine slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + 0.8
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def as_text(found: dict[str, Any]) -> str:
    """The report for a reader."""
    here = found["machine"]
    memory = f"{here['memory_bytes'] / 2**30:.1f} GiB" if here["memory_bytes"] else "unknown"
    native = found["native"]
    features = {
        "c++ module": native.get("error") or f"{native['compiler']}, {native['build_type']}",
        "": "" if "error" in native else f"{native['isa']} instructions, OpenMP {'on' if native['openmp'] else 'off'}",
    }
    tests = {
        f"{test['family']} ({test['backend']})": ("pass" if test["passed"] else "FAIL")
        + (f", error {test['error']:.1e}" if test["error"] is not None else f", {test['why']}")
        for test in found["self_test"]
    }
    sections: dict[str, dict[str, Any]] = {
        "machine": {
            "system": here["system"],
            "processor": f"{here['processor']}, {here['cores']} cores for this process",
            "memory": memory,
            "gpu": ", ".join(here["gpus"]) or "none that torch can use",
        },
        "versions": {"rlcore": found["rlcore"]} | {k: v or "not installed" for k, v in found["versions"].items()},
        "backends": found["backends"] | {key: text for key, text in features.items() if text},
        "self-test": tests or {"reference": "live alone: there is nothing to compare with it"},
        "speed": {
            "matrix products": f"{found['speed']['gemm_gflops']:,.0f} GFLOP/s, {here['torch_threads']} threads",
            "folded loss": f"{found['speed']['linear_policy_loss_ratio']:.2f} x the time of its matrix products",
        },
    }
    return "\n".join(
        f"{title}\n" + "\n".join(f"  {name:26} {text}" for name, text in rows.items())
        for title, rows in sections.items()
    )
