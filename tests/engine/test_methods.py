"""The methods' advantages against their formulas in plain Python, and the structure of their objectives."""

from __future__ import annotations

import statistics

import pytest
import torch

from rlcore.layout import TokenBatch
from rlcore.methods import methods

REWARD = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.25]
GROUP = [0, 0, 0, 1, 1, 2, 2]
LENGTH = [2, 1, 3, 1, 4, 2, 1]


def batch() -> TokenBatch:
    offsets = torch.tensor([0, *LENGTH]).cumsum(0)
    return TokenBatch(torch.zeros(int(offsets[-1]), dtype=torch.int64), offsets, group=torch.tensor(GROUP))


def per_token(values):
    return torch.tensor([value for value, length in zip(values, LENGTH, strict=True) for _ in range(length)])


def of_group(i):
    return [r for r, g in zip(REWARD, GROUP, strict=True) if g == GROUP[i]]


def grpo():
    return per_token([
        (r - statistics.mean(of_group(i))) / (statistics.stdev(of_group(i)) + 1e-6) for i, r in enumerate(REWARD)
    ])  # fmt: skip


def rloo():
    return per_token([r - (sum(of_group(i)) - r) / (len(of_group(i)) - 1) for i, r in enumerate(REWARD)])


def reinforce_pp():
    returns = [r for r, length in zip(REWARD, LENGTH, strict=True) for _ in range(length)]
    mean, variance = statistics.mean(returns), statistics.variance(returns)
    return torch.tensor([(g - mean) / (variance + 1e-8) ** 0.5 for g in returns])


@pytest.mark.parametrize("expected", [grpo, rloo, reinforce_pp])
def test_advantage(expected):
    method = methods()[expected.__name__]
    torch.testing.assert_close(method.advantage(torch.tensor(REWARD), batch()), expected(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", methods())
def test_shape_where_answers_and_tokens_are_as_many(key):
    """Six answers with six tokens, one of them empty: still one advantage per token."""
    offsets = torch.tensor([0, 2, 3, 4, 5, 6, 6])[[0, 1, 2, 3, 4, 5]]
    ragged = TokenBatch(torch.zeros(6, dtype=torch.int64), offsets, group=torch.tensor([0, 0, 0, 1, 1]))
    advantage = methods()[key].advantage(torch.tensor([1.0, 0, 1, 0, 1]), ragged)
    assert advantage.shape == (6,) and advantage[0] == advantage[1]


def test_entries():
    for key, method in methods().items():
        assert method.key == key and method.state == "runs" and method.formula and method.paper and method.title
    assert methods()["grpo"].objective(clip=(0.1, 0.3)).numbers.clip_high == 0.3
    assert methods()["rloo"].objective().ratio == "none"
