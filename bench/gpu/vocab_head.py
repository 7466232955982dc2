"""vocab_head on a GPU, bf16: beside bare matrix products, beside peers, its memory, its error."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

import torch
from clock import Bench
from measure import check, min_of_medians
from targets import Found, Target, measures
from vocab_head_cases import FRESH, Cases, Results

import rlcore as rl

SHAPE, LONG, QUICK = (8192, 4096, 151936), 32768, (96, 32, 300)
OURS = "linear_policy_loss fwd+bwd, N 8,192, H 4,096, V 151,936"
LOGPROB = "linear_logprob fwd+bwd with entropy gradient, same shape"
# Of the 0.5 GiB a third is left for what else a chunk takes: its gradient in bf16 beside its logits in float32.
LOW_MEMORY = 2**28
GIB = 2**30

PRODUCTS = Target("vocab_head.policy_loss", OURS, "three bare cuBLAS products", "most", 1.15)
RECOMPUTE = Target("vocab_head.logprob", LOGPROB, "four bare cuBLAS products", "most", 1.15)
PEERS = {
    "trl": Target("vocab_head.trl", f"{OURS}: device time", "TRL", "least", 1.0),
    "liger": Target("vocab_head.liger", f"{OURS}: device time", "Liger", "least", 1.0),
    "cce": Target("vocab_head.cce", f"{OURS}: device time", "cut-cross-entropy", "least", 1.0),
    "compiled": Target("vocab_head.compiled", f"{OURS}: device time", "torch.compile", "least", 1.0),
}
BEST = Target("vocab_head.best", f"{OURS}: device time", "the best of these", "least", 1.25)
CUDA = Target("vocab_head.cuda", "linear_policy_loss, row passes in CUDA C++", "in Triton")
RATES = tuple(Target(f"vocab_head.product_{i}", f"bare product {name}", "", unit="TFLOP/s")
              for i, name in enumerate(FRESH))  # fmt: skip
SLOWER = Target("vocab_head.time_low", "linear_policy_loss, low-memory setting: device time", "default", "most", 1.5)
PACKAGES = {"trl": "trl", "liger": "liger-kernel", "cce": "cut-cross-entropy"}


@functools.cache
def cases(bench: Bench, N: int) -> Cases:
    return Cases(QUICK[0] * N // SHAPE[0] if bench.quick else N, *(QUICK if bench.quick else SHAPE)[1:],
                 torch.bfloat16, bench.device)  # fmt: skip


def low_memory(case: Cases) -> Results:
    loss, metrics = rl.linear_policy_loss(
        case.hidden, case.weight, case.batch, case.objective, chunk_bytes=LOW_MEMORY
    )  # fmt: skip
    return metrics["entropy"], loss.detach(), *torch.autograd.grad(loss, (case.hidden, case.weight))


@measures(PRODUCTS, RECOMPUTE, SLOWER, *PEERS.values(), BEST, CUDA, *RATES)
def speed(bench: Bench) -> Found:
    """One race of all, so that the products are timed once per round."""
    case = cases(bench, SHAPE[0])
    contestants = {name: case.function(name) for name in (*FRESH, "policy_loss", "logprob_entropy")}
    contestants["low_memory"] = lambda: low_memory(case)
    contestants["compiled"] = case.compiled("aot_eager" if bench.quick else "inductor")
    contestants |= {name: case.function(name) for name in ("trl", "liger", "liger_by_sequence", "cce")}
    contestants["cuda"] = lambda: in_cuda(case)
    left_out = checked(contestants, case)
    race = bench.race({k: v for k, v in contestants.items() if k not in left_out}, seconds=20.0)
    seconds = {name: min_of_medians(times) for name, times in race.device.seconds.items()}
    for target, ours, over in (
        (PRODUCTS, "policy_loss", FRESH), (RECOMPUTE, "logprob_entropy", (*FRESH, FRESH[0])),
        (SLOWER, "low_memory", ["policy_loss"]),
    ):  # fmt: skip
        yield target.missing(left_out[ours]) if ours in left_out else target.of_race(race, [ours], over)
    if "liger_by_sequence" in seconds and seconds["liger_by_sequence"] < seconds.get("liger", float("inf")):
        race.device.seconds["liger"] = race.device.seconds["liger_by_sequence"]
        race.call.seconds["liger"] = race.call.seconds["liger_by_sequence"]
        left_out.pop("liger", None)
    if "policy_loss" in left_out:
        raise RuntimeError(left_out["policy_loss"])
    for name, target in PEERS.items():
        yield (target.missing(left_out[name]) if name in left_out
               else target.of_race(race, ["policy_loss"], [name], note=version_of(name)))  # fmt: skip
    present = [name for name in PEERS if name not in left_out]
    if present:
        best = min(present, key=lambda name: min_of_medians(race.device.seconds[name]))
        peers = sum(name in PACKAGES for name in present)
        yield BEST.of_race(race, ["policy_loss"], [best], note=f"{best}; {peers} of 3 peers present")
    else:
        yield BEST.missing("no peer could be run")
    yield (CUDA.missing(left_out["cuda"]) if "cuda" in left_out
           else CUDA.of_race(race, ["cuda"], ["policy_loss"], speedup=True))  # fmt: skip
    for name, target in zip(FRESH, RATES, strict=True):
        yield target.number(2 * case.N * case.H * case.V / seconds[name] / 1e12)


def in_cuda(case: Cases) -> Results:
    with rl.backend("cuda"):
        return case.function("policy_loss")()


def checked(contestants: dict, case: Cases) -> dict[str, str]:
    """Runs every contestant once: those that can not be run or give another result, with the reason."""
    left_out: dict[str, str] = {}
    expected = case.expected(contestants)
    for name, function in contestants.items():
        try:
            found = function()
            if name in expected:
                check(name, found, expected[name], tolerance=2e-2)
        except Exception as error:  # a peer may fail in any way: the others are measured all the same
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return left_out


def version_of(name: str) -> str:
    try:
        return version(PACKAGES.get(name, "torch"))
    except PackageNotFoundError:
        return ""


def memory_target(key: str, what: str, most: float) -> Target:
    yardstick = "above inputs, results and the float32 d weight"
    return Target(f"vocab_head.memory{key}", f"linear_policy_loss{what}: peak memory", yardstick, "most", most, "GiB")


MEMORY = {
    ("policy_loss", SHAPE[0]): memory_target("", "", 2.5),
    ("low_memory", SHAPE[0]): memory_target("_low", ", low-memory setting", 0.5),
    ("policy_loss", LONG): memory_target("_long", ", 32,768 tokens", 2.5),
    ("low_memory", LONG): memory_target("_low_long", ", 32,768 tokens, low-memory setting", 0.5),
}
SLOWER_LONG = Target("vocab_head.time_low_long", "linear_policy_loss, 32,768 tokens, low-memory setting: device time",
                     "default", "most", 1.5)  # fmt: skip


@measures(*MEMORY.values(), SLOWER_LONG)
def memory(bench: Bench) -> Found:
    for N in (SHAPE[0], LONG):
        case = cases(bench, N)
        runs = {"policy_loss": case.function("policy_loss"), "low_memory": functools.partial(low_memory, case)}
        for name, function in runs.items():
            function()
            growth = bench.growth(function) - 4 * case.H * case.V * bench.on_gpu
            yield MEMORY[name, N].number(growth / GIB)
        if N == LONG:
            yield SLOWER_LONG.of_race(bench.race(runs, seconds=3.0), ["low_memory"], ["policy_loss"])


ERROR = Target("vocab_head.error", "log-prob, error against float64, peaked distributions", "float32 logits", "most",
               1.0)  # fmt: skip


@measures(ERROR)
def error(bench: Bench) -> Found:
    """Root mean square. The label's logit stands 10 to 20 above the rest, so that p -> 1 and log p -> 0."""
    N, H, V = QUICK if bench.quick else (2048, 1024, 32000)
    weight = torch.randn(V, H, device=bench.device).mul_(H**-0.5).bfloat16()
    target = torch.randint(V, (N,), device=bench.device)
    height = 10 + 10 * torch.rand(N, 1, device=bench.device)
    hidden = (torch.randn(N, H, device=bench.device) + height * weight[target].float()).bfloat16()
    index = torch.arange(N, device=bench.device)
    exact, plain = ((hidden.to(t) @ weight.to(t).t()).log_softmax(-1)[index, target].double()
                    for t in (torch.float64, torch.float32))  # fmt: skip
    ours = rl.linear_logprob(hidden, weight, target).logp.double()
    ratios = [float((ours - exact)[part].norm() / (plain - exact)[part].norm())
              for part in (slice(None), slice(0, None, 2), slice(1, None, 2))]  # fmt: skip
    yield ERROR.number(ratios[0], "spread: even against odd rows", abs(ratios[1] - ratios[2]) / ratios[0])
