"""segments: ragged sums, group advantages and GAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlcore as rl

SEQUENCES, MEAN_LENGTH = 512, 256


def ragged() -> Tensor:
    """[S+1] int64"""
    lengths = torch.randint(1, 2 * MEAN_LENGTH, (SEQUENCES,))
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


@pytest.mark.parametrize("who", ["rlcore", "torch index_add", "torch segment_reduce"])
def test_segment_sum(timed: Callable[..., None], who: str) -> None:
    offsets = ragged()
    x = torch.randn(int(offsets[-1]))
    ids = torch.repeat_interleave(torch.arange(SEQUENCES), offsets.diff())
    functions: dict[str, Callable[[], Tensor]] = {
        "rlcore": lambda: rl.segment_sum(x, offsets=offsets),
        "torch index_add": lambda: x.new_zeros(SEQUENCES).index_add(0, ids, x),
        "torch segment_reduce": lambda: torch.segment_reduce(x, "sum", offsets=offsets),
    }
    timed(functions[who], functions["torch index_add"]())


@pytest.mark.parametrize("who", ["rlcore", "torch, one group at a time"])
def test_group_advantage(timed: Callable[..., None], who: str) -> None:
    reward = torch.rand(4096)
    group = torch.arange(4096) // 8

    def loop() -> Tensor:
        out = torch.empty_like(reward)
        for g in range(512):
            rows = group == g
            out[rows] = (reward[rows] - reward[rows].mean()) / (reward[rows].std() + 1e-6)
        return out

    timed((lambda: rl.group_advantage(reward, group)) if who == "rlcore" else loop, loop())


@pytest.mark.parametrize("who", ["rlcore", "torch, one column at a time"])
def test_gae(timed: Callable[..., None], who: str) -> None:
    gamma, lam = 0.99, 0.95
    reward, value = torch.randn(2, 64, 1024).unbind()

    def loop() -> tuple[Tensor, Tensor]:
        advantage = torch.zeros_like(reward)
        running = following = reward.new_zeros(reward.shape[0])
        for t in reversed(range(reward.shape[1])):
            running = reward[:, t] + gamma * following - value[:, t] + gamma * lam * running
            advantage[:, t], following = running, value[:, t]
        return advantage, advantage + value

    def ours() -> Any:
        return tuple(rl.gae(reward, value, gamma=gamma, lam=lam))

    timed(ours if who == "rlcore" else loop, loop())
