"""The oracle itself, and the pieces of the chunk walk: statistics, cuts, dropped rows, the bound on memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from vocab_head_cases import make, set_chunk

from accuracy import assert_accurate
from oracles import vocab_head as oracle
from rlcore.algorithms import vocab_head as vh
from rlcore.algorithms import vocab_head_chunks as chunks
from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.objective import Objective
from rlcore.layout import TokenBatch


def test_oracle_gradients_are_differences_of_its_values():
    rng = np.random.default_rng(0)
    d_logp, d_entropy = rng.normal(size=3), rng.normal(size=3)
    inputs = {"hidden": rng.normal(size=(3, 4)), "weight": rng.normal(size=(5, 4)), "bias": rng.normal(size=5)}
    fixed = {
        "target": np.array([0, 3, 4]),
        "temperature": np.array([0.7, 1.0, 2.0]),
        "softcap": 3.0,
        "logit_scale": 1.5,
    }

    def value(**moved):
        logp, entropy = oracle.Head(**{**inputs, **moved}, **fixed).forward()
        return (d_logp * logp + d_entropy * entropy).sum()

    analytic = oracle.Head(**inputs, **fixed).backward(d_logp, d_entropy)
    for (name, x), gradient in zip(inputs.items(), analytic, strict=True):
        for i in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[i] = 1e-6
            slope = (value(**{name: x + step}) - value(**{name: x - step})) / 2e-6
            assert slope == pytest.approx(gradient[i], abs=1e-8)


@pytest.mark.parametrize("data", ["random", "peaked", "negative", "flat"])
@pytest.mark.parametrize("setting", ["plain", "rows"])
def test_logits_and_their_log_sum_exp(data, setting):
    case = make(data, setting, torch.float32)
    z = vh.logits(case.hidden, case.weight, case.bias, **case.numbers())
    head = case.oracle()
    scale = vh.scale_of(case.hidden, *case.numbers().values())._replace(bias=case.bias)
    stats, _ = chunks.forward_chunks(case.hidden, case.weight, case.target, None, scale, entropy=True)
    exact = vh.logits(case.hidden.double(), case.weight.double(), None if case.bias is None else case.bias.double(),
                      **case.numbers())  # fmt: skip
    assert_accurate(stats.maximum + stats.log_sum, exact.logsumexp(-1), z.logsumexp(-1), name="lse")
    assert_accurate(stats.maximum, exact.amax(-1), z.amax(-1), name="maximum")
    for i in (0, 1):  # the oracle agrees on what a logit is
        np.testing.assert_allclose(head.row(i).log_p, exact[i].log_softmax(-1).numpy(), rtol=1e-12, atol=1e-12)


def test_frozen_head_slope():
    case = make("peaked", "rows", torch.float64, masked=0.3)
    out, slope = vh.frozen_head(case.hidden, case.weight, case.target, **case.kwargs())
    np.testing.assert_allclose(slope.numpy(), case.oracle().slope(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(out.logp.numpy(), case.oracle().forward()[0], rtol=1e-12, atol=1e-12)
    assert out.entropy is None


@pytest.mark.parametrize("label", [-1, -100, 7, 2**40])
def test_out_of_range_labels_in_a_row_pass_give_nan(label):
    """What a GPU shows, where nobody can raise: never a plausible number, neither value nor gradient."""
    z = torch.randn(3, 7)
    target = torch.tensor([1, label, 6])
    stats = reference.block_statistics(z, target, True)
    assert stats.logp.isnan().tolist() == [False, True, False]
    scale = vh.scale_of(z, 1.0, None, 1.0)
    d = reference.Coefficients(torch.ones(3), None)
    gradient = reference.block_gradient_(z.clone(), target, stats, d, scale)
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dropped", ["none", "some", "all", "first", "last"])
def test_gradient_rows_move_to_the_front_of_the_buffer(dropped, monkeypatch):
    """Compaction in place gives the same rows as computing them all, whatever the block size."""
    z, target = torch.randn(20, 7), torch.randint(7, (20,))
    scale = vh.scale_of(z, 0.7, 5.0, 2.0)
    d_logp, d_entropy = torch.randn(20), torch.randn(20)
    zero = {"none": [], "some": [0, 3, 4, 5, 11, 19], "all": range(20), "first": range(9), "last": range(9, 20)}[
        dropped
    ]
    d_logp[list(zero)] = d_entropy[list(zero)] = 0
    d = reference.Coefficients(d_logp, d_entropy)
    for block in (1, 3, 64):
        set_chunk(monkeypatch, 7, 64, block)
        bent = z.clone()
        stats = reference.statistics_(bent, target, scale, True)
        whole, everything = reference.gradient_(bent.clone(), target, stats, d, scale, raw=False)
        assert everything == slice(0, 20)
        left, keep = reference.gradient_(bent, target, stats, d, scale, raw=False, drop=True)
        assert left.shape[0] == 20 - len(zero) and (not len(left) or left.data_ptr() == bent.data_ptr())
        assert torch.equal(left, whole[keep])


@given(
    keep=st.lists(st.booleans(), min_size=1, max_size=40), bound=st.integers(1, 12), cuts=st.lists(st.integers(0, 40)),
    anywhere=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_pieces_cover_every_row_once(keep, bound, cuts, anywhere):
    """Pieces are contiguous, cut only at borders, hold at most `bound` kept rows unless a single unit has more."""
    N = len(keep)
    rows = selection.kept_rows(torch.tensor(keep), N)
    borders = None if anywhere else sorted([0, N, *(c for c in cuts if c <= N)])
    found = list(vh.pieces(rows, N, bound, borders, torch.device("cpu")))
    assert [p.start for p in found] == [0, *(p.stop for p in found[:-1])] and found[-1].stop == N
    for p in found:
        inside = [i for i in range(p.start, p.stop) if keep[i]]
        indices = list(range(N))[p.rows] if isinstance(p.rows, slice) else p.rows.tolist()
        assert inside == indices
        if borders is None:
            assert len(inside) <= bound
        else:
            assert {p.start, p.stop} <= set(borders)
            units = [b for b in borders if p.start < b < p.stop]
            assert len(inside) <= bound or not any(sum(keep[p.start : b]) and sum(keep[b : p.stop]) for b in units)


class MatmulRows(TorchDispatchMode):
    """Rows of tokens in every matrix product: {"forward": ..., "d_hidden": ..., "d_weight": ...}."""

    def __init__(self, V: int, H: int) -> None:
        super().__init__()
        self.rows, self.V, self.H, self.largest = {"forward": 0, "d_hidden": 0, "d_weight": 0}, V, H, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            kind = {(self.H, self.V): "forward", (self.V, self.H): "d_hidden"}.get((a.shape[1], b.shape[1]), "d_weight")
            self.rows[kind] += a.shape[1] if kind == "d_weight" else a.shape[0]
            self.largest = max(self.largest, a.shape[1] if kind == "d_weight" else a.shape[0])
        return func(*args, **(kwargs or {}))


def test_folded_and_frozen_take_leaves_that_require_grad():
    """They return gradients and record nothing themselves."""
    case = make("random", "bias").fresh()
    batch = TokenBatch(case.target, torch.tensor([0, 47]), advantage=torch.randn(47))
    out = vh.folded(case.hidden, case.weight, batch, Objective(), case.bias)
    assert not any(x.requires_grad for x in (out.loss, out.d_hidden, *out.d_weight, out.d_bias))
    scores, slope = vh.frozen_head(case.hidden, case.weight, case.target, case.bias)
    assert not scores.logp.requires_grad and not slope.requires_grad


def fold(case, batch, objective, needs=(True, True, True)):
    numbers = case.numbers().values()
    with MatmulRows(*case.weight.shape) as products:
        out = vh.folded(case.hidden, case.weight, batch, objective, case.bias, *numbers, needs=needs)
    return out, products


def test_rows_that_cost_nothing(monkeypatch):
    """Masked rows stay out of the forward product; clipped and zero-advantage rows out of the gradient products."""
    set_chunk(monkeypatch, 123, 10)
    case = make(masked=0.5)
    advantage = torch.randn(47) * (torch.rand(47) < 0.5)
    batch = TokenBatch(case.target, torch.tensor([0, 20, 47]), mask=case.mask, advantage=advantage)
    _, products = fold(case, batch, Objective())
    moving = int((case.mask & (advantage != 0)).sum())
    assert products.rows == {"forward": int(case.mask.sum()), "d_hidden": moving, "d_weight": moving}
    assert products.largest <= 10
    # A ratio far above the clip range with a positive advantage, far below with a negative one: no gradient.
    clipped = TokenBatch(
        case.target,
        torch.tensor([0, 20, 47]),
        mask=case.mask,
        advantage=torch.ones(47),
        old_logp=torch.full((47,), -50.0),
    )
    _, products = fold(case, clipped, Objective())
    assert products.rows == {"forward": int(case.mask.sum()), "d_hidden": 0, "d_weight": 0}
    _, products = fold(case, batch, Objective(), needs=(True, False, False))
    assert products.rows == {"forward": int(case.mask.sum()), "d_hidden": moving, "d_weight": 0}
    _, products = fold(case, batch, Objective(), needs=(False, False, False))
    assert products.rows == {"forward": int(case.mask.sum()), "d_hidden": 0, "d_weight": 0}


def test_a_sequence_longer_than_a_chunk_is_walked_twice(monkeypatch):
    set_chunk(monkeypatch, 123, 10)
    case = make()
    batch = TokenBatch(case.target, torch.tensor([0, 5, 12, 40, 47]), advantage=torch.randn(47))
    _, products = fold(case, batch, Objective(ratio="sequence"))
    assert products.rows == {"forward": 47 + 28, "d_hidden": 47, "d_weight": 47}
    assert products.largest <= 10


GROWTH = """
import resource, sys, torch
from rlcore.algorithms.objective import Objective
from rlcore.layout import TokenBatch
from rlcore.ops.vocab_head import linear_logprob, linear_policy_loss
torch.set_num_threads(1)
mode, N, H, V = sys.argv[1], 2048, 256, 16000
hidden, weight = torch.randn(N, H).requires_grad_(), torch.randn(V, H).requires_grad_(sys.argv[1] != "frozen")
target = torch.randint(V, (N,))
def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
def step(n):
    h = hidden[:n]
    if mode == "folded":
        batch = TokenBatch(target[:n], torch.tensor([0, n]), advantage=torch.randn(n))
        return linear_policy_loss(h, weight, batch, Objective())[0]
    return linear_logprob(h, weight, target[:n], entropy=mode == "recompute").logp.sum()
step(4).backward()  # libraries, thread pools, room for the gradients
hidden.grad = weight.grad = None
before = high()
step(N).backward()
print(high() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident set from /proc")
@pytest.mark.parametrize("mode", ["folded", "recompute", "frozen"])
def test_memory_stays_far_below_the_logits(mode):
    """Growth of the peak resident set of a fresh process; the fp32 logits alone would be 125 MiB."""
    result = subprocess.run([sys.executable, "-c", GROWTH, mode], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 64, result.stdout
