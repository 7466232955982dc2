"""Inputs for the vocabulary head's tests, their oracle and their plain-torch baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from accuracy import assert_accurate, to_float64
from oracles import vocab_head as oracle
from rlcore.algorithms import vocab_head_rows as selection

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DATA = ("random", "peaked", "negative", "flat", "forbidden")
# (bias, temperature, softcap, logit_scale); "rows" is a temperature per row.
SETTINGS = {
    "plain": (False, 1.0, None, 1.0),
    "bias": (True, 0.7, None, 1.0),
    "softcap": (False, 1.0, 5.0, 1.0),
    "rows": (True, "rows", 30.0, 0.25),
    "hot": (True, 20.0, None, 3.0),
    "cold": (False, 0.05, 50.0, 1.0),
}


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    temperature: Tensor | float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    mask: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def numbers(self) -> dict:
        return {"temperature": self.temperature, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def kwargs(self) -> dict:
        return {"bias": self.bias, **self.numbers(), "mask": self.mask}

    def fresh(self) -> Case:
        """The same inputs as leaves of a new graph (strides kept)."""
        leaf = lambda x: None if x is None else x.detach().requires_grad_()  # noqa: E731
        return replace(self, hidden=leaf(self.hidden), weight=leaf(self.weight), bias=leaf(self.bias))

    def oracle(self) -> oracle.Head:
        """Flat float64 copies; what masked rows hold does not get there."""
        H = self.hidden.shape[-1]
        numpy = lambda x: None if x is None else to_float64(x)  # noqa: E731
        t = self.temperature
        t = to_float64(t).reshape(-1) if isinstance(t, Tensor) and t.dim() else float(t)
        return oracle.Head(
            to_float64(self.hidden).reshape(-1, H), to_float64(self.weight), self.target.reshape(-1).numpy(),
            numpy(self.bias), t, self.softcap, self.logit_scale,
            None if self.mask is None else self.mask.reshape(-1).numpy() != 0,
        )  # fmt: skip

    def kept(self) -> Tensor:
        return torch.ones(self.target.shape, dtype=torch.bool) if self.mask is None else self.mask.bool()

    def log_p(self) -> Tensor:
        """All log-probs as a few lines of plain torch in the inputs' dtype make them; anything where masked."""
        mask = self.kept()
        z = F.linear(torch.where(mask[..., None], self.hidden, 0), self.weight, self.bias) * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        t = self.temperature
        z = z / (t[..., None].to(z.dtype) if isinstance(t, Tensor) and t.dim() else t)
        return z.log_softmax(-1)

    def baseline(self) -> tuple[Tensor, Tensor]:
        """logp and entropy from `log_p`."""
        mask, log_p = self.kept(), self.log_p()
        label = torch.where(mask, self.target, 0)
        logp = log_p.gather(-1, label[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
        return torch.where(mask, logp, 0), torch.where(mask, entropy, 0)


def make(
    data: str = "random",
    setting: str = "plain",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (47,),
    H: int = 31,
    V: int = 123,
    masked: float = 0.0,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    with_bias, temperature, softcap, logit_scale = SETTINGS[setting]
    weight, hidden = randn(V, H) / H**0.5, randn(*shape, H)
    target = torch.randint(V, shape, generator=g)
    bias = randn(V) if with_bias else None
    if data == "peaked":  # p -> 1 on every second row
        hidden = torch.where((torch.arange(hidden.shape[-2]) % 2 == 0)[:, None], 25 * weight[target], hidden)
    elif data == "negative":  # every logit far below 0
        bias = -300 + (randn(V) if bias is None else bias)
    elif data == "flat":
        hidden = hidden * 1e-4
    elif data == "forbidden":  # -inf where a token is not allowed
        bias = randn(V) if bias is None else bias
        bias[torch.arange(V) % 7 == 3] = -torch.inf
        target = torch.where(target % 7 == 3, target - 1, target)
    mask = torch.rand(shape, generator=g) >= masked if masked else None
    if temperature == "rows":
        temperature = torch.rand(shape, generator=g) * 1.5 + 0.5
        temperature = temperature.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Case(hidden.to(dtype), weight.to(dtype), target, None if bias is None else bias.to(dtype), temperature,
                softcap, logit_scale, mask)  # fmt: skip


def coefficients(case: Case, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Incoming gradients of logp and entropy: neither ones nor contiguous."""
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    both = torch.randn(*case.target.shape, 2, generator=g, dtype=dtype)
    return both[..., 0], both[..., 1]


def gradients_of(logp: Tensor, entropy: Tensor | None, leaves: list[Tensor], d_logp: Tensor, d_entropy: Tensor):
    outputs, incoming = [logp], [d_logp.to(logp.dtype)]
    if entropy is not None:
        outputs.append(entropy)
        incoming.append(d_entropy.to(entropy.dtype))
    return torch.autograd.grad(outputs, leaves, incoming)


def check_forward(case: Case, logp: Tensor, entropy: Tensor | None) -> None:
    expected_logp, expected_entropy = case.oracle().forward()
    base_logp, base_entropy = case.baseline()
    shape = case.target.shape
    assert_accurate(logp, expected_logp.reshape(shape), base_logp, name="logp")
    if entropy is not None:
        assert_accurate(entropy, expected_entropy.reshape(shape), base_entropy, name="entropy")


def check_further(case: Case, top1: Tensor, top1_logp: Tensor, sum_sq: Tensor) -> None:
    """The likeliest token is one to rounding; its log-prob and sum p^2 by the rule; zeros where masked."""
    log_p, expected = case.oracle().further()
    base = torch.where(case.kept()[..., None], case.log_p(), 0).detach()
    shape = case.target.shape
    assert top1.dtype == torch.int64 and top1.shape == top1_logp.shape == sum_sq.shape == shape
    at_top = torch.from_numpy(log_p).gather(1, top1.reshape(-1, 1)).squeeze(1)
    assert_accurate(at_top.to(sum_sq.dtype), log_p.max(1), base.amax(-1).reshape(-1), name="top1")
    assert_accurate(top1_logp, log_p.max(1).reshape(shape), base.amax(-1), name="top1_logp")
    assert_accurate(sum_sq, expected.reshape(shape), (2 * base).exp().sum(-1) * case.kept(), name="sum_sq")
    for x in (top1, top1_logp, sum_sq):
        assert not x[~case.kept()].any() and not x.requires_grad


def check_gradients(case: Case, found: list[Tensor], with_logp: bool = True, with_entropy: bool = True) -> None:
    """Gradients for `coefficients(case)` against the oracle, beside autograd through the baseline."""
    d_logp, d_entropy = (
        x if used else 0 * x for x, used in zip(coefficients(case), (with_logp, with_entropy), strict=True)
    )
    expected = case.oracle().backward(to_float64(d_logp).reshape(-1), to_float64(d_entropy).reshape(-1))
    again = case.fresh()
    base = gradients_of(*again.baseline(), again.leaves, d_logp, d_entropy)
    norm = max(abs(x).max() for x in expected)
    for name, x, y, z in zip(("hidden", "weight", "bias"), found, expected, base, strict=False):
        assert x.dtype == z.dtype, f"d_{name}"
        assert_accurate(x, y.reshape(x.shape), z, gradient=True, norm=norm, name=f"d_{name}")


def set_chunk(monkeypatch, V: int, rows: int, block: int | None = None, itemsize: int = 4) -> None:
    """Force chunks of a few rows, and blocks of fewer."""
    monkeypatch.setitem(selection.CHUNK_BYTES, "cpu", rows * V * itemsize)
    monkeypatch.setitem(selection.BLOCK_BYTES, "cpu", (block or max(1, rows // 2)) * V * itemsize)
