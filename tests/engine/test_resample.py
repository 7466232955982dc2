"""Dynamic sampling: exactly the groups without signal are replaced, by the same answers every time."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from rlcore.engine.config import Config, RolloutConfig
from rlcore.engine.resample import fill_up, with_groups, without_signal
from rlcore.engine.resolve import with_keys
from rlcore.engine.rollout import Rollout, roll_out
from rlcore.engine.seeding import generator
from rlcore.engine.trainer import answers_of_step


def rollout_of(small, start: int, count: int, name: str) -> Rollout:
    model, tokenizer, task = small
    problems = task.train[start : start + count]
    config = RolloutConfig(samples=3, max_new_tokens=5)
    rollout = roll_out(model, tokenizer, task, problems, config, generator(name))
    # A model with random weights is never right: what all answers have alike would not show where it comes from.
    score = torch.rand(3 * count, generator=generator(name, "score"))
    channels = {"a": score + 1, "b": score + 2}
    return replace(rollout, reward=score, correct=score > 0.5, finished=score < 0.3, channels=channels, failures=[name])


def group_of(rollout: Rollout, g: int) -> dict:
    """Everything that a rollout holds of one group."""
    G, offsets = 3, rollout.batch.offsets.tolist()
    answers, rows = slice(g * G, g * G + G), slice(offsets[g * G], offsets[g * G + G])
    return {
        "problem": rollout.problems[g].prompt,
        "prompt": rollout.prompts[g],
        "responses": rollout.responses[g],
        "texts": rollout.texts[answers],
        "reward": rollout.reward[answers].tolist(),
        "finished": rollout.finished[answers].tolist(),
        "correct": rollout.correct[answers].tolist(),
        "channels": {name: score[answers].tolist() for name, score in rollout.channels.items()},
        "lengths": rollout.batch.lengths()[answers].tolist(),
        "target": rollout.batch.target[rows].tolist(),
        "model_logp": rollout.model_logp[rows].tolist(),
        "rollout_logp": rollout.batch.rollout_logp[rows].tolist(),
    }


def test_groups_are_replaced_in_their_places(small):
    first, second = rollout_of(small, 0, 4, "first"), rollout_of(small, 10, 2, "second")
    mixed = with_groups(first, [1, 3], second)
    expected = [group_of(first, 0), group_of(second, 0), group_of(first, 2), group_of(second, 1)]
    assert [group_of(mixed, g) for g in range(4)] == expected
    assert mixed.batch.group.tolist() == [g for g in range(4) for _ in range(3)]
    assert mixed.batch.totals.tokens == mixed.batch.N
    assert mixed.failures == ["first", "second"] and mixed.scoring == first.scoring + second.scoring
    # What has one entry per answer in one rollout has it in the other: no field was forgotten.
    for item in fields(Rollout):
        x = getattr(first, item.name)
        if hasattr(x, "__len__") and len(x) == 12:
            assert len(getattr(mixed, item.name)) == 12, item.name


def with_rewards(rollout: Rollout, rewards: list[float]) -> Rollout:
    rollout.reward[:] = torch.tensor(rewards)
    return rollout


def test_dead_groups_are_drawn_again_until_none_is_left(small):
    start = with_rewards(rollout_of(small, 0, 3, "start"), [1, 1, 1, 0, 1, 0, 0, 0, 0])
    assert without_signal(start).tolist() == [True, False, True]
    rounds = {
        1: with_rewards(rollout_of(small, 10, 2, "one"), [0, 0, 0, 1, 0, 0]),
        2: with_rewards(rollout_of(small, 20, 1, "two"), [0, 0, 1]),
    }
    asked = []

    def draw(again: int, count: int) -> Rollout:
        asked.append((again, count))
        return rounds[again]

    full, metrics = fill_up(start, draw, rounds=5)
    assert asked == [(1, 2), (2, 1)]
    expected = [group_of(rounds[2], 0), group_of(start, 1), group_of(rounds[1], 1)]
    assert [group_of(full, g) for g in range(3)] == expected
    drawn = [ids for fresh in rounds.values() for ids in [*fresh.prompts, *(a for g in fresh.responses for a in g)]]
    assert metrics["tokens"] == sum(map(len, drawn))
    assert (metrics["resample/rounds"], metrics["resample/replaced"], metrics["resample/without_signal"]) == (2, 3, 0)
    asked.clear()
    left, metrics = fill_up(start, draw, rounds=1)
    assert asked == [(1, 2)] and without_signal(left).tolist() == [True, False, False]
    assert metrics["resample/without_signal"] == torch.tensor(1 / 3).item()


def test_replacements_are_other_problems(small):
    """A model with random weights is never right, so every round replaces all groups."""
    config = with_keys(Config(), {
        "rollout.prompts": 8, "rollout.samples": 2, "rollout.max_new_tokens": 2, "rollout.dynamic_sampling": True,
        "rollout.max_resample": 2,
    })  # fmt: skip
    rollout, metrics = answers_of_step(*small, config, 1)
    assert metrics["resample/rounds"] == 2 and metrics["resample/replaced"] == 16
    own = {problem.prompt for problem in small[2].prompts(0, 8, config.seed)}
    assert len(own & {problem.prompt for problem in rollout.problems}) <= 1
    assert metrics["sampled_tokens"] > 2 * (sum(map(len, rollout.prompts)) + rollout.batch.N)
