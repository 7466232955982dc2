"""policy_loss on a GPU: loss, gradient and every metric of the clipped surrogate with a KL term, beside plain torch."""

from __future__ import annotations

import torch
from clock import Bench
from measure import check
from targets import Found, Target, measures
from test_policy_loss import BETA, HIGH, LOW, plain_loss
from torch import Tensor

import rlcore as rl

OURS = "policy_loss with metrics, forward and backward, 1,048,576 tokens"
LAUNCHES = Target("policy_loss.launches", f"{OURS}: launches", "", "most", 2, "launches")
EAGER = Target("policy_loss.eager", f"{OURS}: call time", "plain torch", "least", 20.0, call=True)
COMPILED = Target("policy_loss.compiled", f"{OURS}: call time", "torch.compile", "least", 3.0, call=True)
ON_DEVICE = Target("policy_loss.device", f"{OURS}: device time", "torch.compile", "least", 1.0)
CUDA = Target("policy_loss.cuda", "policy_loss in CUDA C++", "in Triton")


@measures(LAUNCHES, EAGER, COMPILED, ON_DEVICE, CUDA)
def clipped_surrogate_with_kl(bench: Bench) -> Found:
    sequences, length = (4, 16) if bench.quick else (256, 4096)
    N = sequences * length
    old = -torch.rand(N, device=bench.device)
    reference = old + 0.1 * torch.randn_like(old)
    logp = (old + 0.2 * torch.randn_like(old)).requires_grad_()
    advantage = torch.randn(sequences, device=bench.device)
    offsets = torch.arange(sequences + 1, device=bench.device) * length
    target = torch.zeros(N, dtype=torch.int64, device=bench.device)
    batch = rl.TokenBatch(target, offsets, advantage=advantage, old_logp=old, ref_logp=reference)
    objective = rl.Objective(clip=(LOW, HIGH), kl=rl.KL("k3", BETA))
    per_token = advantage.repeat_interleave(length)
    upstream = torch.ones((), device=bench.device)  # or autograd would launch a fill of its own

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logp, upstream)[0]

    def ours() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, metrics = rl.policy_loss(logp, batch, objective)
        return loss.detach(), gradient(loss), metrics

    def in_cuda() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with rl.backend("cuda"):
            return ours()

    def plain(f=plain_loss) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, metrics = f(logp, old, reference, per_token)
        return loss.detach(), gradient(loss), metrics

    fused = torch.compile(plain_loss, fullgraph=True, backend="aot_eager" if bench.quick else "inductor")
    (*expected, metrics), cuda = plain(), rl.backends()["cuda"]
    contestants = {"ours": ours, "eager": plain, "compiled": lambda: plain(fused)}
    if cuda == "live":
        contestants["cuda"] = in_cuda
    for name, function in contestants.items():
        *found, numbers = function()
        check(name, found, expected)
        check(f"{name}, metrics", [numbers[key] for key in metrics], list(metrics.values()), tolerance=1e-3)
    yield LAUNCHES.number(bench.launches(ours), "the product with the incoming gradient counts")
    race = bench.race(contestants)
    yield EAGER.of_race(race, ["ours"], ["eager"])
    yield COMPILED.of_race(race, ["ours"], ["compiled"])
    yield ON_DEVICE.of_race(race, ["ours"], ["compiled"])
    yield CUDA.of_race(race, ["cuda"], ["ours"], speedup=True) if cuda == "live" else CUDA.missing(cuda)
