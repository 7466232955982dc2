"""The Triton kernels of prefix_attention against the float64 oracle, on a GPU or in the interpreter."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rlcore as rl
from accuracy import assert_accurate
from interpreter import INTERPRETED
from oracles import prefix_attention as oracle
from rlcore.algorithms import prefix_attention as algorithm
from rlcore.algorithms import prefix_attention_tables as tables
from rlcore.algorithms import prefix_attention_tiles as tiles
from rlcore.prefix_tree import PrefixTree

pytest.importorskip("triton")
from rlcore.kernels import prefix_attention as forward_kernels
from rlcore.kernels import prefix_attention_backward as backward_kernels
from rlcore.kernels import prefix_attention_keys as key_kernels

GROUPS = [[1, 2, 3], [4] * 20, [5]], [[[1], [], [2, 3]], [[3] * 21, [4] * 5, [6] * 7], [[]]]
PATHS = [[0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 9], [0, 1, 2, 3, 7, 7, 7], [8, 8], [8, 9, 9], [0, 1, 2, 3, 7, 6], [0, 5]]
CHAIN = [[7] * n + [n % 3] for n in range(1, 20)]
FORESTS = {
    "groups": (PrefixTree.from_groups(*GROUPS), oracle.group_rows(*GROUPS)),
    "paths": (PrefixTree.from_paths(PATHS), oracle.trie_rows(PATHS)),
    "chain": (PrefixTree.from_paths(CHAIN), oracle.trie_rows(CHAIN)),
    "one row": (PrefixTree.from_paths([[3]]), [[0]]),
}
CUDA = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def small(monkeypatch):
    """Tiles so small that little trees have many: the sizes are those of the smallest tensor-core product."""
    blocks = forward_kernels.Blocks(lanes=32, keys=16, warps=4, stages=2)
    for module, name in ((forward_kernels, "forward_blocks"), (backward_kernels, "query_blocks"),
                         (key_kernels, "key_blocks")):  # fmt: skip
        monkeypatch.setattr(module, name, lambda D, dtype: blocks)
    monkeypatch.setattr(tiles, "_ITEMS", 8)
    monkeypatch.setattr(tiles, "_LEAST_STEPS", 3)
    tables._by_stream.cache_clear()
    yield
    tables._by_stream.cache_clear()


def problem(tree, dtype=torch.float32, Hq=4, Hkv=2, D=16, sink=True):
    shapes = (tree.M, Hq, D), (tree.M, Hkv, D), (tree.M, Hkv, D), (tree.M, Hq, D)
    q, k, v, do = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v, do, torch.randn(Hq, dtype=torch.float64).to(dtype) if sink else None


def run(device, tree, q, k, v, do, sink, scale=0.4, **options):
    """(o, dq, dk, dv, dsink) of rl.prefix_attention in Triton, on the CPU again."""
    leaves = [x.detach().to(device).requires_grad_() for x in (q, k, v, sink) if x is not None]
    with rl.backend("triton"):
        o = rl.prefix_attention(*leaves[:3], tree.to(device), scale=scale, sink=(*leaves, None)[3], **options)
        return [x.cpu() for x in (o.detach(), *torch.autograd.grad(o, leaves, do.to(device)))]


def plain(tree, q, k, v, do, sink, scale=0.4, window=None, softcap=None):
    """Textbook attention with everything in the inputs' dtype: what the error rule compares with."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sink) if x is not None]
    K, V = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(0, 1) for x in leaves[1:3])
    z = leaves[0].transpose(0, 1) @ K.transpose(1, 2) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    rows = torch.arange(tree.M)
    z = z.masked_fill(~algorithm.visible(rows, rows, tree.end, tree.position, tree.position, window), -torch.inf)
    if sink is not None:
        z = torch.cat([z, leaves[3][:, None, None].expand(-1, tree.M, 1)], dim=-1)
    o = (torch.softmax(z, dim=-1)[..., : tree.M] @ V).transpose(0, 1)
    return (o, *torch.autograd.grad(o, leaves, do))


def check(device, forest, inputs, scale=0.4, **options):
    tree, rows = FORESTS[forest]
    q, k, v, do, sink = (None if x is None else x.double().numpy() for x in inputs)
    expected = oracle.attention(q, k, v, rows, scale, **options, sink=sink, do=do)
    norm = max(float(abs(g).max()) for g in expected[1:] if g is not None)
    actual = run(device, tree, *inputs, scale, **options)
    baseline = plain(tree, *inputs, scale, **options)
    everything = zip(actual, expected, baseline, strict=False)
    for name, (got, reference, other) in zip(("o", "dq", "dk", "dv", "dsink"), everything, strict=False):
        gradient = name != "o"
        assert got.dtype == inputs[0].dtype
        assert_accurate(got, reference, other, gradient=gradient, norm=norm if gradient else None, name=name)


@pytest.mark.parametrize(
    ("forest", "dtype", "heads", "sink"),
    [
        ("groups", torch.float32, (4, 2), False),
        ("groups", torch.bfloat16, (2, 1), True),
        ("paths", torch.float16, (3, 1), True),
        ("paths", torch.float32, (2, 2), False),
        ("chain", torch.float32, (2, 1), True),
        ("one row", torch.bfloat16, (40, 1), True),
    ],
)
def test_against_oracle(device, small, forest, dtype, heads, sink):
    check(device, forest, problem(FORESTS[forest][0], dtype, *heads, sink=sink))


OPTIONS = {
    "window": {"window": 3}, "wide window": {"window": 20}, "softcap": {"softcap": 1.5},
    "window of one": {"window": 1}, "large softcap": {"softcap": 50.0}, "both": {"window": 2, "softcap": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_windows_and_softcaps_against_oracle(device, small, option):
    forest = "groups" if option in ("wide window", "both") else "paths"
    check(device, forest, problem(FORESTS[forest][0], Hq=2, Hkv=1), **OPTIONS[option])


@pytest.mark.parametrize("D", [1, 19])
def test_odd_head_sizes(device, small, D):
    check(device, "paths", problem(FORESTS["paths"][0], Hq=2, Hkv=1, D=D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_blocks_that_ship(device, dtype):
    check(device, "paths", problem(FORESTS["paths"][0], dtype, Hq=2, Hkv=1, D=64))


def test_the_same_bits_again_and_from_any_strides(device, small):
    tree, _ = FORESTS["paths"]
    M = tree.M
    q = torch.randn(4, M, 16).transpose(0, 1)
    k = torch.randn(M, 2, 32)[..., ::2]
    v = torch.randn(16, 2, M).permute(2, 1, 0)
    sink = torch.randn(8)[::2]
    contiguous = [x.contiguous() for x in (q, k, v)]
    do = torch.randn(1, 4, 1).expand(M, 4, 16)
    strided = run(device, tree, q, k, v, do, sink)
    for other in (do.contiguous(), torch.cat([do, do], 2)[..., 16:]):
        again = run(device, tree, *contiguous, other, sink.contiguous())
        assert all(torch.equal(x, y) for x, y in zip(strided, again, strict=True))


def test_splits_change_nothing_but_rounding(device, small, monkeypatch):
    tree, _ = FORESTS["groups"]
    inputs = problem(tree, Hq=4, Hkv=1)
    assert tiles.key_work(tree.node_table.numpy(), 4, 32, 16, None, 1).slots > 0
    split = run(device, tree, *inputs)
    monkeypatch.setattr(tiles, "_LEAST_STEPS", 1000)
    tables._by_stream.cache_clear()
    for x, y in zip(split, run(device, tree, *inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


HIDDEN = [[4] * 20], [[[3] * 9, [4] * 5, [6] * 7]]


@pytest.mark.parametrize(
    ("row", "where", "value", "options"),
    [(5, "k", torch.nan, {}), (5, "do", torch.nan, {"window": 3}), (19, "v", torch.inf, {}),
     (23, "q", torch.nan, {"window": 3, "softcap": 1.5}), (23, "v", torch.nan, {}), (23, "do", torch.inf, {}),
     (30, "k", torch.inf, {"softcap": 1.5}), (30, "q", torch.inf, {})],
)  # fmt: skip
def test_rows_that_do_not_see_one_another(device, small, row, where, value, options):
    """Whatever one row holds, the rest is what it is beside a finite row, also where one tile takes them all."""
    tree, rows = PrefixTree.from_groups(*HIDDEN), oracle.group_rows(*HIDDEN)
    keys = oracle.keys_of_rows(rows, options.get("window"))
    below = torch.tensor([row in seen for seen in keys])
    above = torch.zeros(tree.M, dtype=torch.bool)
    above[keys[row]] = True
    beside = torch.zeros(tree.M, dtype=torch.bool)  # keys of which a query that sees the row gives a gradient
    for i in below.nonzero().flatten().tolist():
        beside[keys[i]] = True
    inputs = dict(zip(("q", "k", "v", "do"), problem(tree, Hq=2, Hkv=1, sink=False)[:4], strict=True))
    clean = run(device, tree, *inputs.values(), None, **options)
    inputs[where][row, :, 3::5] = value
    got = run(device, tree, *inputs.values(), None, **options)
    key = where in "kv"
    queries = below if key else torch.arange(tree.M) == row
    touched = {"o": queries, "dq": queries, "dk": beside if key else above, "dv": beside if key else above}
    if where in ("v", "do"):  # no gradient of v holds v, and the output nothing of its gradient
        touched["dv" if where == "v" else "o"] = torch.zeros(tree.M, dtype=torch.bool)
    for (name, reached), x, y in zip(touched.items(), got, clean, strict=True):
        torch.testing.assert_close(x[~reached], y[~reached], rtol=1e-5, atol=1e-5, msg=name)
    if where != "do" and value != torch.inf:
        assert got[0][queries].isnan().flatten(1).any(-1).all()


def test_extreme_scores(device, small):
    """Scores in the thousands in both directions, and sinks far above and below them."""
    tree, rows = FORESTS["paths"]
    q, k, v, do, _ = problem(tree, Hkv=1)
    q, sink = q * 1e3, torch.tensor([-1e4, 1e4, 0.0, -torch.inf])
    got = run(device, tree, q, k, v, do, sink, 1.0)
    arrays = [x.double().numpy() for x in (q, k, v)]
    expected = oracle.attention(*arrays, rows, 1.0, sink=sink.double().numpy(), do=do.double().numpy())
    # A log-sum-exp in the thousands has a float32 rounding of 1e-4, which every recomputed probability inherits.
    units = {"o": 1, "dq": 1, "dk": 1e3, "dv": 1, "dsink": 1}
    for (name, unit), x, y in zip(units.items(), got, expected, strict=True):
        assert np.abs(x.double().numpy() - y).max() <= 1e-3 * unit, name


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
def test_another_tree_scale_softcap_or_window_compiles_nothing(small, monkeypatch):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    from compile_kernels import compiling, variants

    monkeypatch.setattr(rl.ops.backend, "_triton_state", lambda: "live")
    monkeypatch.setattr(rl.ops.backend, "_interprets", lambda: True)  # so that tensors of the CPU go there
    trees = [FORESTS["groups"][0], FORESTS["paths"][0], PrefixTree.from_groups([[1] * 16], [[[2] * 16] * 3])]
    with compiling("sm_90") as found:
        for tree, scale, window, softcap in zip(trees, (0.5, 1.0, 1), (2, 1, 16), (1.0, 2, 50.0)):
            run("cpu", tree, *problem(tree), scale=scale, window=window, softcap=softcap)
        names = {facts.kernel for facts in found}
        assert len(names) == 6 and len(found) > 15
        for name in names:
            modules = forward_kernels, backward_kernels, key_kernels
            assert variants(next(getattr(m, name) for m in modules if hasattr(m, name))) == 1, name


@CUDA
def test_no_wait_for_the_gpu_and_in_a_graph():
    """Not even where the tree's tables are made; a graph replays the step with other queries."""
    tree = PrefixTree.from_groups(*GROUPS).to("cuda")
    q, k, v, do, _ = (None if x is None else x.cuda() for x in problem(tree, torch.bfloat16, D=64, sink=False))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step():
        o = rl.prefix_attention(*leaves, tree)
        return (o, *torch.autograd.grad(o, leaves, do))

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(results, step(), strict=True))


@CUDA
def test_offsets_beyond_32_bits():
    """Rows after the first 2^31 numbers of q: the last tree of many equal ones gives what it gives alone."""
    alone = PrefixTree.from_groups([[1] * 40], [[[2] * 20, [3] * 4]])
    copies = 2**31 // (alone.M * 32 * 64) + 2
    tree = PrefixTree.from_groups([[1] * 40] * copies, [[[2] * 20, [3] * 4]] * copies).to("cuda")
    q, k, v, do = (torch.randn(alone.M, h, 64, device="cuda", dtype=torch.bfloat16) for h in (32, 8, 8, 32))
    one = [x.requires_grad_() for x in (q, k, v)]
    many = [x.detach().repeat(copies, 1, 1).requires_grad_() for x in one]
    o, all_o = rl.prefix_attention(*one, alone.to("cuda")), rl.prefix_attention(*many, tree)
    expected = (o, *torch.autograd.grad(o, one, do))
    got = (all_o, *torch.autograd.grad(all_o, many, do.repeat(copies, 1, 1)))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x[-alone.M :], y, rtol=2e-2, atol=2e-2)
