"""A whole step: compiled whole; on a GPU without a wait for the device, in a CUDA graph, within the grid's limits."""

from __future__ import annotations

import pytest
import torch

import rlcore as rl
from rlcore.algorithms.objective import KL

ON = [
    "cpu",
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ]),
]  # fmt: skip


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


OBJECTIVE = rl.Objective(clip=(0.2, 0.28), entropy=0.01, kl=KL("k3", 0.01))


def problem(device: str, lengths=(3, 1, 5, 4), H: int = 16, V: int = 37, dtype=torch.float32) -> dict:
    """Tensors of one step and its tree: two sequences per group, the first row of each sequence masked."""
    N, S = sum(lengths), len(lengths)
    answers = [[[2] * n for n in lengths[s : s + 2]] for s in range(0, S, 2)]
    tree = rl.PrefixTree.from_groups([[1] * (1 + s % 5) for s in range(len(answers))], answers)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.ones(N, dtype=torch.bool)
    mask[offsets[:-1]] = torch.tensor([length == 1 for length in lengths])
    made = {
        "hidden": torch.randn(N, H).to(dtype), "weight": (torch.randn(V, H) * H**-0.5).to(dtype),
        "target": torch.randint(V, (N,)), "offsets": offsets, "mask": mask, "reward": torch.rand(S),
        "token_reward": torch.randn(N), "value": torch.randn(N), "group": torch.arange(S) // 2,
        "old": -torch.rand(N), "ref": -torch.rand(N), "tree": tree, "states": torch.randn(tree.M, 2 * H).to(dtype),
    }  # fmt: skip
    return {name: x.to(device) for name, x in made.items()}


def folded(x: dict) -> tuple:
    """Group advantages, the loss folded into the head."""
    advantage = rl.group_advantage(x["reward"], x["group"])
    batch = rl.TokenBatch(x["target"], x["offsets"], mask=x["mask"], advantage=advantage, old_logp=x["old"],
                          ref_logp=x["ref"])  # fmt: skip
    loss, metrics = rl.linear_policy_loss(x["hidden"], x["weight"], batch, OBJECTIVE)
    return loss, metrics["entropy"], metrics["clip_fraction"]


def in_parts(x: dict) -> tuple:
    """Generalized advantages, head, policy loss and value loss, one after another."""
    adv, returns = rl.gae(x["token_reward"], x["value"].detach(), x["offsets"], 0.99, 0.95, mask=x["mask"])
    out = rl.linear_logprob(x["hidden"], x["weight"], x["target"], entropy=True, mask=x["mask"])
    batch = rl.TokenBatch(x["target"], x["offsets"], mask=x["mask"], advantage=adv, old_logp=x["old"],
                          ref_logp=x["ref"], returns=returns)  # fmt: skip
    loss, metrics = rl.policy_loss(out.logp, batch, OBJECTIVE, out.entropy)
    critic, _ = rl.value_loss(x["value"], batch)
    return loss + 0.5 * critic, metrics["entropy"], metrics["clip_fraction"]


def packed(x: dict) -> tuple:
    """Attention over a tree of prompts and answers in front of it."""
    q, k, v = x["states"].unflatten(1, (4, 8)).split((2, 1, 1), dim=1)
    o = rl.prefix_attention(q, k, v, x["tree"])
    return folded(x | {"hidden": o.flatten(1)[x["tree"].loss_rows]})


LEAVES = {folded: ("hidden", "weight"), in_parts: ("hidden", "weight", "value"), packed: ("states", "weight")}


def step(f, x: dict, leaves: tuple[str, ...]) -> list:
    """Loss, two metrics and the gradients."""
    x = x | {name: x[name].detach().requires_grad_() for name in leaves}
    loss, *metrics = f(x)
    return [loss.detach(), *metrics, *torch.autograd.grad(loss, [x[name] for name in leaves])]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("f", LEAVES)
def test_compiles_whole(f, device, backend):
    torch._dynamo.reset()
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    for lengths in ((3, 1, 5, 4), (2, 6, 1, 7)):
        x = problem(device, lengths)
        torch.testing.assert_close(step(compiled, x, LEAVES[f]), step(f, x, LEAVES[f]))


def test_the_two_forms_agree():
    """They have the same log-probs and entropies, and other advantages."""
    x = problem("cpu")
    one, other = (step(f, x, LEAVES[f]) for f in (folded, in_parts))
    assert all(y.isfinite().all() for y in one + other)
    torch.testing.assert_close(one[1], other[1])


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", LEAVES)
def test_nothing_waits_for_the_device(f, dtype):
    x = problem("cuda", dtype=dtype)
    step(f, x, LEAVES[f])  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(f, x, LEAVES[f])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("f", LEAVES)
def test_in_a_cuda_graph(f):
    """Replayed with other numbers in the same places it gives what eager code gives for them."""
    x, other = problem("cuda"), problem("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(f, x, LEAVES[f])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(f, x, LEAVES[f])
    for name, tensor in x.items():
        if name != "tree":  # lengths are those of the graph
            tensor.copy_(other[name])
    graph.replay()
    for a, b in zip(captured, step(f, other, LEAVES[f]), strict=True):
        assert torch.equal(a, b)


@gpu
def test_more_sequences_than_a_grid_has_rows():
    """100,000 sequences: more than the 65,535 that a grid takes along y and z."""
    x = problem("cuda", lengths=(1, 2) * 50_000)
    for f, leaves in LEAVES.items():
        on_gpu = step(f, x, leaves)
        on_cpu = step(f, {name: tensor.to("cpu") for name, tensor in x.items()}, leaves)
        torch.testing.assert_close([y.cpu() for y in on_gpu], on_cpu, rtol=1e-3, atol=1e-6)
