"""Kernels run on the device of their tensors, which need not be the current one."""

import contextlib

import pytest
import torch

import rlcore as rl
from interpreter import INTERPRETED
from rlcore.ops import backend


def calls(device):
    """A call of every family's launchers, backward included; `segment_topk` sorts as `segment_rank` does."""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=g).to(device)  # noqa: E731
    offsets, ids = torch.tensor([0, 2, 6], device=device), torch.tensor([0, 1, 0, 1, 1, 1], device=device)
    target = torch.tensor([0, 3, 2, 1, 4, 0], device=device)
    h, w, q, k, v = new(6, 8), new(5, 8), new(6, 2, 16), new(6, 1, 16), new(6, 1, 16)
    x, y, logits = new(6), new(6), new(6, 5)
    batch = rl.TokenBatch(target, offsets, advantage=new(2), old_logp=new(6))
    objective = rl.Objective(ratio="sequence")
    tree = rl.PrefixTree.from_groups([[1, 2]], [[[3, 4], [5, 6]]]).to(device)

    def backward(function, *leaves):
        leaves = [x.clone().requires_grad_() for x in leaves]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    def invariant(h, w):
        with rl.batch_invariant():
            return rl.linear_logprob(h, w, target).logp

    return {
        "linear_logprob": lambda: backward(lambda h, w: rl.linear_logprob(h, w, target).logp, h, w),
        "batch_invariant": lambda: [invariant(h, w)],
        "logprob": lambda: backward(lambda x: rl.logprob(x, target).logp, logits),
        "linear_policy_loss": lambda: backward(lambda h, w: rl.linear_policy_loss(h, w, batch, objective)[0], h, w),
        "policy_loss": lambda: backward(lambda x: rl.policy_loss(x, batch, objective)[0], x),
        "prefix_attention": lambda: backward(lambda q, k, v: rl.prefix_attention(q, k, v, tree), q, k, v),
        "segment_sum": lambda: backward(lambda x: rl.segment_sum(x, offsets=offsets), x),
        "segment_std": lambda: [rl.segment_std(x, offsets=offsets)],
        "segment_rank": lambda: [rl.segment_rank(x, offsets=offsets)],
        "group_advantage": lambda: [rl.group_advantage(x, ids)],
        "gae": lambda: [*rl.gae(x, y, offsets)],
        "gae backward": lambda: backward(lambda x, y: rl.gae(x, y, offsets).advantage, x, y),
    }


NAMES = list(calls("cpu"))


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1: counts launches of the interpreter")
@pytest.mark.parametrize("name", NAMES)
def test_every_launch_has_chosen_its_device(monkeypatch, name):
    from triton.runtime.interpreter import GridExecutor

    chosen, launched, launch = [], [], GridExecutor.__call__

    @contextlib.contextmanager
    def device_of(x):
        chosen.append(x)
        yield
        chosen.pop()

    def checked(self, *args, **kwargs):
        launched.append(bool(chosen))
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", checked)
    with rl.backend("triton"):
        calls("cpu")[name]()
    assert launched and all(launched)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_second_gpu(name):
    with torch.cuda.device(1):
        expected = calls("cuda:1")[name]()
    with torch.cuda.device(0):
        got = calls("cuda:1")[name]()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_only_the_interpreter_takes_tensors_of_the_cpu(monkeypatch):
    monkeypatch.setattr(backend, "_triton_state", lambda: "live")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not backend.runs_triton(torch.ones(1), "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.runs_triton(torch.ones(1), "triton") and not backend.runs_triton(torch.ones(1), None)
