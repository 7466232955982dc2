"""What only a GPU shows of the CUDA kernels: nothing waits, a graph captures them, offsets pass 2^31, other streams."""

from __future__ import annotations

import pytest
import torch

import rlcore as rl
from rlcore.algorithms.vocab_head_passes import Coefficients, Scale
from rlcore.ops import segments_cuda
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
