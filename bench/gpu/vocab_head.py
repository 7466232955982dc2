"""vocab_head on a GPU, bf16: beside bare matrix products, beside peers, its memory, its error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
from clock import Bench
from measure import check, min_of_medians
from targets import Found, Result, Target, measures
from vocab_head_cases import FRESH, Cases, Results

import rlcore as rl

SHAPE, LONG, QUICK = (8192, 4096, 151936), 32768, (96, 32, 300)
OURS = "linear_policy_loss fwd+bwd, N 8,192, H 4,096, V 151,936"
LOGPROB = "linear_logprob fwd+bwd with entropy gradient, same shape"
# Half of the 0.5 GiB; with a float32 sum of d hidden for 8,192 rows it is three quarters.
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
LOW = "policy_loss of linear_logprob, low-memory setting"
SLOWER = Target("vocab_head.time_low", f"{LOW}: device time", "linear_policy_loss", "most", 1.5)
PACKAGES = {"trl": "trl", "liger": "liger-kernel", "cce": "cut-cross-entropy"}


@functools.cache
def cases(bench: Bench, N: int) -> Cases:
    return Cases(QUICK[0] * N // SHAPE[0] if bench.quick else N, *(QUICK if bench.quick else SHAPE)[1:],
                 torch.bfloat16, bench.device)  # fmt: skip


def low_memory(case: Cases) -> Results:
    """The loss by recompute, whose backward pass goes by tiles of the vocabulary: no float32 d weight."""
    out = rl.linear_logprob(case.hidden, case.weight, case.target, entropy=True, chunk_bytes=LOW_MEMORY)
    loss, metrics = rl.policy_loss(out.logp, case.batch, case.objective, out.entropy)
    return metrics["entropy"], loss.detach(), *torch.autograd.grad(loss, (case.hidden, case.weight))


@measures(PRODUCTS, RECOMPUTE, SLOWER, CUDA, *RATES)
def speed(bench: Bench) -> Found:
    """One race of all, so that the products are timed once per round."""
    case = cases(bench, SHAPE[0])
    contestants = {name: case.function(name) for name in (*FRESH, "policy_loss", "logprob_entropy")}
    contestants |= {"low_memory": lambda: low_memory(case), "cuda": lambda: in_cuda(case)}
    expected, left_out = case.expected(contestants), {}
    for name, function in contestants.items():
        try:
            checked(name, function, expected)
        except Exception as error:  # the others are measured all the same
            left_out[name] = reason(error)
    expected.clear()
    race = bench.race({k: v for k, v in contestants.items() if k not in left_out}, seconds=12.0)
    for target, ours, over in (
        (PRODUCTS, "policy_loss", FRESH), (RECOMPUTE, "logprob_entropy", (*FRESH, FRESH[0])),
        (SLOWER, "low_memory", ["policy_loss"]), (CUDA, "cuda", ["policy_loss"]),
    ):  # fmt: skip
        missing = [left_out[name] for name in (ours, *over) if name in left_out]
        yield target.missing(missing[0]) if missing else target.of_race(race, [ours], over, speedup=target is CUDA)
    for name, target in zip(FRESH, RATES, strict=True):
        seconds = min_of_medians(race.device.seconds[name])
        yield target.number(2 * case.N * case.H * case.V / seconds / 1e12)


def in_cuda(case: Cases) -> Results:
    with rl.backend("cuda"):
        return case.function("policy_loss")()


def checked(name: str, function: Callable[[], Results], expected: dict[str, Results]) -> None:
    """Runs a contestant; a wrong result is not timed."""
    found = function()
    if name in expected:
        check(name, found, expected[name], tolerance=2e-2)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def version_of(name: str) -> str:
    try:
        return version(PACKAGES.get(name, "torch"))
    except PackageNotFoundError:
        return ""


def memory_target(key: str, what: str, sum_: str, most: float) -> Target:
    yardstick = f"above inputs, results and the float32 sum of {sum_}"
    return Target(f"vocab_head.memory{key}", f"{what}: peak memory", yardstick, "most", most, "GiB")


# Each form has one float32 sum over all it walks through: of d weight by chunks of rows, of d hidden by tiles of the
# vocabulary, which is the smaller one.
MEMORY = {
    ("policy_loss", SHAPE[0]): memory_target("", "linear_policy_loss", "d weight", 2.5),
    ("low_memory", SHAPE[0]): memory_target("_low", LOW, "d hidden", 0.5),
    ("policy_loss", LONG): memory_target("_long", "linear_policy_loss, 32,768 tokens", "d weight", 2.5),
    ("low_memory", LONG): memory_target("_low_long", f"{LOW}, 32,768 tokens", "d hidden", 0.5),
}
SLOWER_LONG = Target("vocab_head.time_low_long", f"{LOW}, 32,768 tokens: device time", "linear_policy_loss", "most",
                     1.5)  # fmt: skip


@measures(*MEMORY.values(), SLOWER_LONG)
def memory(bench: Bench) -> Found:
    for N in (SHAPE[0], LONG):
        case = cases(bench, N)
        runs = {"policy_loss": case.function("policy_loss"), "low_memory": functools.partial(low_memory, case)}
        for name, function in runs.items():
            function()
            sum_ = 4 * case.H * (case.V if name == "policy_loss" else case.N) * bench.on_gpu
            growth = bench.growth(function)
            yield MEMORY[name, N].number((growth - sum_) / GIB, f"with that sum {growth / GIB:.2f} GiB")
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


@measures(*PEERS.values(), BEST)
def peers(bench: Bench) -> Found:
    """Each in a race with ours, those last whose first run searches longest for its configuration."""
    case = cases(bench, SHAPE[0])
    functions = {"compiled": case.compiled("aot_eager" if bench.quick else "inductor")}
    functions |= {name: case.function(name) for name in ("trl", "liger", "liger_by_sequence", "cce")}
    expected = case.expected(functions)
    found: dict[str, Result] = {}
    for names in (["compiled"], ["trl"], ["liger", "liger_by_sequence"], ["cce"]):
        target = PEERS[names[0]]
        try:
            for name in names:
                checked(name, functions[name], expected)
            race = bench.race({"ours": case.function("policy_loss"), **{n: functions[n] for n in names}}, seconds=4.0)
            results = [target.of_race(race, ["ours"], [name], version_of(names[0])) for name in names]
            yield found.setdefault(names[0], min(results, key=lambda row: row.measured))
        except KeyboardInterrupt:  # bench/gpu.sh: the time is over
            yield target.missing("out of time")
            break
        except Exception as error:  # a peer may fail in any way
            yield target.missing(reason(error))
    if not found:
        yield BEST.missing("no peer could be run")
        return
    name, best = min(found.items(), key=lambda item: item[1].measured)
    present = f"{name}; {sum(name in PACKAGES for name in found)} of 3 peers present"
    yield replace(best, key=BEST.key, measure=BEST.measure, yardstick=BEST.yardstick, asked=BEST.asked, note=present)
