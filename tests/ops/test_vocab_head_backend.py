"""The backend that the head's forward pass ran on is the one of its backward pass, whichever is asked for by then."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from vocab_head_cases import coefficients, make

import rlcore as rl
from rlcore.ops import backend, vocab_head_passes

V = 123


@pytest.fixture
def ran(monkeypatch):
    """What has run: (name of the passes, which pass), in order."""
    if backend.native() is None:
        pytest.skip("rlcore._native was not built")
    found = []

    def counted(name, passes):
        def wrap(which):
            original = getattr(passes, which)
            return lambda *x, **y: (found.append((name, which)), original(*x, **y))[1]

        return passes._replace(statistics=wrap("statistics"), gradient=wrap("gradient"))

    for name in ("NATIVE", "OTHER"):
        monkeypatch.setattr(vocab_head_passes, name, counted(name, getattr(vocab_head_passes, name)))
    return found


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def recompute(case):
    return rl.linear_logprob(case.hidden, case.weight, case.target, entropy=True, **case.kwargs()), case.leaves


def of_a_shard(case):
    out = rl.vocab_parallel_logprob(case.hidden, case.weight, case.target, 0, entropy=True, **case.kwargs())
    return out, case.leaves


def of_logits(case, **kwargs):
    logits = (case.hidden @ case.weight.t()).detach().requires_grad_()
    return rl.logprob(logits * 1.0, case.target, entropy=True, **kwargs), [logits]


def in_place(case):
    return of_logits(case, inplace_backward=True)


# On a CPU, and outside of the interpreter, torch's passes run where Triton is asked for.
@pytest.mark.parametrize(("first", "then", "expected"), [
    ("native", "triton", "NATIVE"), (None, "triton", "NATIVE"), ("triton", None, "OTHER"),
    ("triton", "native", "OTHER"),
])  # fmt: skip
@pytest.mark.parametrize("function", [recompute, of_a_shard, of_logits, in_place])
def test_backward_runs_on_the_backend_of_forward(monkeypatch, ran, one_rank, function, first, then, expected):
    case = make("random", "rows").fresh()
    monkeypatch.setattr(backend, "_requested", first)
    out, leaves = function(case)
    monkeypatch.setattr(backend, "_requested", then)
    torch.autograd.grad(out[:2], leaves, [x.float() for x in coefficients(case)])
    assert {name for name, _ in ran} == {expected}
    assert {which for _, which in ran} == {"statistics", "gradient"}


def test_a_shard_that_can_not_be_batch_invariant(one_rank):
    case = make()
    with rl.batch_invariant(), rl.backend("reference"), pytest.raises(RuntimeError, match=r"needs the Triton backend"):
        rl.vocab_parallel_logprob(case.hidden, case.weight, case.target, 0)
