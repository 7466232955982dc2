"""`statistics=True`: the likeliest token, its log-prob and sum p^2, beside logp and entropy."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from vocab_head_cases import DATA, DTYPES, check_further, coefficients, gradients_of, make, set_chunk

import rlcore as rl
from accuracy import assert_accurate
from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms import vocab_head_shards as merging
from rlcore.algorithms.vocab_head_passes import Further, RowStatistics
from rlcore.ops import backend

BACKENDS = ["reference", None]


def scored(case, name=None, statistics=True, entropy=True):
    if name is None:
        return rl.linear_logprob(
            case.hidden, case.weight, case.target, entropy=entropy, statistics=statistics, **case.kwargs()
        )
    with rl.backend(name):
        return scored(case, None, statistics, entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("data", DATA)
def test_accuracy(data, name, dtype, monkeypatch):
    set_chunk(monkeypatch, 123, 10, 4)
    for setting in ("bias", "softcap", "rows"):
        case = make(data, setting, dtype, masked=0.2).fresh()
        case.hidden.data[~case.mask], case.target[~case.mask] = torch.nan, -100
        out = scored(case, name)
        check_further(replace(case, hidden=case.hidden.detach().nan_to_num()), *out[2:])


def test_passes_of_torch(monkeypatch):
    """As where there is no C++."""
    monkeypatch.setattr(backend, "native", lambda: None)
    set_chunk(monkeypatch, 123, 10, 4)
    case = make("peaked", "softcap", masked=0.2)
    check_further(case, *scored(case)[2:])


@pytest.mark.parametrize("stays", [False, True])
def test_nothing_else_changes(stays, monkeypatch):
    """logp, entropy and the gradients are the same bits; on a GPU, where masked rows stay, too."""
    monkeypatch.setattr(selection, "compacts", lambda device: not stays)
    case = make("random", "rows", masked=0.3)
    case.hidden[~case.mask], case.target[~case.mask] = torch.nan, -100
    found = []
    for statistics in (False, True):
        again = case.fresh()
        out = scored(again, statistics=statistics)
        assert all((x is not None) == statistics for x in out[2:])
        found.append([*out[:2], *gradients_of(*out[:2], again.leaves, *coefficients(case))])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)
    assert not torch.stack([x[~case.mask] for x in out[2:]]).any()


@pytest.mark.parametrize("name", BACKENDS)
def test_of_several_likeliest_the_lowest(name):
    weight = torch.randn(9, 5).repeat(4, 1)
    hidden = torch.randn(6, 5)
    out = scored(replace(make(), hidden=hidden, weight=weight, target=torch.zeros(6, dtype=torch.int64)), name)
    assert torch.equal(out.top1, (hidden @ weight[:9].t()).argmax(1))


@pytest.mark.parametrize("name", BACKENDS)
def test_sum_of_squares_near_one(name):
    """p -> 1: 1 - sum p^2 is 2 (1 - p), to a few units in the last place of 1; the log-prob keeps more."""
    logits = torch.zeros(40, 7)
    logits[:, 3] = torch.arange(40.0)
    target = torch.full((40,), 3)
    kwargs = {"entropy": True, "statistics": True}
    with rl.backend(name) if name else nullcontext():
        out = rl.logprob(logits, target, **kwargs)
    p = logits.double().softmax(1)
    torch.testing.assert_close(out.sum_sq.double(), p.square().sum(1), rtol=1e-6, atol=0)
    assert out.top1.eq(3)[1:].all() and torch.equal(out.top1_logp, out.logp) and out.sum_sq[-1] == 1


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_logits(dtype, name):
    wide = (torch.randn(2, 9, 31) * 3).to(dtype)
    logits = wide[:, 2:7].detach().requires_grad_()  # a slice of T
    mask = torch.rand(2, 5) < 0.7
    with torch.no_grad():
        logits[~mask] = torch.nan
    target = torch.randint(31, (2, 5)).masked_fill(~mask, -100)
    heat = torch.rand(2, 5) + 0.5
    with rl.backend(name) if name else nullcontext():
        out = rl.logprob(logits, target, heat, mask=mask, statistics=True)
    log_p = (logits.detach().double() / heat[..., None].double()).log_softmax(-1)
    expected = log_p.amax(-1), (2 * log_p).exp().sum(-1)
    assert out.entropy is None and torch.equal(out.top1, torch.where(mask, log_p.argmax(-1), 0))
    for x, y in zip(out[3:], expected, strict=True):
        assert_accurate(x, torch.where(mask, y, 0))
        assert x.dtype == torch.float32 and not x.requires_grad
    out.logp.sum().backward()
    assert logits.grad[mask].isfinite().all() and logits.grad[mask].any()


def test_no_gradient_flows_through():
    for name in BACKENDS:
        out = scored(make().fresh(), name)
        assert out.logp.requires_grad and out.entropy.requires_grad
        assert not any(x.requires_grad for x in out[2:])


def test_frozen_head_and_no_rows():
    case = make("peaked", "bias")
    case.hidden.requires_grad_()
    out = scored(case, entropy=False)
    check_further(replace(case, hidden=case.hidden.detach()), *out[2:])
    expected = scored(case, statistics=False, entropy=False)
    found, slope = (torch.autograd.grad(x.logp.sum(), case.hidden)[0] for x in (out, expected))
    torch.testing.assert_close(found, slope)
    empty = rl.linear_logprob(torch.zeros(0, 3), torch.randn(5, 3), torch.zeros(0, dtype=torch.int64), statistics=True)
    assert empty.top1.shape == empty.top1_logp.shape == empty.sum_sq.shape == (0,)


def test_compiles_whole():
    case = make("random", "rows", masked=0.3)

    def f(hidden, weight, bias):
        out = rl.linear_logprob(hidden, weight, case.target, bias, entropy=True, mask=case.mask, statistics=True)
        scores = rl.logprob(hidden @ weight.t(), case.target, mask=case.mask, statistics=True)
        return (out.logp + out.entropy * out.sum_sq + out.top1_logp + scores.logp).sum(), out.top1, scores.sum_sq

    found = []
    for run in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        again = case.fresh()
        loss, *rest = run(*again.leaves)
        found.append([loss.detach(), *rest, *torch.autograd.grad(loss, again.leaves)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("cuts", [(123,), (1, 123), (40, 80, 123)])
def test_merged_shards(cuts):
    """Of equals in two shards the lower; a shard of forbidden entries alone adds nothing."""
    z = (torch.randn(4, 123) * 4).double()
    z[0, [20, 60, 100]] = 30.0
    z[1, :40] = -torch.inf
    z[2, 100] = 300.0
    starts, target = (0, *cuts[:-1]), torch.zeros(4, dtype=torch.int64)
    parts = [z[:, a:b].float() for a, b in zip(starts, cuts, strict=True)]
    own = [reference.block_statistics(x, target, True) for x in parts]
    more = [reference.block_further(x, stats) for x, stats in zip(parts, own, strict=True)]
    shards = RowStatistics(*(torch.stack(x) for x in zip(*own, strict=True)))
    first = torch.tensor(starts)
    whole = merging.merge_shards(shards, target, first, torch.tensor(cuts))
    found = merging.merge_further(Further(*(torch.stack(x) for x in zip(*more, strict=True))), shards, whole, first)
    assert torch.equal(found.top1, z.argmax(1)) and found.top1[0] == 20
    assert_accurate(found.sum_sq, z.softmax(1).square().sum(1))
