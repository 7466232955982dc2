"""The methods' advantages against their formulas in plain Python, and the structure of their objectives."""

from __future__ import annotations

import statistics

import pytest
import torch

from rlcore.layout import TokenBatch, flat_offsets
from rlcore.methods import methods

REWARD = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.25]
GROUP = [0, 0, 0, 1, 1, 2, 2]
LENGTH = [2, 1, 3, 1, 4, 2, 1]


def batch() -> TokenBatch:
    offsets = torch.tensor([0, *LENGTH]).cumsum(0)
    return TokenBatch(torch.zeros(int(offsets[-1]), dtype=torch.int64), offsets, group=torch.tensor(GROUP))


def at_end(reward, batch):
    """The rewards of answers at their last tokens; an empty answer has none."""
    placed = torch.zeros(batch.N)
    for r, end, length in zip(reward.tolist(), flat_offsets(batch)[1:].tolist(), batch.lengths().tolist(), strict=True):
        if length:
            placed[end - 1] = r
    return placed.reshape(batch.shape)


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
    torch.testing.assert_close(
        method.advantage(at_end(torch.tensor(REWARD), batch()), batch()), expected(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("key", methods())
def test_empty_and_masked_rows_change_no_other_answer(key):
    """Six answers, one empty, six tokens; the same answers with a masked last token; the same in a padded batch."""
    reward, group = torch.tensor([1.0, 0, 1, 0, 1, 0.5]), torch.tensor([0, 0, 0, 1, 1, 1])
    method, ids = methods()[key], torch.zeros(6, dtype=torch.int64)
    packed = TokenBatch(ids, torch.tensor([0, 2, 3, 4, 4, 5, 6]), group=group)
    advantage = method.advantage(at_end(reward, packed), packed)
    assert advantage.shape == (6,) and advantage[0] == advantage[1]
    assert advantage[0] > 0 > advantage[2]
    masked = TokenBatch(ids, torch.tensor([0, 2, 3, 4, 4, 5, 6]), mask=torch.tensor([1, 0, 1, 1, 1, 1]), group=group)
    assert method.advantage(at_end(reward, masked), masked)[0] > 0
    width = torch.tensor([2, 1, 1, 0, 1, 1])
    inside = torch.arange(2) < width[:, None]
    padded = TokenBatch(torch.zeros(6, 2, dtype=torch.int64), mask=inside, group=group)
    in_rows = torch.zeros(6, 2)
    in_rows[inside] = at_end(reward, packed)
    torch.testing.assert_close(method.advantage(in_rows, padded)[inside], advantage)


@pytest.mark.parametrize("key", ["grpo", "rloo"])
def test_a_missing_group_is_named(key):
    with pytest.raises(ValueError, match=r"batch\.group: needed"):
        methods()[key].advantage(torch.ones(2), TokenBatch(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1, 2])))


def test_entries():
    for key, method in methods().items():
        assert method.key == key and method.state == "runs" and method.formula and method.paper and method.title
    assert methods()["grpo"].objective(clip=(0.1, 0.3)).numbers.clip_high == 0.3
    assert methods()["rloo"].objective().ratio == "none"
