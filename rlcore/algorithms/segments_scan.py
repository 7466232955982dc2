"""Reverse scans over ragged sequences: advantages, returns and V-trace without a loop over tokens.

All of them are one recurrence, y[i] = delta[i] + decay[i] * y[i+1] inside each sequence. Row i of a sequence is a
prediction: value[i] is the value before token i, reward[i] arrives after it.

A masked row (an observation, a tool's answer, padding) is removed from time: what follows it is passed on to what
precedes it unchanged, neither discounted nor decayed, its own reward and value are never read, and results are 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlcore.algorithms.segments_input import Rows, check_tensor, result_dtype, rows_of

Scan = Callable[[Tensor, Tensor, Tensor], Tensor]


class Advantages(NamedTuple):
    """Advantages and value targets, both in the shape of the rewards."""

    advantage: Tensor
    returns: Tensor


def linear_scan(delta: Tensor, decay: Tensor, last: Tensor) -> Tensor:
    """y[i] = delta[i] + decay[i] * y[i+1], where the sum is cut after every row that is `last`.  [N] each

    Two neighbouring rows are one row of a scan half as long:
        y[2j] = (delta[2j] + decay[2j] delta[2j+1]) + (decay[2j] decay[2j+1]) y[2j+2]
    which gives the even rows, and these give the odd ones: O(N) work in 2 log2 N steps, without divisions. Decays far
    above 1 can overflow in products that a loop would not form. A NaN stays in its sequence. Differentiable in delta
    and decay.
    """
    n = delta.shape[0]
    if n <= 1:
        return delta.clone()
    if n % 2:
        delta, decay, last = pad(delta, (0, 1)), pad(decay, (0, 1)), pad(last, (0, 1), value=True)
    decay = decay.masked_fill(last, 0.0)
    delta0, decay0, last0 = delta[0::2], decay[0::2], last[0::2]
    delta1, decay1, last1 = delta[1::2], decay[1::2], last[1::2]
    y0 = linear_scan(delta0 + decay0 * delta1.masked_fill(last0, 0.0), decay0 * decay1, last0 | last1)
    y1 = delta1 + decay1 * pad(y0[1:], (0, 1)).masked_fill(last1, 0.0)
    return torch.stack((y0, y1), 1).reshape(-1)[:n]


def scan_rows(rows: Rows, delta: Tensor, decay: Tensor, after_end: Tensor | None, scan: Scan) -> Tensor:
    """The recurrence over `rows`, with y = after_end (0 if None) behind the last row of each sequence."""
    if after_end is not None:
        delta = delta + torch.where(rows.last, decay * after_end, torch.zeros_like(delta))
    return scan(delta, decay, rows.last)


def reverse_scan(
    delta: Tensor,
    decay: float | Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    *,
    scan: Scan = linear_scan,
) -> Tensor:
    """y[i] = delta[i] + decay[i] * y[i+1] inside each sequence, and y = bootstrap[s] (0 if None) after its end.

    delta [N] with offsets [S+1], or [B, T]; decay a float, a 0-d tensor or one number per row; mask like delta;
    bootstrap [S]. Returns delta's shape, float64 for float64 input and float32 otherwise; masked rows are passed over
    and hold 0. Differentiable in delta, decay and bootstrap. Raises TypeError or ValueError naming the argument.
    Source: own (odd-even reduction of a first-order linear recurrence).
    """
    rows = rows_of("delta", delta, offsets, mask)
    y = scan_rows(rows, rows.load("delta", delta), rows.coefficient("decay", decay), rows.bootstrap(bootstrap), scan)
    return rows.store(y, result_dtype(delta))


def gae(
    reward: Tensor,
    value: Tensor,
    offsets: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    *,
    scan: Scan = linear_scan,
) -> Advantages:
    """Generalized advantage estimation.

        delta[i] = reward[i] + gamma[i] * value[i+1] - value[i]
        advantage[i] = delta[i] + gamma[i] * lam[i] * advantage[i+1],    returns[i] = advantage[i] + value[i]

    where i+1 is the next unmasked row of the sequence; behind its last row the value is bootstrap[s] (the value of the
    state at which a sequence was cut off; None or 0 where it ended) and the advantage 0.
    reward and value are [N] with offsets [S+1], or [B, T]; mask like reward (bool or 0/1); bootstrap [S]. gamma and lam
    are floats, 0-d tensors, or one number per row: gamma[i] discounts from row i to the next. The reward of a masked
    row is not read: a reward for the whole sequence belongs on its last unmasked row.
    Returns (advantage, returns), named too, in reward's shape, 0 where masked, not whitened; float64 if an input is,
    otherwise float32. Differentiable. Raises TypeError or ValueError naming the argument.
    Source: Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation, eq. 16.
    """
    rows = rows_of("reward", reward, offsets, mask)
    r, v = rows.load("reward", reward), rows.load("value", value)
    discount = rows.coefficient("gamma", gamma)
    decay = discount * rows.coefficient("lam", lam)
    delta = rows.fill(r + discount * rows.following(v, rows.bootstrap(bootstrap)) - v, 0.0)
    advantage = scan_rows(rows, delta, decay, None, scan)
    dtype = result_dtype(reward, value)
    return Advantages(rows.store(advantage, dtype), rows.store(advantage + v, dtype))


def discounted_return(
    reward: Tensor,
    offsets: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    *,
    scan: Scan = linear_scan,
) -> Tensor:
    """Discounted sum of the rewards from each row on: G[i] = reward[i] + gamma[i] * G[i+1], at the end bootstrap[s].

    Shapes, masks, bootstrap, dtypes and errors as in `gae`. REINFORCE++ is this with token rewards, whitened
    (`whiten`); with gamma = 1 it is the reward to go.
    Source: Sutton and Barto, Reinforcement Learning, section 3.3.
    """
    rows = rows_of("reward", reward, offsets, mask)
    discount = rows.coefficient("gamma", gamma)
    y = scan_rows(rows, rows.load("reward", reward), discount, rows.bootstrap(bootstrap), scan)
    return rows.store(y, result_dtype(reward))


def vtrace(
    reward: Tensor,
    value: Tensor,
    log_ratio: Tensor,
    offsets: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    *,
    scan: Scan = linear_scan,
) -> Advantages:
    """V-trace: value targets and policy-gradient advantages from data of another policy.

        rho[i] = min(rho_bar, exp(log_ratio[i])),    c[i] = lam[i] * min(c_bar, exp(log_ratio[i]))
        delta[i] = rho[i] * (reward[i] + gamma[i] * value[i+1] - value[i])
        returns[i] = value[i] + delta[i] + gamma[i] * c[i] * (returns[i+1] - value[i+1])
        advantage[i] = rho[i] * (reward[i] + gamma[i] * returns[i+1] - value[i])

    log_ratio = log pi(token) - log mu(token), mu the policy that sampled it; returns[i+1] and value[i+1] are
    bootstrap[s] (0 if None) at the end. The advantage already holds rho: it multiplies grad log pi without a further
    ratio. rho_bar and c_bar are positive floats (math.inf: no truncation). On-policy (log_ratio = 0, bounds >= 1)
    the returns are those of `gae`, with lam = 1 the advantages too. Shapes, masks, dtypes and errors as in `gae`;
    gradients flow into log_ratio as well, so detach the result where it is a target.
    Source: Espeholt et al. 2018, IMPALA, section 4.1 (lam: remark 2).
    """
    for name, bound in (("rho_bar", rho_bar), ("c_bar", c_bar)):
        if not bound > 0:
            raise ValueError(f"{name}: expected a positive number; got {bound}")
    rows = rows_of("reward", reward, offsets, mask)
    check_tensor("log_ratio", log_ratio, reward, "reward")
    r, v, x = rows.load("reward", reward), rows.load("value", value), rows.load("log_ratio", log_ratio)
    discount, after_end = rows.coefficient("gamma", gamma), rows.bootstrap(bootstrap)
    # Truncated before exp: the gradient of min(bound, exp(x)) is NaN where exp(x) overflows.
    rho, c = x.clamp(max=math.log(rho_bar)).exp(), x.clamp(max=math.log(c_bar)).exp()
    decay = rows.fill(discount * rows.coefficient("lam", lam) * c, 1.0)
    delta = rows.fill(rho * (r + discount * rows.following(v, after_end) - v), 0.0)
    target = v + scan_rows(rows, delta, decay, None, scan)
    advantage = rho * (r + discount * rows.following(target, after_end) - v)
    dtype = result_dtype(reward, value, log_ratio)
    return Advantages(rows.store(advantage, dtype), rows.store(target, dtype))
