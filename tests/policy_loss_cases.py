"""Minibatches of the policy loss: as the oracle's cases, and as the tensors and objectives of the library."""

from __future__ import annotations

import itertools

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
