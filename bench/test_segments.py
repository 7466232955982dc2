"""segments: GAE and group advantages beside the Python loops of trainers, ragged sums beside torch's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import check
from torch import Tensor

import rlcore as rl

GAMMA, LAM = 0.99, 0.95


def ragged(sequences: int, tokens: int) -> Tensor:
    """[S+1] offsets of random lengths, at least 1, that add up to `tokens`."""
    cuts = torch.randperm(tokens - 1)[: sequences - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])])


def gae_by_column(reward: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The loop over time of PPO trainers, [B, T]."""
    last, columns = torch.zeros_like(reward[:, 0]), []
    for t in reversed(range(reward.shape[1])):
        following = value[:, t + 1] if t + 1 < reward.shape[1] else 0.0
        last = reward[:, t] + GAMMA * following - value[:, t] + GAMMA * LAM * last
        columns.append(last)
    advantage = torch.stack(columns[::-1], dim=1)
    return advantage, advantage + value


def test_gae_dense(compare: Callable[..., float], run: Any) -> None:
    B, T = (8, 64) if run.quick else (256, 2048)
    reward, value = torch.randn(2, B, T).unbind()

    def ours() -> tuple[Tensor, Tensor]:
        return tuple(rl.gae(reward, value, gamma=GAMMA, lam=LAM))

    check("gae", ours(), gae_by_column(reward, value))
    compare(f"gae, {B} x {T:,}", ours, lambda: gae_by_column(reward, value), "per-token Python loop", least=50.0)


def test_gae_ragged(compare: Callable[..., float], run: Any) -> None:
    B, T = (8, 64) if run.quick else (256, 2048)
    reward, value = torch.randn(2, B, T).unbind()
    offsets = ragged(B, B * T)
    flat = reward.flatten(), value.flatten()

    def packed() -> tuple[Tensor, Tensor]:
        return tuple(rl.gae(*flat, offsets, gamma=GAMMA, lam=LAM))

    def dense() -> tuple[Tensor, Tensor]:
        return tuple(rl.gae(reward, value, gamma=GAMMA, lam=LAM))

    expected = [gae_by_column(flat[0][None, a:b], flat[1][None, a:b]) for a, b in zip(offsets[:4], offsets[1:5])]
    rows = int(offsets[4])
    check("gae", [x[:rows] for x in packed()], [torch.cat(x, dim=1)[0] for x in zip(*expected)])
    compare("gae, the same tokens ragged", packed, dense, "our dense gae", most=1.3)


def test_gae_masked(compare: Callable[..., float], run: Any) -> None:
    """A third of the rows is masked, here and there inside the sequences."""
    B, T = (8, 64) if run.quick else (256, 2048)
    reward, value = torch.randn(2, B, T).unbind()
    mask = torch.rand(B, T) >= 0.3

    def masked() -> tuple[Tensor, Tensor]:
        return tuple(rl.gae(reward, value, gamma=GAMMA, lam=LAM, mask=mask))

    def dense() -> tuple[Tensor, Tensor]:
        return tuple(rl.gae(reward, value, gamma=GAMMA, lam=LAM))

    expected = [gae_by_column(reward[b, mask[b]][None], value[b, mask[b]][None]) for b in range(4)]
    check("gae", [x[:4][mask[:4]] for x in masked()], [torch.cat(x, dim=1)[0] for x in zip(*expected)])
    compare("gae, 30 % scattered masked rows", masked, dense, "our dense gae")


def test_segment_mean_by_ids(compare: Callable[..., float], run: Any) -> None:
    sequences, tokens = (16, 256) if run.quick else (1024, 524_288)
    x, ids = torch.randn(tokens), torch.randint(sequences, (tokens,)).sort().values

    def by_index_add() -> Tensor:
        count = torch.bincount(ids, minlength=sequences).clamp(min=1)
        return x.new_zeros(sequences).index_add(0, ids, x) / count

    def ours() -> Tensor:
        return rl.segment_mean(x, ids, num_segments=sequences)

    check("segment_mean", [ours()], [by_index_add()])
    compare(f"segment_mean, {tokens:,} tokens by sorted ids", ours, by_index_add, "torch.index_add", speedup=True)


def test_group_advantage(compare: Callable[..., float], run: Any) -> None:
    responses = 256 if run.quick else 4096
    size = torch.randint(2, 15, (responses,))
    group = torch.repeat_interleave(torch.arange(responses), size)[:responses]
    group[-1] = group[-2]  # the cut may have left a group of one
    reward, key = torch.rand(responses), [f"prompt-{g}" for g in group.tolist()]

    def loop() -> Tensor:
        """The dict of lists of group-relative trainers."""
        scores, mean, std = defaultdict(list), {}, {}
        out = reward.clone()
        for i in range(responses):
            scores[key[i]].append(out[i])
        for name, members in scores.items():
            stacked = torch.stack(members)
            mean[name], std[name] = stacked.mean(), stacked.std()
        for i in range(responses):
            out[i] = (out[i] - mean[key[i]]) / (std[key[i]] + 1e-6)
        return out

    def ours() -> Tensor:
        return rl.group_advantage(reward, group)

    check("group_advantage", [ours()], [loop()])
    compare(f"group advantage, {responses:,} responses", ours, loop, "Python dict loop", least=20.0)


@pytest.mark.parametrize("yardstick", ["index_add", "segment_reduce"])
def test_segment_sum(yardstick: str, compare: Callable[..., float], run: Any) -> None:
    sequences, tokens = (16, 256) if run.quick else (512, 131_072)
    offsets, x = ragged(sequences, tokens), torch.randn(tokens)
    ids = torch.repeat_interleave(torch.arange(sequences), offsets.diff())
    functions: dict[str, Callable[[], Tensor]] = {
        "index_add": lambda: x.new_zeros(sequences).index_add(0, ids, x),
        "segment_reduce": lambda: torch.segment_reduce(x, "sum", offsets=offsets),
    }

    def ours() -> Tensor:
        return rl.segment_sum(x, offsets=offsets)

    check("segment_sum", [ours()], [functions[yardstick]()])
    name = f"torch.{yardstick}"
    compare(f"segment_sum, {tokens:,} tokens", ours, functions[yardstick], name, seconds=1.0, speedup=True)
