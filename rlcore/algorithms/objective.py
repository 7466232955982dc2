"""What a policy is trained for: the structure of an objective as strings, its numbers as a tensor.

Compiled code guards on the structure alone; bounds and coefficients travel as one float64 tensor, so that a schedule
that changes them every step recompiles nothing.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcore.layout import TokenBatch

RATIOS = ("none", "token", "segment", "sequence")
SURROGATES = ("ppo", "cispo", "reinforce")
AGGREGATES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
ESTIMATORS = ("k1", "k2", "k3")
RESERVED = ("loss", "tokens", "ess", "weight_sum", "weight_sq_sum")
SCOPES = ("token", "sequence", "group", "batch")

CustomLoss = Callable[[Tensor, Tensor | None, TokenBatch], tuple[Tensor, dict[str, Tensor]]]
Prepare = Callable[[Tensor, Tensor | None, TokenBatch], TokenBatch]


class KL:
    """The KL term beta * KL(pi || ref): `estimator` "k1", "k2" or "k3", and its coefficient."""

    def __init__(self, estimator: str = "k3", coef: float = 0.001) -> None:
        self.estimator = one_of("estimator", estimator, ESTIMATORS)
        self.coef = number("coef", coef, 0.0)

    def __repr__(self) -> str:
        return f"KL({self.estimator!r}, {self.coef})"


class TIS:
    """Truncated importance sampling: each token's loss times min(exp(old_logp - rollout_logp), cap)."""

    def __init__(self, cap: float = 2.0) -> None:
        self.cap = number("cap", cap, 0.0)

    def __repr__(self) -> str:
        return f"TIS({self.cap})"


class Numbers(NamedTuple):
    """An objective's numbers as 0-d float64 tensors on the CPU (in `Objective.values`: of another dtype and device)."""

    clip_low: Tensor
    clip_high: Tensor
    dual_clip: Tensor
    cap: Tensor
    kl: Tensor
    entropy: Tensor
    length: Tensor


class Objective:
    """A policy objective; see `rlcore.algorithms.policy_loss` for the order in which its parts are evaluated.

    ratio: "token", "sequence" or "segment" (geometric means, GSPO), "none" (pi / sg(pi), plain policy gradient).
    surrogate: "ppo", "cispo", "reinforce". clip: (low, high), the ratio is clipped to [1 - low, 1 + high]; a batch's
    own `clip_low` and `clip_high` override it per token. dual_clip: c > 1 bounds the loss of negative advantages.
    correction: None or `TIS(cap)`. kl: None or `KL(estimator, coef)`. entropy: coefficient of the entropy bonus.
    aggregate: "token_mean", "seq_mean_token_mean", "seq_mean_token_sum" or "seq_mean_token_sum_norm", which divides by
    the constant `length`. Raises ValueError or TypeError that name the argument.
    """

    def __init__(
        self,
        ratio: str = "token",
        surrogate: str = "ppo",
        clip: tuple[float, float] = (0.2, 0.2),
        dual_clip: float | None = None,
        correction: TIS | None = None,
        kl: KL | None = None,
        entropy: float = 0.0,
        aggregate: str = "token_mean",
        length: float | None = None,
    ) -> None:
        self._build(ratio, surrogate, clip, dual_clip, correction, kl, entropy, aggregate, length)
        register(self)

    def _build(
        self,
        ratio: str = "token",
        surrogate: str = "ppo",
        clip: tuple[float, float] = (0.2, 0.2),
        dual_clip: float | None = None,
        correction: TIS | None = None,
        kl: KL | None = None,
        entropy: float = 0.0,
        aggregate: str = "token_mean",
        length: float | None = None,
    ) -> None:
        self.ratio = one_of("ratio", ratio, RATIOS)
        self.surrogate = one_of("surrogate", surrogate, SURROGATES)
        self.aggregate = one_of("aggregate", aggregate, AGGREGATES)
        if correction is not None and not isinstance(correction, TIS):
            raise TypeError(f"correction: expected None or rl.TIS(cap); got {correction!r}")
        if kl is not None and not isinstance(kl, KL):
            raise TypeError(f'kl: expected None or rl.KL("k3", coef); got {kl!r}')
        if not isinstance(clip, (tuple, list)) or len(clip) != 2:
            raise TypeError(f"clip: expected a pair (low, high); got {clip!r}")
        if aggregate == "seq_mean_token_sum_norm" and length is None:
            raise ValueError('length: needed with aggregate="seq_mean_token_sum_norm", the maximum response length')
        self.kl, self.correction = kl, correction
        # 0-d tensors one by one: the length of a vector of them would be a size that torch.compile may mix up with N.
        self.numbers = Numbers(
            clip_low=scalar(number("clip[0]", clip[0], 0.0)),
            clip_high=scalar(number("clip[1]", clip[1], 0.0)),
            dual_clip=scalar(number("dual_clip", torch.inf if dual_clip is None else dual_clip, 1.0, exclusive=True)),
            cap=scalar(torch.inf if correction is None else correction.cap),
            kl=scalar(0.0 if kl is None else kl.coef),
            entropy=scalar(number("entropy", entropy, None)),
            length=scalar(number("length", 1.0 if length is None else length, 0.0, exclusive=True)),
        )
        self.has_dual_clip = dual_clip is not None
        self.has_correction = correction is not None
        self.needs_entropy = float(entropy) != 0.0
        self.scope = "token" if ratio in ("none", "token") else "sequence"
        self.custom_loss: CustomLoss | None = None
        self.custom_metrics: tuple[str, ...] = ()
        self.custom_prepare: Prepare | None = None
        self.debug = False
        estimator = None if kl is None else kl.estimator
        flags = (self.has_dual_clip, self.has_correction, self.needs_entropy)
        structure = (ratio, surrogate, aggregate, estimator, *flags)
        self.key = "|".join(map(str, structure))

    @classmethod
    def custom(
        cls,
        fn: CustomLoss,
        scope: str = "token",
        aggregate: str = "token_mean",
        length: float | None = None,
        prepare: Prepare | None = None,
        needs_entropy: bool = False,
        debug: bool = False,
        device: torch.device | str = "cpu",
    ) -> Objective:
        """An objective of your own: `fn(logp, entropy, batch) -> (loss per token [n], {name: metric per token [n]})`.

        It sees one chunk of rows (`batch` is the chunk's), cut anywhere for scope "token" and at sequence or group
        borders for "sequence" and "group". Scope "batch" takes `prepare(logp, entropy, batch) -> batch`, run once over
        the whole minibatch without gradient, which freezes its statistics into weights, masks and bounds; `fn` is then
        of token scope. `needs_entropy=True` where the loss reads entropy. Metrics are means over the minibatch's
        tokens, those named `*_min` and `*_max` extremes. `debug=True` compares one chunk with two.

        `fn` is run once on four tokens on `device`. Raises ValueError where that fails, and for a tensor outside it
        that would get a gradient (captured, global, or in a module): the folded head would lose that gradient.
        """
        objective = cls.__new__(cls)
        objective._build(aggregate=aggregate, length=length)
        objective.scope = one_of("scope", scope, SCOPES)
        if (prepare is not None) != (scope == "batch"):
            raise ValueError('prepare: needed for scope="batch" and only there')
        objective.custom_loss, objective.custom_prepare = fn, prepare
        objective.needs_entropy, objective.debug = needs_entropy, debug
        objective.custom_metrics = probe(fn, torch.device(device))
        objective.key = f"custom-{next(_serial)}"
        register(objective)
        return objective

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.custom_loss is not None:  # another process has other custom objectives under this key
            self.key = f"custom-{next(_serial)}"
        register(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Objective) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def _value(self) -> tuple[Any, ...]:
        return (self.key, *(x.item() for x in self.numbers))

    def values(self, like: Tensor) -> Numbers:
        """The numbers as 0-d tensors of a tensor's dtype and device, in one copy."""
        return Numbers(*torch.stack(self.numbers).to(device=like.device, dtype=like.dtype, non_blocking=True).unbind())

    def prepare(self, logp: Tensor, entropy: Tensor | None, batch: TokenBatch) -> TokenBatch:
        """Freeze the statistics of a whole minibatch into its fields (batch scope); else return it."""
        if self.custom_prepare is None:
            return batch
        if batch.is_micro:
            raise ValueError("batch: prepare needs the whole minibatch; got a micro-batch that `split` cut from one")
        with torch.no_grad():
            flat_entropy = None if entropy is None else entropy.detach().reshape(batch.shape)
            ready = self.custom_prepare(logp.detach().reshape(batch.shape), flat_entropy, batch)
        if not isinstance(ready, TokenBatch):
            raise TypeError(f"prepare: expected it to return a TokenBatch; got {type(ready).__name__}")
        return ready.derived(prepared=True)

    def __repr__(self) -> str:
        if self.custom_loss is not None:
            name = getattr(self.custom_loss, "__name__", self.custom_loss)
            return f"Objective.custom({name!r}, scope={self.scope!r})"
        low, high, bonus = (float(x) for x in (self.numbers.clip_low, self.numbers.clip_high, self.numbers.entropy))
        named = {"ratio": self.ratio, "surrogate": self.surrogate, "clip": (round(low, 12), round(high, 12)),
                 "dual_clip": self.numbers.dual_clip.item() if self.has_dual_clip else None,
                 "correction": self.correction, "kl": self.kl, "entropy": bonus, "aggregate": self.aggregate,
                 "length": self.numbers.length.item() if self.aggregate == AGGREGATES[3] else None}  # fmt: skip
        return f"Objective({', '.join(f'{name}={value!r}' for name, value in named.items() if value is not None)})"


# Custom ops take an objective as a string. There are finitely many structures of built-in objectives; custom ones are
# bounded, so that a fresh one per step can not leak.
CUSTOM_OBJECTIVES = 1024
_built_in: dict[str, Objective] = {}
_custom: OrderedDict[str, Objective] = OrderedDict()
_serial = itertools.count()


def register(objective: Objective) -> None:
    if objective.custom_loss is None:
        _built_in.setdefault(objective.key, objective)
        return
    _custom[objective.key] = objective
    while len(_custom) > CUSTOM_OBJECTIVES:
        _custom.popitem(last=False)


def lookup(key: str, numbers: Sequence[Tensor]) -> Objective:
    """The objective registered under a key, with the given numbers."""
    known = _built_in.get(key) or _custom.get(key)
    if known is None:
        raise RuntimeError(
            f"objective {key!r} left the registry, which holds the last {CUSTOM_OBJECTIVES} custom ones; create a "
            "custom objective once, not once per step"
        )
    found = object.__new__(Objective)
    found.__dict__.update(known.__dict__)
    found.numbers = Numbers(*numbers)
    return found


def one_of(name: str, given: str, allowed: tuple[str, ...]) -> str:
    if given not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {given!r}")
    return given


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def number(name: str, given: float, lowest: float | None, exclusive: bool = False) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name}: expected a number; got {given!r}")
    too_low = lowest is not None and (given <= lowest if exclusive else given < lowest)
    infinite = given in (float("inf"), float("-inf")) and name not in ("dual_clip", "cap", "clip[1]")
    if given != given or too_low or infinite:
        bound = "that is finite" if lowest is None else f"{'above' if exclusive else 'at least'} {lowest:g}"
        raise ValueError(f"{name}: expected a number {bound}; got {given!r}")
    return float(given)


def probe(fn: CustomLoss, device: torch.device) -> tuple[str, ...]:
    """Run a custom objective once on two sequences of two tokens: the names of its metrics, and early errors."""
    ones = torch.ones(4, device=device)
    zeros = torch.zeros(4, dtype=torch.int64, device=device)
    batch = TokenBatch(
        zeros, torch.tensor([0, 2, 4], device=device), advantage=ones, old_logp=-ones, ref_logp=-ones,
        rollout_logp=-ones, group=zeros[:2], segment=zeros, weight=ones, clip_low=ones / 5, clip_high=ones / 5,
        kl_mask=ones > 0, value=ones, old_value=ones, returns=ones,
    )  # fmt: skip
    logp, entropy = (-ones).requires_grad_(), ones.clone().requires_grad_()
    try:
        with torch.enable_grad():
            result = fn(logp, entropy, batch)
    except Exception as error:
        raise ValueError(
            f"custom objective: it fails on a probe of four tokens on {device} ({type(error).__name__}: {error}); "
            "where it reads constants on another device, give Objective.custom(..., device=...)"
        ) from error
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise TypeError(f"custom objective: expected (loss per token, dict of metrics); got {type(result).__name__}")
    loss, metrics = result
    if not isinstance(loss, Tensor) or loss.shape != (4,):
        raise ValueError(f"custom objective: expected a loss of shape (4,) on a probe of 4 tokens; got {loss!r}")
    check_leaves(loss, (logp, entropy))
    for name, value in metrics.items():
        if name in RESERVED:
            raise ValueError(f"custom objective: a metric may not be called {name!r}; the library has one of that name")
        if not isinstance(value, Tensor) or value.shape != (4,):
            raise ValueError(f"custom objective: metric {name!r} needs a value per token; got {value!r} on 4 tokens")
    return tuple(metrics)


def check_leaves(loss: Tensor, allowed: tuple[Tensor, ...]) -> None:
    """The gradient may reach logp and entropy alone: the folded head gives no other tensor its gradient."""
    seen, open_nodes = set(), [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and all(leaf is not x for x in allowed):
            raise ValueError(
                f"custom objective: a tensor of shape {tuple(leaf.shape)} outside it requires grad, and its gradient "
                "would be lost; detach it, or compute that term outside the objective"
            )
        open_nodes.extend(before for before, _ in node.next_functions)
