"""The vocabulary head in numpy float64, row by row from the formulas; shares nothing with the library.

z_v = c tanh(s a_v / c) / t with a = W h + b.   logp = log p_y.   H = -sum p log p.
d logp = e_y - p,   d H = -p (log p + H),   dz/da = s (1 - tanh^2) / t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Row:
    """One token: its distribution and how the logits move with the raw ones."""

    log_p: np.ndarray
    p: np.ndarray
    entropy: float
    slope: np.ndarray


@dataclass
class Head:
    """hidden [N, H], weight [V, H], target [N], bias [V] or None, temperature [N], mask [N]."""

    hidden: np.ndarray
    weight: np.ndarray
    target: np.ndarray
    bias: np.ndarray | None = None
    temperature: np.ndarray | float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    mask: np.ndarray | None = None

    def kept(self):
        N = self.hidden.shape[0]
        return [i for i in range(N) if self.mask is None or self.mask[i]]

    def row(self, i: int) -> Row:
        a = self.weight @ self.hidden[i]
        if self.bias is not None:
            a = a + self.bias
        t = self.temperature[i] if np.ndim(self.temperature) else self.temperature
        a = self.logit_scale * a
        if self.softcap is None:
            z, slope = a / t, np.full_like(a, self.logit_scale / t)
        else:
            bent = np.tanh(a / self.softcap)
            z = self.softcap * bent / t
            # 1 - tanh^2 as 1 / cosh^2: no cancellation where it saturates.
            slope = self.logit_scale / t / np.cosh(np.minimum(np.abs(a / self.softcap), 300.0)) ** 2
        top = z.max()
        log_p = z - top - np.log(np.exp(z - top).sum())
        p = np.exp(log_p)
        finite = p > 0
        return Row(log_p, p, -float((p[finite] * log_p[finite]).sum()), slope)

    def forward(self) -> tuple[np.ndarray, np.ndarray]:
        """logp [N] and entropy [N], 0 where masked."""
        logp, entropy = np.zeros(self.hidden.shape[0]), np.zeros(self.hidden.shape[0])
        for i in self.kept():
            row = self.row(i)
            logp[i], entropy[i] = row.log_p[self.target[i]], row.entropy
        return logp, entropy

    def further(self) -> tuple[np.ndarray, np.ndarray]:
        """log p [N, V] (rows of zeros where masked) and sum p^2 [N]."""
        log_p, sum_sq = np.zeros((self.hidden.shape[0], self.weight.shape[0])), np.zeros(self.hidden.shape[0])
        for i in self.kept():
            row = self.row(i)
            log_p[i], sum_sq[i] = row.log_p, (row.p**2).sum()
        return log_p, sum_sq

    def backward(self, d_logp: np.ndarray, d_entropy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """d_hidden [N, H], d_weight [V, H], d_bias [V] of sum_i d_logp_i logp_i + d_entropy_i H_i."""
        d_hidden, d_weight = np.zeros_like(self.hidden), np.zeros_like(self.weight)
        d_bias = np.zeros(self.weight.shape[0])
        for i in self.kept():
            d_raw = self.d_raw(i, d_logp[i], d_entropy[i])
            d_hidden[i] = self.weight.T @ d_raw
            d_weight += np.outer(d_raw, self.hidden[i])
            d_bias += d_raw
        return d_hidden, d_weight, d_bias

    def d_raw(self, i: int, d_logp: float, d_entropy: float) -> np.ndarray:
        row = self.row(i)
        y = self.target[i]
        toward = -row.p
        # 1 - p_y as the sum of the others, which keeps its digits where p_y -> 1.
        toward[y] = np.delete(row.p, y).sum()
        log_p = np.where(row.p > 0, row.log_p, 0.0)
        return (d_logp * toward - d_entropy * row.p * (log_p + row.entropy)) * row.slope

    def slope(self) -> np.ndarray:
        """d logp_i / d hidden_i, [N, H]."""
        out = np.zeros_like(self.hidden)
        for i in self.kept():
            out[i] = self.weight.T @ self.d_raw(i, 1.0, 0.0)
        return out
