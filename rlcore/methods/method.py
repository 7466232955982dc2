"""What a method is: an advantage and an objective under a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlcore.layout import TokenBatch
from rlcore.ops.policy_loss import Objective


@dataclass(frozen=True)
class Method:
    """One published method as a composition of the library's functions.

    key, title, paper; family, the kind of idea it is; formula, in one line; needs, what a trainer must provide beyond
    rewards; state, "runs" or "needs ...".
    advantage(reward [S], batch) -> [N]: advantages of all answers of a rollout; `batch` gives offsets, group and mask.
    structure: the arguments of its `rl.Objective`.
    """

    key: str
    title: str
    paper: str
    family: str
    formula: str
    advantage: Callable[[Tensor, TokenBatch], Tensor]
    structure: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    state: str = "runs"

    def objective(self, **changes: Any) -> Objective:
        """The method's objective, with arguments of `rl.Objective` replaced by `changes`."""
        return Objective(**{**self.structure, **changes})


def required(x: Tensor | None, name: str, why: str) -> Tensor:
    """x, or a ValueError that names what is missing."""
    if x is None:
        raise ValueError(f"{name}: needed, for {why}; got None")
    return x
