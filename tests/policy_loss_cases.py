"""Minibatches of the policy loss: as the oracle's cases, and as the tensors and objectives of the library."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

import rlcore as rl
from oracles import policy_loss as oracle

RATIOS = ("none", "token", "segment", "sequence")
SURROGATES = ("ppo", "cispo", "reinforce")
AGGREGATES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
CUBE = list(itertools.product(RATIOS, SURROGATES, AGGREGATES))
FIELDS = ("logp", "old_logp", "ref_logp", "rollout_logp", "entropy", "advantage", "weight", "clip_low", "clip_high")
LENGTHS = (4, 1, 0, 7, 3, 2)


def make_case(lengths=LENGTHS, seed=0, per_token_bounds=True, **options) -> oracle.Case:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return float(low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64))

    def token(position: int) -> dict[str, float]:
        logp = uniform(-4, -0.1)
        far = uniform(3, 12) * (1 if uniform(0, 1) < 0.5 else -1) if uniform(0, 1) < 0.15 else 0.0
        return {
            "logp": logp, "old_logp": logp + uniform(-0.6, 0.6) + far, "ref_logp": logp + uniform(-1, 1),
            "rollout_logp": logp + uniform(-0.9, 0.9), "entropy": uniform(0, 3),
            "advantage": uniform(-2, 2) if uniform(0, 1) < 0.9 else 0.0,
            "weight": uniform(0.2, 2), "clip_low": uniform(0.1, 0.3), "clip_high": uniform(0.1, 0.4),
            "mask": uniform(0, 1) > 0.25, "kl_mask": uniform(0, 1) > 0.3, "segment": position // 2,
        }  # fmt: skip

    sequences = [[token(i) for i in range(n)] for n in lengths]
    if not per_token_bounds:
        for t in (t for s in sequences for t in s):
            del t["clip_low"], t["clip_high"]
    return oracle.Case(sequences, **options)


def make_batch(case: oracle.Case, dtype=torch.float64, per_token_bounds=True, **options):
    tokens = [t for s in case.sequences for t in s]
    per_token_bounds = per_token_bounds and "clip_low" in tokens[0]
    names = FIELDS if per_token_bounds else FIELDS[:-2]
    columns = {name: torch.tensor([t[name] for t in tokens], dtype=dtype) for name in names}
    logp, entropy = columns.pop("logp"), columns.pop("entropy")
    lengths = torch.tensor([0] + [len(s) for s in case.sequences])
    ids = {name: torch.tensor([t[name] for t in tokens]) for name in ("mask", "kl_mask", "segment")}
    batch = rl.TokenBatch(torch.zeros(len(tokens), dtype=torch.int64), lengths.cumsum(0), **columns, **ids, **options)
    return logp.requires_grad_(), entropy.requires_grad_(), batch


def make_objective(case: oracle.Case) -> rl.Objective:
    return rl.Objective(
        ratio=case.ratio, surrogate=case.surrogate, clip=case.clip, dual_clip=case.dual_clip,
        correction=None if case.cap is None else rl.TIS(case.cap), kl=None if case.kl is None else rl.KL(*case.kl),
        entropy=case.entropy, aggregate=case.aggregate, length=case.length,
    )  # fmt: skip


def rich(ratio, surrogate, aggregate, **more) -> oracle.Case:
    options = {"dual_clip": 1.5, "cap": 1.2, "kl": ("k3", 0.3), "entropy": 0.05, "length": 9.0} | more
    return make_case(ratio=ratio, surrogate=surrogate, aggregate=aggregate, **options)


# ---- kernels beside the reference


def run(name, logp, batch, objective, entropy, device="cpu", d_loss=1.0):
    """Loss, metrics and gradients on one backend, on the CPU."""
    logp = logp.detach().to(device).requires_grad_()
    entropy = None if entropy is None else entropy.detach().to(device).requires_grad_()
    with rl.backend(name):
        loss, metrics = rl.policy_loss(logp, batch.to(device), objective, entropy=entropy)
    leaves = [logp] + [entropy] * (entropy is not None)
    grads = torch.autograd.grad(d_loss * loss, leaves, allow_unused=True)
    cpu = lambda x: None if x is None else x.cpu()  # noqa: E731
    return loss.detach().cpu(), {k: v.cpu() for k, v in metrics.items()}, [cpu(g) for g in grads]


def same(one, two):
    (loss, metrics, grads), (other, named, gradients) = one, two
    assert torch.equal(loss, other)
    assert all(torch.equal(metrics[key].nan_to_num(), named[key].nan_to_num()) for key in metrics)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, gradients, strict=True))


def agree(got, want):
    """With the reference in float64, whose inputs are those of float32."""
    (loss, metrics, grads), (wide_loss, wide_metrics, wide) = got, want
    torch.testing.assert_close(loss.double(), wide_loss, rtol=2e-6, atol=2e-6)
    assert tuple(metrics) == tuple(wide_metrics)
    for key, value in metrics.items():
        torch.testing.assert_close(value.double(), wide_metrics[key], rtol=1e-5, atol=1e-6, msg=key)
    for g, exact in zip(grads, wide, strict=True):
        assert (g is None) == (exact is None)
        if g is None:
            continue
        torch.testing.assert_close(g.double(), exact, rtol=2e-5, atol=3e-6 * float(exact.abs().max()))


def widened(batch):
    return replace(batch, **{k: getattr(batch, k).double() for k in FIELDS if getattr(batch, k, None) is not None})


def large(ratio, aggregate):
    """Several programs, sequences longer than a step, units that interleave."""
    objective = rl.Objective(ratio, dual_clip=3.0, kl=rl.KL("k2", 0.1), entropy=0.01, correction=rl.TIS(1.1),
                             aggregate=aggregate, length=9.0)  # fmt: skip
    offsets = torch.tensor([0, 0, 1, 700, 1900, 1900, 2500])
    n = 2500
    logp = -torch.rand(n)
    near = lambda: logp + 0.3 * torch.randn(n)  # noqa: E731
    batch = rl.TokenBatch(
        torch.zeros(n, dtype=torch.int64), offsets, mask=torch.rand(n) < 0.9, advantage=torch.randn(n), old_logp=near(),
        ref_logp=near(), rollout_logp=near(), weight=torch.rand(n), segment=torch.arange(n) // 7 % 3,
    )  # fmt: skip
    return logp, torch.rand(n), batch, objective


def padded(
    logp: torch.Tensor, entropy: torch.Tensor, batch: rl.TokenBatch
) -> tuple[torch.Tensor, torch.Tensor, rl.TokenBatch, torch.Tensor]:
    """The packed sequences of LENGTHS in a rectangle, garbage in the padding; last, the place of each packed row."""
    width = max(LENGTHS) + 2
    place = torch.tensor([s * width + i for s, n in enumerate(LENGTHS) for i in range(n)])

    def pad(x: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.full((len(LENGTHS) * width,), fill, dtype=x.dtype).index_copy(0, place, x).reshape(-1, width)

    fields = {name: pad(getattr(batch, name), torch.nan) for name in FIELDS if name not in ("logp", "entropy")}
    fields |= {name: pad(getattr(batch, name), False) for name in ("mask", "kl_mask")}
    rectangle = rl.TokenBatch(pad(batch.target, -100), segment=pad(batch.segment, 0), **fields)
    return pad(logp.detach(), torch.nan), pad(entropy.detach(), torch.nan), rectangle, place
