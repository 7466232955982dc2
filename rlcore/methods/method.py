"""What a method is: an advantage and an objective under a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlcore.layout import TokenBatch, flat_offsets
from rlcore.ops.policy_loss import Objective
from rlcore.ops.segments import segment_sum


@dataclass(frozen=True)
class Method:
    """One published method as a composition of the library's functions.

    key, title, paper; family, the kind of idea it is; formula, in one line; needs, what a trainer must provide beyond
    rewards ("groups", "critic"); state, "runs" or "needs ...".
    advantage(reward [N], batch) -> [N]: advantages of all tokens of a rollout. The reward of an answer stands at its
    last token; what is paid per token (a KL penalty) stands at each. `batch` gives offsets, group and mask, and with a
    critic `value`.
    returns(reward [N], batch) -> [N]: what the critic learns; None without one. With a critic both also take `gamma`
    and `lam`.
    structure: the arguments of its `rl.Objective`. defaults: configuration keys of the training loop that belong to the
    method as published; a configuration file and the command line go before them.
    """

    key: str
    title: str
    paper: str
    family: str
    formula: str
    advantage: Callable[..., Tensor]
    structure: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    state: str = "runs"
    returns: Callable[..., Tensor] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    def objective(self, **changes: Any) -> Objective:
        """The method's objective, with arguments of `rl.Objective` replaced by `changes`."""
        return Objective(**{**self.structure, **changes})


def answer_reward(reward: Tensor, batch: TokenBatch) -> Tensor:
    """The reward of every answer, [S]: the sum of its tokens' rewards [N], masked ones included."""
    return segment_sum(reward.reshape(-1), offsets=flat_offsets(batch))


def required(x: Tensor | None, name: str, why: str) -> Tensor:
    """x, or a ValueError that names what is missing."""
    if x is None:
        raise ValueError(f"{name}: needed, for {why}; got None")
    return x


def groups(batch: TokenBatch) -> Tensor:
    """The group of every answer, [S]; ValueError where the batch has none."""
    return required(batch.group, "batch.group", "its advantages compare the answers of a group")
