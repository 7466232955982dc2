"""The methods' advantages against their formulas in plain Python, and the structure of their objectives."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from rlcore.engine.config import Config
from rlcore.engine.config_rules import validate
from rlcore.engine.resolve import with_keys
from rlcore.layout import TokenBatch, flat_offsets
from rlcore.methods import methods

REWARD = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.25]
GROUP = [0, 0, 0, 1, 1, 2, 2]
LENGTH = [2, 1, 3, 1, 4, 2, 1]
VALUE = [0.5, 0.75, -0.25, 0.0, 0.125, 0.5, 1.0, 0.25, 0.5, 0.75, 1.0, -0.5, 0.0, 0.25]


def batch() -> TokenBatch:
    offsets = torch.tensor([0, *LENGTH]).cumsum(0)
    ids = torch.zeros(int(offsets[-1]), dtype=torch.int64)
    return TokenBatch(ids, offsets, group=torch.tensor(GROUP), value=torch.tensor(VALUE))


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


def whitened(values):
    mean, variance = statistics.mean(values), statistics.variance(values)
    return torch.tensor([(x - mean) / (variance + 1e-8) ** 0.5 for x in values])


def reinforce_pp():
    return whitened(per_token(REWARD).tolist())


def gae(gamma, lam):
    """Every advantage as the sum of all later surprises, by its definition."""
    advantages, start = [], 0
    for reward, length in zip(REWARD, LENGTH, strict=True):
        value = [*VALUE[start : start + length], 0.0]
        paid = [0.0] * (length - 1) + [reward]
        delta = [paid[t] + gamma * value[t + 1] - value[t] for t in range(length)]
        advantages += [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, length)) for t in range(length)]
        start += length
    return advantages


def ppo():
    return whitened(gae(1.0, 0.95))


def dr_grpo():
    return per_token([r - statistics.mean(of_group(i)) for i, r in enumerate(REWARD)])


def lite_ppo():
    scale = statistics.stdev(REWARD) + 1e-6
    return per_token([(r - statistics.mean(of_group(i))) / scale for i, r in enumerate(REWARD)])


loop, dapo, gspo, cispo = rloo, grpo, grpo, grpo


@pytest.mark.parametrize("key", methods())
def test_advantage(key):
    method, expected = methods()[key], globals()[key]
    torch.testing.assert_close(
        method.advantage(at_end(torch.tensor(REWARD), batch()), batch()), expected(), rtol=1e-5, atol=1e-6
    )


def test_returns_and_discounts_of_ppo():
    method, reward = methods()["ppo"], at_end(torch.tensor(REWARD), batch())
    expected = torch.tensor([a + v for a, v in zip(gae(0.9, 0.5), VALUE, strict=True)])
    torch.testing.assert_close(method.returns(reward, batch(), gamma=0.9, lam=0.5), expected)
    advantage = method.advantage(reward, batch(), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantage, whitened(gae(0.9, 0.5)), rtol=1e-5, atol=1e-6)


def test_rewards_of_inner_tokens_count():
    """A penalty at an inner token: answers are compared by their sums, returns see it from that token back."""
    reward = at_end(torch.tensor(REWARD), batch())
    reward[4] -= 0.25  # the middle of answer 2
    other = [*REWARD[:2], 0.25, *REWARD[3:]]
    for key in ("grpo", "rloo", "lite_ppo"):
        whole = methods()[key].advantage(at_end(torch.tensor(other), batch()), batch())
        torch.testing.assert_close(methods()[key].advantage(reward, batch()), whole)
    returns = [1.0, 1.0, 0.0, 0.25, 0.25, 0.5, *per_token(REWARD).tolist()[6:]]
    torch.testing.assert_close(methods()["reinforce_pp"].advantage(reward, batch()), whitened(returns))


@pytest.mark.parametrize("key", methods())
def test_empty_and_masked_rows_change_no_other_answer(key):
    """Six answers, one empty, six tokens; the same answers with a masked last token; the same in a padded batch."""
    reward, group = torch.tensor([1.0, 0, 1, 0, 1, 0.5]), torch.tensor([0, 0, 0, 1, 1, 1])
    method, ids, value = methods()[key], torch.zeros(6, dtype=torch.int64), torch.zeros(6)
    packed = TokenBatch(ids, torch.tensor([0, 2, 3, 4, 4, 5, 6]), group=group, value=value)
    advantage = method.advantage(at_end(reward, packed), packed)
    assert advantage.shape == (6,) and (advantage[0] == advantage[1] or key == "ppo")
    assert advantage[0] > 0 > advantage[2]
    masked = replace(packed, mask=torch.tensor([1, 0, 1, 1, 1, 1]))
    paid = at_end(reward, packed)
    paid[:2] = torch.tensor([1.0, 0.0])  # the last token that counts
    assert method.advantage(paid, masked)[0] > 0
    width = torch.tensor([2, 1, 1, 0, 1, 1])
    inside = torch.arange(2) < width[:, None]
    padded = TokenBatch(torch.zeros(6, 2, dtype=torch.int64), mask=inside, group=group, value=torch.zeros(6, 2))
    in_rows = torch.zeros(6, 2)
    in_rows[inside] = at_end(reward, packed)
    torch.testing.assert_close(method.advantage(in_rows, padded)[inside], advantage)


def test_masked_tokens_are_no_steps_of_ppo():
    """The next value of a token is that of the next unmasked one: as if the masked rows were not there."""
    ids, value = torch.zeros(7, dtype=torch.int64), torch.tensor([0.5, 9.0, -0.25, 1.0, 9.0, 9.0, 0.75])
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool()
    masked = TokenBatch(ids, torch.tensor([0, 3, 7]), mask=keep, value=value)
    without = TokenBatch(ids[keep], torch.tensor([0, 2, 4]), value=value[keep])
    reward = torch.tensor([0.0, 9.0, 1.0, 0.25, 9.0, 9.0, -1.0])
    method, horizon = methods()["ppo"], {"gamma": 0.9, "lam": 0.5}
    for function in (method.advantage, method.returns):
        torch.testing.assert_close(
            function(reward, masked, **horizon)[keep], function(reward[keep], without, **horizon)
        )


@pytest.mark.parametrize("key", [key for key, method in methods().items() if "groups" in method.needs])
def test_a_missing_group_is_named(key):
    with pytest.raises(ValueError, match=r"batch\.group: needed"):
        methods()[key].advantage(torch.ones(2), TokenBatch(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1, 2])))


def test_a_missing_value_is_named():
    with pytest.raises(ValueError, match=r"batch\.value: needed"):
        methods()["ppo"].advantage(
            torch.ones(2), TokenBatch(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1, 2]))
        )


STRUCTURES = {
    "ppo": ("token", "ppo", (0.2, 0.2), "token_mean"),
    "dr_grpo": ("token", "ppo", (0.2, 0.2), "seq_mean_token_sum_norm"),
    "gspo": ("sequence", "ppo", (3e-4, 4e-4), "seq_mean_token_mean"),
    "dapo": ("token", "ppo", (0.2, 0.28), "token_mean"),
    "cispo": ("token", "cispo", (1.0, 4.0), "token_mean"),
    "lite_ppo": ("token", "ppo", (0.2, 0.2), "token_mean"),
    "loop": ("token", "ppo", (1 - 1 / 1.1, 0.1), "seq_mean_token_mean"),
}


@pytest.mark.parametrize("key", STRUCTURES)
def test_objectives(key):
    objective = methods()[key].objective()
    clip = (float(objective.numbers.clip_low), float(objective.numbers.clip_high))
    assert (objective.ratio, objective.surrogate, clip, objective.aggregate) == STRUCTURES[key]


def test_defaults_are_keys_of_the_config():
    for method in methods().values():
        validate(with_keys(Config(method=method.key), method.defaults))
    config = with_keys(Config(), methods()["dapo"].defaults)
    assert config.rollout.dynamic_sampling and config.rollout.overlong_buffer == 0.2
    assert not Config().rollout.dynamic_sampling and not methods()["grpo"].defaults


def test_entries():
    for key, method in methods().items():
        assert method.key == key and method.state == "runs" and method.formula and method.paper and method.title
    assert methods()["grpo"].objective(clip=(0.1, 0.3)).numbers.clip_high == 0.3
    assert methods()["rloo"].objective().ratio == "none"
