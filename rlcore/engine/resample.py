"""Dynamic sampling: groups of answers without a signal are replaced by answers to freshly sampled prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

import rlcore as rl
from rlcore.engine.rollout import Rollout
from rlcore.layout import rows_of

T = TypeVar("T")


def without_signal(rollout: Rollout) -> Tensor:
    """Which of the P groups have one reward for all their answers, [P] bool: comparing them teaches nothing."""
    in_group = rollout.reward.reshape(len(rollout.prompts), -1)
    return in_group.amax(1) == in_group.amin(1)


def fill_up(rollout: Rollout, draw: Callable[[int, int], Rollout], rounds: int) -> tuple[Rollout, dict[str, float]]:
    """Replaces groups without signal by those of `draw(round, count)`, in their places, at most `rounds` times.

    Groups that disagree stay as they are. Returns the rollout and its metrics. DAPO (2503.14476) samples until its
    batch is full; here what is without signal after the last round stays, with advantage 0.
    """
    done = replaced = drawn = 0
    while done < rounds and (dead := without_signal(rollout).nonzero().squeeze(1).tolist()):
        done += 1
        fresh = draw(done, len(dead))
        rollout = with_groups(rollout, dead, fresh)
        replaced += len(dead)
        drawn += token_count(fresh)
    return rollout, {
        "resample/rounds": done,
        "resample/replaced": replaced,
        "resample/without_signal": without_signal(rollout).float().mean().item(),
        "tokens": drawn,
    }


def with_groups(rollout: Rollout, places: list[int], other: Rollout) -> Rollout:
    """The rollout with the groups at `places` replaced by those of another one, in its order."""
    a, b, P = rollout.batch, other.batch, len(rollout.prompts)
    assert a.offsets is not None and b.offsets is not None and a.rollout_logp is not None and b.rollout_logp is not None
    G = a.S // P
    source = list(range(P))
    for i, place in enumerate(places):
        source[place] = P + i
    sequences = [g * G + i for g in source for i in range(G)]
    index = torch.tensor(sequences, device=a.device)
    rows, offsets = rows_of(torch.cat([a.offsets, b.offsets[1:] + a.N]), index)
    return replace(
        rollout,
        problems=pick([*rollout.problems, *other.problems], source),
        prompts=pick([*rollout.prompts, *other.prompts], source),
        responses=pick([*rollout.responses, *other.responses], source),
        texts=pick([*rollout.texts, *other.texts], sequences),
        reward=torch.cat([rollout.reward, other.reward])[index],
        channels={k: torch.cat([score, other.channels[k]])[index] for k, score in rollout.channels.items()},
        correct=torch.cat([rollout.correct, other.correct])[index],
        failures=[*rollout.failures, *other.failures],
        finished=torch.cat([rollout.finished, other.finished])[index],
        model_logp=torch.cat([rollout.model_logp, other.model_logp])[rows],
        batch=rl.TokenBatch(
            torch.cat([a.target, b.target])[rows],
            offsets,
            group=a.group,
            rollout_logp=torch.cat([a.rollout_logp, b.rollout_logp])[rows],
        ),
        scoring=rollout.scoring + other.scoring,
    )


def pick(items: list[T], places: list[int]) -> list[T]:
    return [items[i] for i in places]


def token_count(rollout: Rollout) -> int:
    """Tokens of a rollout: prompts once, and all answers."""
    return sum(map(len, rollout.prompts)) + rollout.batch.N
