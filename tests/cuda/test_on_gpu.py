"""What only a GPU shows of the CUDA kernels: nothing waits, a graph captures them, offsets pass 2^31, other streams."""

from __future__ import annotations

import pytest
import torch
from policy_loss_cases import RATIOS, large

import rlcore as rl
from rlcore.algorithms.vocab_head_passes import Coefficients, Scale
from rlcore.ops import policy_loss_cuda, segments_cuda
from rlcore.ops import vocab_head_cuda as passes

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or rl.backends()["cuda"] != "live", reason="needs a GPU and rlcore._cuda"
)


@pytest.fixture
def no_waiting():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def head(n: int, V: int):
    """(logits, target, scale, coefficients) on the GPU."""
    scale = Scale(torch.tensor(0.8), torch.tensor(20.0), torch.tensor(1.0))
    d = Coefficients(torch.randn(n, device="cuda"), torch.randn(n, device="cuda"))
    return 3 * torch.randn(n, V, device="cuda"), torch.randint(V, (n,), device="cuda"), scale, d


def both_passes(logits, target, scale, d):
    with rl.backend("cuda"):
        stats = passes.statistics_(logits, target, scale, True)
        passes.write_gradient(logits, target, stats, d, scale, logits)
    return stats


def test_vocab_head_does_not_wait(no_waiting):
    inputs = head(7, 1000)
    torch.cuda.synchronize()
    no_waiting()
    both_passes(*inputs)


def test_segments_do_not_wait(no_waiting):
    x, offsets = torch.randn(100, device="cuda"), torch.tensor([0, 40, 100], device="cuda")
    lam = torch.tensor(0.9, device="cuda")
    group = torch.arange(100, device="cuda") // 10
    torch.cuda.synchronize()
    no_waiting()
    with rl.backend("cuda"):
        ready = segments_cuda.time_of((x, x), offsets, None, None, (1.0, lam))
        assert ready is not None
        ready[0].gae(*ready[1])
        segments_cuda.group_advantage(x, group, "group", "group", 1, 1e-6, None, None, "reward")


@pytest.mark.parametrize("ratio", RATIOS)
def test_policy_loss_does_not_wait(ratio, no_waiting):
    logp, entropy, batch, objective = large(ratio, "seq_mean_token_mean")
    batch, logp, entropy = batch.to("cuda"), logp.cuda().requires_grad_(), entropy.cuda().requires_grad_()
    torch.cuda.synchronize()
    no_waiting()
    with rl.backend("cuda"):
        rl.policy_loss(logp, batch, objective, entropy)[0].backward()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_graph_captures_the_policy_loss(ratio):
    """A captured launch has a counter of its own; those outside go on with theirs."""
    logp, entropy, batch, objective = large(ratio, "seq_mean_token_mean")
    batch, logp, entropy = batch.to("cuda"), logp.cuda(), entropy.cuda()
    evaluate = lambda: policy_loss_cuda.evaluate(logp, entropy, batch, objective, (True, True))  # noqa: E731
    with rl.backend("cuda"):
        eager = evaluate()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = evaluate()
        for _ in range(3):
            for x in captured:
                x.zero_()
            graph.replay()
            again = evaluate()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(eager, captured, again, strict=True))


def test_policy_losses_on_several_streams_at_once():
    n = 1 << 20
    logp = -torch.rand(n, device="cuda")
    batch = rl.TokenBatch(torch.zeros(n, dtype=torch.int64, device="cuda"), torch.tensor([0, n], device="cuda"),
                          advantage=torch.randn(n, device="cuda"), old_logp=logp + 0.1)  # fmt: skip
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    with rl.backend("cuda"):
        for i in range(64):
            with torch.cuda.stream(streams[i % 4]):
                found.append(policy_loss_cuda.evaluate(logp, None, batch, rl.Objective(), (True, False)))
        torch.cuda.synchronize()
    assert all(torch.equal(x, y) for out in found for x, y in zip(out, found[0], strict=True))


def test_policy_loss_of_a_million_tokens_in_two_launches():
    n = 1 << 20
    leaf, entropy = (-torch.rand(n, device="cuda")).requires_grad_(), torch.rand(n, device="cuda").requires_grad_()
    batch = rl.TokenBatch(torch.zeros(n, dtype=torch.int64, device="cuda"), torch.tensor([0, n], device="cuda"),
                          advantage=torch.randn(n, device="cuda"), old_logp=leaf.detach() + 0.1)  # fmt: skip
    objective, one = rl.Objective(entropy=0.01), torch.ones((), device="cuda")
    with rl.backend("cuda"):
        rl.policy_loss(leaf, batch, objective, entropy)[0].backward(one)
        leaf.grad = entropy.grad = None
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            rl.policy_loss(leaf, batch, objective, entropy)[0].backward(one)
            torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launches) <= 2, launches


def test_a_graph_captures_the_passes():
    logits, target, scale, d = head(5, 3000)
    source = logits.clone()
    both_passes(logits, target, scale, d)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        again = source.clone()
        both_passes(again, target, scale, d)
    torch.cuda.synchronize()
    assert torch.equal(again, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again.copy_(source)
        stats = both_passes(again, target, scale, d)
    again.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(again, logits) and stats.logp.isfinite().all()


def test_more_than_2_to_the_31_logits():
    n, V = 70_000, 32_768
    logits = torch.zeros(n, V, dtype=torch.bfloat16, device="cuda")
    target = torch.full((n,), 5, device="cuda")
    scale = Scale(torch.tensor(1.0), None, torch.tensor(1.0))
    stats = both_passes(logits, target, scale, Coefficients(torch.ones(n, device="cuda"), None))
    assert torch.allclose(stats.logp, torch.tensor(-10.3972, device="cuda"))
    assert (logits[-1, 5] == 1).item() and (logits[-1, 6] < 0).item() and (logits[:, 5] == 1).all()


def test_policy_loss_of_more_than_2_to_the_31_rows():
    n = 2**31 + 5
    logp, advantage = torch.zeros(n, device="cuda"), torch.ones(n, device="cuda")
    batch = rl.TokenBatch(torch.zeros(1, dtype=torch.int64, device="cuda").expand(n),
                          torch.tensor([0, n], device="cuda"), advantage=advantage)  # fmt: skip
    with rl.backend("cuda"):
        out = policy_loss_cuda.evaluate(logp, None, batch, rl.Objective(), (True, False))
    assert out.loss.item() == pytest.approx(-1.0, rel=1e-5)
    assert (out.d_logp[[0, 2**31 - 1, 2**31, n - 1]].cpu() * n).tolist() == pytest.approx([-1.0] * 4, rel=1e-5)
