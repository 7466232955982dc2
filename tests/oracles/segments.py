"""Float64 oracles of the segments family: plain Python loops over numbers, written from the formulas."""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def numbers(x) -> Array:
    if hasattr(x, "detach"):
        x = x.detach().double().numpy() if x.is_floating_point() else x.numpy()
    return np.asarray(x)


def members(ids, mask, num):
    """The rows of each segment, in order."""
    rows = [[] for _ in range(num)]
    for i, s in enumerate(ids):
        if mask is None or mask[i]:
            rows[int(s)].append(i)
    return rows


def ids_of(offsets, n):
    ids = np.zeros(n, dtype=np.int64)
    for s in range(len(offsets) - 1):
        for i in range(int(offsets[s]), int(offsets[s + 1])):
            ids[i] = s
    return ids


def mean(values):
    return math.fsum(values) / len(values) if len(values) else 0.0


def std(values, ddof=1):
    if len(values) <= ddof:
        return 0.0
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / (len(values) - ddof))


def segment_reduce(name, x, ids, num, mask=None, ddof=1) -> Array:
    x = numbers(x)
    functions = {
        "sum": math.fsum,
        "mean": mean,
        "std": lambda v: std(v, ddof),
        "count": len,
        "min": lambda v: min(v, default=math.inf),
        "max": lambda v: max(v, default=-math.inf),
    }
    return np.array(
        [functions[name]([float(x[i]) for i in rows]) for rows in members(ids, mask, num)], dtype=np.float64
    )


def segment_rank(x, ids, num, mask=None) -> Array:
    x = numbers(x)
    out = np.full(len(x), -1)
    for rows in members(ids, mask, num):
        for place, i in enumerate(sorted(rows, key=lambda i: (-float(x[i]), i))):
            out[i] = place
    return out


def segment_topk(x, k, ids, num, mask=None):
    x = numbers(x)
    values, index = np.full((num, k), -math.inf), np.full((num, k), -1)
    for s, rows in enumerate(members(ids, mask, num)):
        for place, i in enumerate(sorted(rows, key=lambda i: (-float(x[i]), i))[:k]):
            values[s, place], index[s, place] = x[i], i
    return values, index


def weighted_mean(values, w):
    total = math.fsum(w)
    return math.fsum(a * b for a, b in zip(w, values, strict=True)) / total


def weighted_std(values, w, ddof):
    total = math.fsum(w)
    if total <= ddof:
        return 1.0
    m = weighted_mean(values, w)
    return math.sqrt(math.fsum(a * (v - m) ** 2 for a, v in zip(w, values, strict=True)) / (total - ddof))


def group_advantage(
    reward, group, center="group", scale="group", ddof=1, eps=1e-6, weight=None, mask=None, spread="reward"
) -> Array:
    r = [float(v) for v in numbers(reward).reshape(-1)]
    n = len(r)
    g = [0] * n if group is None else [int(v) for v in numbers(group).reshape(-1)]
    keep = [True] * n if mask is None else [bool(v) for v in numbers(mask).reshape(-1)]
    w = [1.0] * n if weight is None else [float(v) for v in numbers(weight).reshape(-1)]
    kept = [i for i in range(n) if keep[i]]
    residual = [0.0] * n
    for i in kept:
        same = [j for j in kept if g[j] == g[i]]
        base = {
            "none": [],
            "batch": kept,
            "group": same,
            "leave_one_out": [j for j in same if j != i],
        }[center]
        if center == "none":
            residual[i] = r[i]
        elif math.fsum(w[j] for j in base) > 0:
            residual[i] = r[i] - weighted_mean([r[j] for j in base], [w[j] for j in base])
    out = np.zeros(n)
    source = r if spread == "reward" else residual
    for i in kept:
        out[i] = residual[i]
        if scale != "none":
            scope = kept if scale == "batch" else [j for j in kept if g[j] == g[i]]
            out[i] = residual[i] / (weighted_std([source[j] for j in scope], [w[j] for j in scope], ddof) + eps)
    return out.reshape(numbers(reward).shape)


def whiten(x, mask=None, ddof=1, eps=1e-8) -> Array:
    x = numbers(x)
    keep = np.ones(x.shape, dtype=bool) if mask is None else numbers(mask).astype(bool)
    values = [float(v) for v in x[keep]]
    out = np.zeros(x.shape)
    if values:
        m = mean(values)
        var = math.fsum((v - m) ** 2 for v in values) / max(len(values) - ddof, 1)
        out[keep] = [(v - m) / math.sqrt(var + eps) for v in values]
    return out


def per_row(c, n):
    c = numbers(c)
    return np.full(n, float(c)) if c.ndim == 0 else c.reshape(-1).astype(np.float64)


def live_rows(offsets, s, mask):
    """Unmasked rows of sequence s, last first."""
    return [i for i in range(int(offsets[s + 1]) - 1, int(offsets[s]) - 1, -1) if mask is None or mask[i]]


def reverse_scan(delta, decay, offsets, mask=None, bootstrap=None) -> Array:
    delta = numbers(delta)
    decay = per_row(decay, len(delta))
    y = np.zeros(len(delta))
    for s in range(len(offsets) - 1):
        carry = 0.0 if bootstrap is None else float(bootstrap[s])
        for i in live_rows(offsets, s, mask):
            carry = float(delta[i]) + decay[i] * carry
            y[i] = carry
    return y


def gae(reward, value, offsets, gamma=1.0, lam=0.95, mask=None, bootstrap=None):
    reward, value = numbers(reward), numbers(value)
    gamma, lam = per_row(gamma, len(reward)), per_row(lam, len(reward))
    advantage, returns = np.zeros(len(reward)), np.zeros(len(reward))
    for s in range(len(offsets) - 1):
        next_value = 0.0 if bootstrap is None else float(bootstrap[s])
        carry = 0.0
        for i in live_rows(offsets, s, mask):
            delta = float(reward[i]) + gamma[i] * next_value - float(value[i])
            carry = delta + gamma[i] * lam[i] * carry
            next_value = float(value[i])
            advantage[i], returns[i] = carry, carry + next_value
    return advantage, returns


def discounted_return(reward, offsets, gamma=1.0, mask=None, bootstrap=None) -> Array:
    return reverse_scan(reward, gamma, offsets, mask, bootstrap)


def vtrace(reward, value, log_ratio, offsets, gamma=1.0, lam=1.0, rho_bar=1.0, c_bar=1.0, mask=None, bootstrap=None):
    """By the definition, an explicit sum over t >= s (equation 1 of the paper), not by its recursion."""
    reward, value, log_ratio = numbers(reward), numbers(value), numbers(log_ratio)
    gamma, lam = per_row(gamma, len(reward)), per_row(lam, len(reward))
    advantage, target = np.zeros(len(reward)), np.zeros(len(reward))
    for s in range(len(offsets) - 1):
        rows = live_rows(offsets, s, mask)[::-1]
        end = 0.0 if bootstrap is None else float(bootstrap[s])
        v = [float(value[i]) for i in rows] + [end]
        ratio = [math.exp(float(log_ratio[i])) for i in rows]
        for a in range(len(rows)):
            total, product = v[a], 1.0
            for t in range(a, len(rows)):
                i = rows[t]
                total += product * min(rho_bar, ratio[t]) * (float(reward[i]) + gamma[i] * v[t + 1] - v[t])
                product *= gamma[i] * lam[i] * min(c_bar, ratio[t])
            target[rows[a]] = total
        for a, i in enumerate(rows):
            following = target[rows[a + 1]] if a + 1 < len(rows) else end
            advantage[i] = min(rho_bar, ratio[a]) * (float(reward[i]) + gamma[i] * following - v[a])
    return advantage, target
