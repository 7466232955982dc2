"""prefix_attention in C++ against the float64 oracle: forests, head ratios, odd sizes, strides, dtypes, threads."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefix_tree import groups_strategy, paths_strategy

import rlcore as rl
from accuracy import assert_accurate
from oracles import prefix_attention as oracle
from rlcore.algorithms import prefix_attention as algorithm
from rlcore.ops import backend
from rlcore.ops import prefix_attention_native as native
from rlcore.prefix_tree import PrefixTree

pytestmark = pytest.mark.skipif(backend.native() is None, reason="rlcore._native is not built")

GROUPS = (
    [[1, 2, 3], [4] * 70, [5], [6, 6]],
    [[[1], [], [2, 3]], [[3] * 66, [4] * 5, [5] * 5, [6] * 7], [[1], [2], [3] + [4] * 6], [[]]],
)
PATHS = [[0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 9], [0, 1, 2, 3, 7, 7, 7], [8, 8], [8, 9, 9], [0, 1, 2, 3, 7, 6], [0, 5]]
CHAIN = [[7] * n + [n % 3] for n in range(1, 90)]  # a node per token: deeper than two blocks of keys would be
LONG = [[1] * 150 + [2] * n for n in (0, 1, 47, 130)]


def forests():
    yield "groups", PrefixTree.from_groups(*GROUPS), oracle.group_rows(*GROUPS)
    for name, paths in (("paths", PATHS), ("one row", [[3]]), ("chain", CHAIN), ("long", LONG)):
        yield name, PrefixTree.from_paths(paths, share=True), oracle.trie_rows(paths)


OPTIONS = {
    "window": {"window": 3}, "wide window": {"window": 70}, "softcap": {"softcap": 1.5},
    "window of one": {"window": 1}, "large softcap": {"softcap": 50.0}, "both": {"window": 2, "softcap": 0.7},
}  # fmt: skip
FORESTS = {name: (tree, rows) for name, tree, rows in forests()}


def problem(tree, dtype=torch.float32, Hq=4, Hkv=2, D=8, sink=True):
    shapes = (tree.M, Hq, D), (tree.M, Hkv, D), (tree.M, Hkv, D), (tree.M, Hq, D)
    q, k, v, do = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v, do, torch.randn(Hq, dtype=torch.float64).to(dtype) if sink else None


def run(tree, q, k, v, do, sink, scale=0.4, window=None, softcap=None):
    o, lse = native.forward(q, k, v, tree.node_table, scale, window, softcap, sink)
    gradients = native.backward(do, q, k, v, o, lse, tree.node_table, scale, window, softcap, sink)
    return (o, *gradients) if sink is not None else (o, *gradients[:3])


def plain(tree, q, k, v, do, sink, scale=0.4, window=None, softcap=None):
    """Textbook attention with everything in the inputs' dtype: what the error rule compares with."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sink) if x is not None]
    ratio = q.shape[1] // k.shape[1]
    K, V = (x.repeat_interleave(ratio, dim=1).transpose(0, 1) for x in leaves[1:3])
    z = leaves[0].transpose(0, 1) @ K.transpose(1, 2) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    rows = torch.arange(tree.M)
    z = z.masked_fill(~algorithm.visible(rows, rows, tree.end, tree.position, tree.position, window), -torch.inf)
    if sink is not None:
        z = torch.cat([z, leaves[3][:, None, None].expand(-1, tree.M, 1)], dim=-1)
    o = (torch.softmax(z, dim=-1)[..., : tree.M] @ V).transpose(0, 1)
    return (o, *torch.autograd.grad(o, leaves, do))


def check(tree, rows, inputs, scale=0.4, **options):
    q, k, v, do, sink = (None if x is None else x.double().numpy() for x in inputs)
    expected = oracle.attention(q, k, v, rows, scale, **options, sink=sink, do=do)
    norm = max(float(abs(g).max()) for g in expected[1:] if g is not None)
    whole = sum(float((g**2).sum()) for g in expected[1:] if g is not None) ** 0.5
    actual, baseline = run(tree, *inputs, scale, **options), plain(tree, *inputs, scale, **options)
    everything = zip(actual, expected, baseline, strict=False)
    for name, (got, reference, other) in zip(("o", "dq", "dk", "dv", "dsink"), everything, strict=False):
        gradient = name != "o"
        assert got.dtype == inputs[0].dtype
        # One number per head, summed over all rows: plain torch's error may be 0 by luck, so the floor is the whole's.
        floor = whole if name == "dsink" else norm
        assert_accurate(got, reference, other, gradient=gradient, norm=floor if gradient else None, name=name)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1), (10, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forest", FORESTS)
def test_against_oracle(forest, dtype, heads, sink):
    tree, rows = FORESTS[forest]
    check(tree, rows, problem(tree, dtype, *heads, sink=sink))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forest", FORESTS)
def test_windows_and_softcaps_against_oracle(forest, dtype, option):
    tree, rows = FORESTS[forest]
    check(tree, rows, problem(tree, dtype), **OPTIONS[option])


@pytest.mark.parametrize("D", [1, 3, 15, 16, 17, 33, 64, 100])
def test_odd_head_sizes(D):
    tree, rows = FORESTS["groups"]
    check(tree, rows, problem(tree, D=D))


@given(
    paths=paths_strategy, heads=st.sampled_from([(1, 1), (2, 1), (6, 2)]), window=st.none() | st.integers(1, 10),
    softcap=st.sampled_from([None, 0.5, 30.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_random_tries(paths, heads, window, softcap):
    tree = PrefixTree.from_paths(paths, share=True)
    check(tree, oracle.trie_rows(paths), problem(tree, torch.float32, *heads, D=4), window=window, softcap=softcap)


@given(groups=groups_strategy)
@settings(max_examples=30, deadline=None)
def test_random_groups(groups):
    prompts, responses = [p for p, _ in groups], [r for _, r in groups]
    tree = PrefixTree.from_groups(prompts, responses, share=True)
    check(tree, oracle.group_rows(prompts, responses), problem(tree, D=5))


def test_prefix_attention_takes_it(monkeypatch):
    """By default and by name, under autograd; the composition does not run, and `reference` does not come here."""
    tree, _ = FORESTS["groups"]
    q, k, v, do, sink = problem(tree)
    expected = run(tree, q, k, v, do, sink)
    monkeypatch.setattr(algorithm, "composed_forward", None)
    monkeypatch.setattr(algorithm, "composed_backward", None)
    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
    for choose in (None, "native"):
        monkeypatch.setattr(backend, "_requested", choose)
        o = rl.prefix_attention(q, k, v, tree, scale=0.4, sink=sink)
        for x, y in zip((o, *torch.autograd.grad(o, leaves, do)), expected, strict=True):
            assert torch.equal(x, y)
    monkeypatch.setattr(native, "forward", None)
    with rl.backend("reference"):
        torch.testing.assert_close(rl.prefix_attention(q, k, v, tree, scale=0.4, sink=sink), expected[0])


def test_float64_is_left_to_the_composition():
    tree, _ = FORESTS["paths"]
    q, k, v, *_ = problem(tree, torch.float64)
    assert not native.runs(q, "")
    with rl.backend("native"):
        got = rl.prefix_attention(q, k, v, tree)
    with rl.backend("reference"):
        torch.testing.assert_close(got, rl.prefix_attention(q, k, v, tree), rtol=1e-12, atol=1e-12)


def test_strides():
    """Heads first, every second number, expanded and transposed: bitwise what their contiguous copies give."""
    tree, _ = FORESTS["groups"]
    M = tree.M
    q = torch.randn(4, M, 8).transpose(0, 1)
    k = torch.randn(M, 2, 16)[..., ::2]
    v = torch.randn(8, 2, M).permute(2, 1, 0)
    sink = torch.randn(8)[::2]
    for do in (
        torch.randn(8, 4, M).permute(2, 1, 0),
        torch.randn(1, 4, 1).expand(M, 4, 8),
        torch.randn(1, 1, 8).expand(M, 4, 8),
        torch.randn(M, 4, 16)[..., 8:],
    ):
        strided = run(tree, q, k, v, do, sink)
        contiguous = run(tree, *(x.contiguous() for x in (q, k, v, do, sink)))
        assert all(torch.equal(x, y) for x, y in zip(strided, contiguous, strict=True))


@pytest.mark.parametrize("Hkv", [1, 4])
@pytest.mark.parametrize("forest", ["groups", "chain", "long"])
def test_threads_do_not_change_the_result(forest, Hkv):
    tree, _ = FORESTS[forest]
    inputs = problem(tree, Hq=4, Hkv=Hkv)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(run(tree, *inputs))
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("forest", FORESTS)
def test_rows_that_nobody_reads(forest, heads):
    """At the rows that are read nothing changes, to the bit; elsewhere there is no work, not even on NaN."""
    tree, _ = FORESTS[forest]
    q, k, v, do, _ = problem(tree, Hq=heads[0], Hkv=heads[1], sink=False)
    rows = tree.last_rows.unique()
    unread = torch.ones(tree.M, dtype=torch.bool)
    unread[rows] = False
    do[unread] = 0
    results = []
    for read in (None, rows):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = rl.prefix_attention(*leaves, tree, rows=read)
        results.append((o[rows], *torch.autograd.grad(o, leaves, do)))
    (o, *expected), (found, *gradients) = results
    assert torch.equal(found, o)
    torch.testing.assert_close(gradients, expected)


def test_tiles_that_nobody_reads_cost_nothing():
    """A prompt of which only the last row is read: the tiles before are zero, whatever their queries hold."""
    tree = PrefixTree.from_groups([[1] * 300], [[[2] * 8, [3] * 8]])
    q, k, v, do, _ = problem(tree, sink=False)
    do[:299] = 0
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(rl.prefix_attention(*exact, tree), exact, do)
    q[:200] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = rl.prefix_attention(*leaves, tree, rows=tree.loss_reads.rows)
    assert (o[:200] == 0).all()
    torch.testing.assert_close(torch.autograd.grad(o, leaves, do), expected)


def test_a_large_sink_has_no_part_in_rows_that_nobody_reads():
    """exp(sink) alone is inf here; the gradients are those of all rows."""
    tree, _ = FORESTS["long"]
    q, k, v, do, sink = problem(tree)
    do[: tree.M - 1] = 0
    rows = torch.tensor([tree.M - 1])
    inputs = q, k, v, 100 + sink
    results = []
    for read in (None, rows):
        leaves = [x.clone().requires_grad_() for x in inputs]
        *q_k_v, s = leaves
        o = rl.prefix_attention(*q_k_v, tree, sink=s, rows=read)
        results.append(torch.autograd.grad(o, leaves, do))
    torch.testing.assert_close(*results)


def test_the_rest_of_the_batch_changes_nothing():
    """A tree's rows are the same whatever else is packed beside it, and NaN in one tree stays there."""
    alone = PrefixTree.from_groups([[1] * 40], [[[2] * 30, [3] * 5, []]])
    both = PrefixTree.from_groups([[1] * 40, [1, 2]], [[[2] * 30, [3] * 5, []], [[4] * 9, [5]]])
    q, k, v, do, sink = problem(both, Hkv=4)
    for x in (q, k, v, do):
        x[alone.M :] = torch.nan
    together = run(both, q, k, v, do, sink)
    own = run(alone, *(x[: alone.M] for x in (q, k, v, do)), sink)
    for x, y in zip(together[:4], own[:4], strict=True):
        assert x[: alone.M].isfinite().all() and x[alone.M :].isnan().all()
        torch.testing.assert_close(x[: alone.M], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_reaches_what_sees_it_and_nothing_else(where):
    tree, _ = FORESTS["long"]
    q, k, v, _, _ = problem(tree)
    row = 149  # the prompt's last
    {"q": q, "k": k}[where][row] = torch.nan
    o, lse = native.forward(q, k, v, tree.node_table, 0.4, None, None, None)
    seen = torch.arange(tree.M) == row if where == "q" else torch.arange(tree.M) >= row
    assert torch.equal(o.isnan().flatten(1).any(-1), seen)
    assert torch.equal(lse.isnan().any(-1), seen)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 70, "softcap": 1.5}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "do"])
@pytest.mark.parametrize("row", [0, 70, 149, 155, 200])
def test_rows_that_do_not_see_one_another(row, where, value, options):
    """Whatever one row holds, the rest is what it is beside a finite row, also where one tile takes them all."""
    tree, rows = FORESTS["long"]
    keys = oracle.keys_of_rows(rows, options.get("window"))
    below = torch.tensor([row in seen for seen in keys])
    above = torch.zeros(tree.M, dtype=torch.bool)
    above[keys[row]] = True
    beside = torch.zeros(tree.M, dtype=torch.bool)  # keys of which a query that sees the row gives a gradient
    for i in below.nonzero().flatten().tolist():
        beside[keys[i]] = True
    inputs = dict(zip(("q", "k", "v", "do"), problem(tree, D=19)[:4], strict=True))
    clean = run(tree, *inputs.values(), None, **options)
    inputs[where][row, :, 3::5] = value
    got = run(tree, *inputs.values(), None, **options)
    key = where in "kv"
    queries = below if key else torch.arange(tree.M) == row
    touched = {"o": queries, "dq": queries, "dk": beside if key else above, "dv": beside if key else above}
    if where in ("v", "do"):  # no gradient of v holds v, and the output nothing of its gradient
        touched["dv" if where == "v" else "o"] = torch.zeros(tree.M, dtype=torch.bool)
    for (name, reached), x, y in zip(touched.items(), got, clean, strict=True):
        torch.testing.assert_close(x[~reached], y[~reached], rtol=1e-5, atol=1e-5, msg=name)
    if where != "do" and value != torch.inf:
        assert got[0][queries].isnan().flatten(1).any(-1).all()


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.5}, {"window": 70, "softcap": 1.5}])
@pytest.mark.parametrize("row", [1, 70, 149, 155, 200])
def test_infinite_key_with_finite_weights(row, options):
    """Scores of -inf, alone or under a softcap, give finite weights and gradients of 0: the key alone is not finite.

    All but the gradients of the queries that see it is what a key gives that is just far enough.
    """
    tree, rows = FORESTS["long"]
    below = torch.tensor([row in seen for seen in oracle.keys_of_rows(rows, options.get("window"))])
    q, k, v, do, _ = problem(tree, D=19, sink=False)
    q[:, :, 3] = q[:, :, 3].abs() + 0.5
    results = []
    for value in (-1e4, -torch.inf):
        k[row, :, 3] = value
        results.append(run(tree, q, k, v, do, None, **options))
    (o, dq, dk, dv), got = results
    for name, x, y in zip(("o", "dk", "dv"), (got[0], *got[2:]), (o, dk, dv), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(got[1][~below], dq[~below], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e-3])
def test_extreme_scores(size):
    """Scores in the thousands in both directions, and sinks far above and below them."""
    tree, _ = FORESTS["groups"]
    q, k, v, do, sink = problem(tree)
    q = q * size
    sink = torch.tensor([-1e4, 1e4, 0.0, 1.0])
    got = run(tree, q, k, v, do, sink, 1.0)
    wide = [x.double() for x in (q, k, v, do, sink)]
    o, lse = algorithm.composed_forward(*wide[:3], tree.node_table, 1.0, wide[4])
    expected = (o, *algorithm.composed_backward(wide[3], *wide[:3], o, lse, tree.node_table, 1.0, wide[4]))
    # A log-sum-exp in the thousands has a float32 rounding of 1e-4, which every recomputed probability inherits.
    units = {"o": 1, "dq": 1, "dk": size, "dv": 1, "dsink": 1}
    for (name, unit), x, y in zip(units.items(), got, expected, strict=True):
        assert (x.double() - y).abs().max() <= 1e-3 * max(1, unit), name


def test_empty_nodes():
    tree = PrefixTree.from_paths([[1, 2], [1, 3]])
    root, left, right = tree.node_table.tolist()
    table = torch.tensor([root, [1, 1, 1, 0], [*left[:3], 0], [2, 2, 3, 0], [*right[:3], 0], [3, 3, 3, -1]])
    q, k, v, do, _ = problem(tree, Hkv=4)
    o, lse = native.forward(q, k, v, tree.node_table, 0.4, None, None, None)
    o2, lse2 = native.forward(q, k, v, table, 0.4, None, None, None)
    assert torch.equal(o, o2) and torch.equal(lse, lse2)
    one = native.backward(do, q, k, v, o, lse, tree.node_table, 0.4, None, None, None)
    other = native.backward(do, q, k, v, o, lse, table, 0.4, None, None, None)
    for x, y in zip(one[:3], other[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "table",
    [
        [[0, 2, 3, -1], [1, 3, 3, 0]],
        [[0, 2, 3, -1], [2, 9, 9, 0]],
        [[0, 2, 3, -1], [2, 2, 3, 0]],
        [[0, 2, 3, -1], [2, 3, 3, 1]],
        [[0, 2, 3, 0], [2, 3, 3, 0]],
        [[2, 0, 3, -1], [0, 3, 3, 0]],
    ],
)
def test_node_tables_that_are_none(table):
    """The op takes any tensor: nothing outside the rows is read or written."""
    q = torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match="node_table: expected runs"):
        native.forward(q, q, q, torch.tensor(table), 0.4, None, None, None)


CODE = """
import sys, torch, rlcore as rl
from rlcore.ops import backend
assert backend.native().features()["isa"] == sys.argv[1], backend.native().features()
q, k, v, do, paths = torch.load(sys.argv[2])
leaves = [x.requires_grad_() for x in (q, k, v)]
out = []
for options in ({}, {"window": 40, "softcap": 2.0}):
    o = rl.prefix_attention(q, k, v, rl.PrefixTree.from_paths(paths, share=True), **options)
    out += o.detach(), *torch.autograd.grad(o, leaves, do)
torch.save(out, sys.argv[3])
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa, tmp_path):
    """The other builds in a process of their own, within rounding of this one."""
    if isa == "avx2" and backend.native().features()["isa"] == "baseline":
        pytest.skip("this CPU has no AVX2")
    source = random.Random(0)
    paths = LONG + [[1] * 150 + [source.randrange(3) for _ in range(20)] for _ in range(6)]
    tree = PrefixTree.from_paths(paths, share=True)
    q, k, v, do, _ = problem(tree, Hq=6, D=19, sink=False)
    torch.save((q, k, v, do, paths), tmp_path / "in")
    arguments = [sys.executable, "-c", CODE, isa, str(tmp_path / "in"), str(tmp_path / "out")]
    subprocess.run(arguments, env=os.environ | {"RLCORE_ISA": isa}, check=True)
    inputs = tree, q, k, v, do, None, 19**-0.5
    for x, y in zip(torch.load(tmp_path / "out"), run(*inputs) + run(*inputs, window=40, softcap=2.0), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
