"""The policy loss in plain Python loops over sequences and tokens, float64, straight from the papers' formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Case:
    """One minibatch as lists of sequences of tokens, each token a dict of its numbers."""

    sequences: list[list[dict[str, float]]]
    ratio: str = "token"
    surrogate: str = "ppo"
    clip: tuple[float, float] = (0.2, 0.2)
    dual_clip: float | None = None
    cap: float | None = None
    kl: tuple[str, float] | None = None
    entropy: float = 0.0
    aggregate: str = "token_mean"
    length: float = 1.0


def loss(case: Case) -> float:
    """loss = sum over sequences and tokens, with the denominators of the whole minibatch."""
    tokens = sum(1 for s in case.sequences for t in s if t["mask"])
    total = 0.0
    for sequence in case.sequences:
        live = [t for t in sequence if t["mask"]]
        terms = [token_loss(case, t, live) for t in live]
        if case.aggregate == "token_mean":
            total += sum(terms) / max(tokens, 1)
        elif case.aggregate == "seq_mean_token_mean":
            total += sum(terms) / max(len(live), 1) / len(case.sequences)
        elif case.aggregate == "seq_mean_token_sum":
            total += sum(terms) / len(case.sequences)
        else:
            total += sum(terms) / case.length / len(case.sequences)
    return total


def token_ratio(case: Case, token: dict[str, float], live: list[dict[str, float]]) -> float:
    if case.ratio == "none":
        return 1.0
    if case.ratio == "token":
        return math.exp(token["logp"] - token["old_logp"])
    peers = live if case.ratio == "sequence" else [t for t in live if t["segment"] == token["segment"]]
    return math.exp(sum(t["logp"] - t["old_logp"] for t in peers) / len(peers))


def token_loss(case: Case, token: dict[str, float], live: list[dict[str, float]]) -> float:
    ratio, advantage = token_ratio(case, token, live), token["advantage"]
    low = token.get("clip_low", case.clip[0])
    high = token.get("clip_high", case.clip[1])
    clipped = min(max(ratio, 1 - low), 1 + high)
    if case.surrogate == "ppo":
        objective = min(ratio * advantage, clipped * advantage)
        if case.dual_clip is not None and advantage < 0:
            objective = max(objective, case.dual_clip * advantage)
    elif case.surrogate == "cispo":
        objective = clipped * advantage * token["logp"]
    elif case.ratio == "none":
        objective = advantage * token["logp"]
    else:
        objective = ratio * advantage
    result = -objective
    if case.cap is not None:
        result *= min(math.exp(token["old_logp"] - token["rollout_logp"]), case.cap)
    result *= token.get("weight", 1.0)
    if case.kl is not None and token.get("kl_mask", True):
        result += case.kl[1] * kl(case.kl[0], token["logp"] - token["ref_logp"])
    return result - case.entropy * token["entropy"]


def kl(estimator: str, x: float) -> float:
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[estimator]


def gradient(case: Case, name: str, step: float = 1e-6) -> list[float]:
    """d loss / d token[name] by central differences, token after token."""
    result = []
    for sequence in case.sequences:
        for token in sequence:
            kept = token[name]
            if not token["mask"]:
                result.append(0.0)
                continue
            values = []
            for delta in (step, -step):
                token[name] = kept + delta
                values.append(loss(case))
            token[name] = kept
            result.append((values[0] - values[1]) / (2 * step))
    return result


def lost(case: Case, towards: float) -> bool:
    """Whether a ratio outside its range is clipped: by PPO where the advantage pushes on, by CISPO always."""
    return {"ppo": towards > 0, "cispo": True, "reinforce": False}[case.surrogate]


def expected_metrics(case: Case) -> dict[str, float]:
    """Token means over the minibatch of what the ratio did."""
    live = [(t, [u for u in s if u["mask"]]) for s in case.sequences for t in s if t["mask"]]
    n = max(len(live), 1)
    ratios = [(token_ratio(case, t, s), t) for t, s in live]
    low = [r < 1 - t.get("clip_low", case.clip[0]) and lost(case, -t["advantage"]) for r, t in ratios]
    high = [r > 1 + t.get("clip_high", case.clip[1]) and lost(case, t["advantage"]) for r, t in ratios]
    weights = [math.exp(t["old_logp"] - t["rollout_logp"]) for t, _ in live]
    used = [min(w, case.cap or w) for w in weights]
    return {
        "tokens": len(live),
        "ratio_mean": sum(r for r, _ in ratios) / n,
        "ratio_min": min(r for r, _ in ratios),
        "ratio_max": max(r for r, _ in ratios),
        "clip_low_fraction": sum(low) / n,
        "clip_high_fraction": sum(high) / n,
        "clip_fraction": sum(a or b for a, b in zip(low, high, strict=True)) / n,
        "old_kl_k1": sum(-math.log(r) for r, _ in ratios) / n,
        "old_kl_k3": sum(r - 1 - math.log(r) for r, _ in ratios) / n,
        "dual_clip_fraction": sum(r > (case.dual_clip or math.inf) and t["advantage"] < 0 for r, t in ratios) / n,
        "zero_advantage_fraction": sum(t["advantage"] == 0 for t, _ in live) / n,
        "ref_kl_k1": sum(t["logp"] - t["ref_logp"] for t, _ in live if t.get("kl_mask", True)) / n,
        "ref_kl_k3": sum(kl("k3", t["logp"] - t["ref_logp"]) for t, _ in live if t.get("kl_mask", True)) / n,
        "rollout_kl_k3": sum(kl("k3", t["rollout_logp"] - t["old_logp"]) for t, _ in live) / n,
        "correction_clip_fraction": sum(w > (case.cap or math.inf) for w in weights) / n,
        "weight_sum": sum(used),
        "weight_sq_sum": sum(w * w for w in used),
        "loss": loss(case),
        "rollout_kl_k1": sum(t["rollout_logp"] - t["old_logp"] for t, _ in live) / n,
        "rollout_logp_difference_max": max(abs(t["rollout_logp"] - t["old_logp"]) for t, _ in live),
        "entropy": sum(t["entropy"] for t, _ in live) / n,
        "logp_mean": sum(t["logp"] for t, _ in live) / n,
        "advantage_mean": sum(t["advantage"] for t, _ in live) / n,
        "ess": sum(used) ** 2 / (n * sum(w * w for w in used)),
    }
