from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefix_tree import paths_strategy

from accuracy import assert_accurate
from oracles import prefix_attention as oracle
from rlcore.algorithms import prefix_attention as algorithm
from rlcore.algorithms import prefix_attention_plan as planner
from rlcore.prefix_tree import PrefixTree

GROUPS = (
    [[1, 2, 3], [4] * 70, [5], [6, 6]],
    [[[1], [], [2, 3]], [[3] * 66, [4] * 5, [5] * 5, [6] * 7], [[1], [2], [3] + [4] * 6], [[]]],
)
PATHS = [[0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 9], [0, 1, 2, 3, 7, 7, 7], [8, 8], [8, 9, 9], [0, 1, 2, 3, 7, 6], [0, 5]]


def forests():
    yield "groups", PrefixTree.from_groups(*GROUPS), oracle.group_rows(*GROUPS)
    yield "paths", PrefixTree.from_paths(PATHS), oracle.trie_rows(PATHS)
    yield "one row", PrefixTree.from_paths([[3]]), oracle.trie_rows([[3]])


FORESTS = {name: (tree, rows) for name, tree, rows in forests()}
OPTIONS = {"plain": {}, "window": {"window": 3}, "softcap": {"softcap": 1.5}, "both": {"window": 2, "softcap": 0.7}}


def problem(tree, dtype, Hq=4, Hkv=2, D=8, Dv=None, sink=False, size=1.0):
    q = torch.randn(tree.M, Hq, D, dtype=torch.float64) * size
    k = torch.randn(tree.M, Hkv, D, dtype=torch.float64)
    v = torch.randn(tree.M, Hkv, Dv or D, dtype=torch.float64)
    do = torch.randn(tree.M, Hq, Dv or D, dtype=torch.float64)
    s = torch.randn(Hq, dtype=torch.float64) if sink else None
    return [None if x is None else x.to(dtype) for x in (q, k, v, do, s)]


def plain(q, k, v, tree, scale, window=None, softcap=None, sink=None):
    """Textbook attention with everything in the inputs' dtype: what the error rule compares with."""
    ratio = q.shape[1] // k.shape[1]
    K, V = (x.repeat_interleave(ratio, dim=1).transpose(0, 1) for x in (k, v))
    z = q.transpose(0, 1) @ K.transpose(1, 2) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    rows = torch.arange(tree.M)
    z = z.masked_fill(~algorithm.visible(rows, rows, tree.end, tree.position, tree.position, window), -torch.inf)
    if sink is not None:
        z = torch.cat([z, sink[:, None, None].expand(-1, tree.M, 1)], dim=-1)
    p = torch.softmax(z, dim=-1)[..., : tree.M]
    return (p @ V).transpose(0, 1)


def check(forward_backward, tree, rows, dtype, sink, options, scale=0.4, **shape):
    """o and all gradients of `forward_backward(q, k, v, do, sink)` against the oracle, beside plain torch."""
    q, k, v, do, s = problem(tree, dtype, sink=sink, **shape)
    wide = [None if x is None else x.double().numpy() for x in (q, k, v, do, s)]
    expected = oracle.attention(*wide[:3], rows, scale, **options, sink=wide[4], do=wide[3])
    leaves = [x.clone().requires_grad_() for x in (q, k, v, s) if x is not None]
    base = plain(*leaves[:3], tree, scale, **options, sink=leaves[3] if sink else None)
    baseline = (base, *torch.autograd.grad(base, leaves, do))
    actual = forward_backward(q, k, v, do, s)
    norm = max(float(np.abs(g).max()) for g in expected[1:])
    for name, got, reference, other in zip(("o", "dq", "dk", "dv", "dsink"), actual, expected, baseline, strict=False):
        assert_accurate(got, reference, other, gradient=name != "o", norm=norm if name != "o" else None, name=name)


def differentiated(tree, scale, options):
    def run(q, k, v, do, s):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, s) if x is not None]
        o = algorithm.reference(*leaves[:3], tree.end, tree.position, scale, sink=leaves[3] if s is not None else None,
                                **options)  # fmt: skip
        return (o, *torch.autograd.grad(o, leaves, do))

    return run


def composed(tree, scale):
    def run(q, k, v, do, s):
        o, lse = algorithm.composed_forward(q, k, v, tree.node_table, scale, s)
        return (o, *algorithm.composed_backward(do, q, k, v, o, lse, tree.node_table, scale, s))

    return run


def blocked(tree, scale, options):
    def run(q, k, v, do, s):
        numbers = scale, options.get("window"), options.get("softcap"), s
        index = tree.end, tree.position, tree.node_table
        o, lse = algorithm.blocked_forward(q, k, v, *index, *numbers)
        return (o, *algorithm.blocked_backward(do, q, k, v, o, lse, *index, *numbers))

    return run


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forest", FORESTS)
def test_reference_and_blocked_against_oracle(forest, dtype, option, sink, monkeypatch):
    tree, rows = FORESTS[forest]
    check(differentiated(tree, 0.4, OPTIONS[option]), tree, rows, dtype, sink, OPTIONS[option])
    monkeypatch.setattr(algorithm, "_BLOCK_ELEMENTS", 4 * 50 * 7)
    check(blocked(tree, 0.4, OPTIONS[option]), tree, rows, dtype, sink, OPTIONS[option])


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [3, 64])
@pytest.mark.parametrize("forest", FORESTS)
def test_composition_against_oracle(forest, small, dtype, heads, sink):
    tree, rows = FORESTS[forest]
    with calls_for(small):
        check(composed(tree, 0.4), tree, rows, dtype, sink, {}, Hq=heads[0], Hkv=heads[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_composition_where_flash_attention_does_not_share_key_heads(dtype, monkeypatch):
    """What older torch needs: key heads repeated in front of the call, their gradients summed behind it."""
    monkeypatch.setattr(algorithm, "_SHARES_KEY_HEADS", False)
    tree, rows = FORESTS["groups"]
    check(composed(tree, 0.4), tree, rows, dtype, True, {}, Hq=4, Hkv=2)


@pytest.mark.skipif(not algorithm._SHARES_KEY_HEADS, reason="this torch does not share key heads")
def test_key_heads_are_not_repeated(monkeypatch):
    """A call on one run gets views of k and v themselves; others get blocks of Hkv heads, never of Hq."""
    tree = PrefixTree.from_groups([[1] * 80], [[[2] * 70, [3] * 70, [4] * 5, [5] * 5]])
    q, k, v, do, _ = problem(tree, torch.float32, Hq=8, Hkv=2)
    seen = []

    def watch(call, first):
        def run(*arguments, **options):
            seen.append(arguments[first : first + 2])
            return call(*arguments, **options)

        return run

    monkeypatch.setattr(algorithm, "flash", watch(algorithm.flash, 1))
    monkeypatch.setattr(algorithm, "flash_backward", watch(algorithm.flash_backward, 2))
    composed(tree, 0.4)(q, k, v, do, None)
    views = 0
    for keys, values in seen:
        assert keys.shape[1] == values.shape[1] == 2
        shared = [x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for x, y in ((keys, k), (values, v))]
        assert all(shared) or (keys.shape[0] > 1 and not any(shared))
        views += all(shared)
    assert views == 8  # the prompt and two answers by themselves and the answers over the prompt, both passes


@contextmanager
def calls_for(small):
    """Plans made with another size up to which blocks share a call."""
    usual, planner._SMALL = planner._SMALL, small
    planner._plan.cache_clear()
    try:
        yield
    finally:
        planner._SMALL = usual
        planner._plan.cache_clear()


@pytest.mark.parametrize("small", [1, 5, 64])
@given(paths=paths_strategy, sink=st.booleans())
@settings(max_examples=25, deadline=None)
def test_composition_on_random_tries(small, paths, sink):
    tree = PrefixTree.from_paths(paths, share=True)
    q, k, v, do, s = problem(tree, torch.float64, D=4, sink=sink)
    with calls_for(small):
        got = composed(tree, 0.4)(q, k, v, do, s)
    expected = differentiated(tree, 0.4, {})(q, k, v, do, s)
    for x, y in zip(got, expected, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1e3, 1e-3])
def test_merge_is_stable_for_extreme_scores(size):
    """Scores in the thousands: one part's weight underflows beside another's."""
    tree, rows = FORESTS["paths"]
    check(composed(tree, 1.0), tree, rows, torch.float64, True, {}, scale=1.0, size=size)
    inputs = problem(tree, torch.float32, sink=True, size=size)
    single = composed(tree, 1.0)(*inputs)
    double = composed(tree, 1.0)(*(x.double() for x in inputs))
    # A log-sum-exp in the thousands has a float32 rounding of 1e-4, which every recomputed probability inherits.
    units = {"o": 1, "dq": 1, "dk": size, "dv": 1, "dsink": 1}
    for (name, unit), got, expected in zip(units.items(), single, double, strict=True):
        assert (got.double() - expected).abs().max() <= 1e-3 * max(1, unit), name


@pytest.mark.parametrize("small", [1, 5, 64])
@given(paths=paths_strategy)
@settings(max_examples=25, deadline=None)
def test_plan_covers_every_visible_pair_once(small, paths):
    tree = PrefixTree.from_paths(paths, share=True)
    pairs = np.zeros((tree.M, tree.M), dtype=int)
    with calls_for(small):
        parts = algorithm.plan(tree.node_table)
    for part in parts:
        kept = np.zeros(part.queries.numel(), dtype=bool)
        kept[:] = part.kept is None
        if part.kept is not None:
            kept[part.kept.numpy()] = True
        rows = part.queries.flatten().numpy()[kept]
        assert len(set(rows.tolist())) == len(rows)
        for b, (queries, keys) in enumerate(zip(part.queries.tolist(), part.keys.tolist(), strict=True)):
            for t, i in enumerate(queries):
                if kept[b * len(queries) + t]:
                    seen = keys[: t + 1] if part.own else keys
                    if part.mask is not None:
                        seen = [j for j, visible in zip(keys, part.mask[b, 0, t].tolist(), strict=True) if visible]
                    for j in seen:
                        pairs[i, j] += 1
    rows = torch.arange(tree.M)
    assert np.array_equal(pairs, algorithm.visible(rows, rows, tree.end, tree.position, tree.position, None).numpy())


@pytest.mark.parametrize("small", [1, 64])
def test_zero_length_nodes_never_reach_the_flash_call(small):
    tree = PrefixTree.from_paths([[1, 2], [1, 3]])
    root, left, right = tree.node_table.tolist()
    padded = torch.tensor([root, [1, 1, 1, 0], [*left[:3], 0], [2, 2, 3, 0], [*right[:3], 0], [3, 3, 3, -1]])
    q, k, v, do, _ = problem(tree, torch.float64)
    with calls_for(small):
        o, lse = algorithm.composed_forward(q, k, v, tree.node_table, 0.4, None)
        o2, lse2 = algorithm.composed_forward(q, k, v, padded, 0.4, None)
        one = algorithm.composed_backward(do, q, k, v, o, lse, tree.node_table, 0.4, None)
        other = algorithm.composed_backward(do, q, k, v, o, lse, padded, 0.4, None)
    assert torch.equal(o, o2) and torch.equal(lse, lse2)
    assert all(torch.equal(x, y) for x, y in zip(one[:3], other[:3], strict=True))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("sink", [False, True])
def test_gradcheck_of_the_reference(option, sink):
    tree = PrefixTree.from_paths([[1, 2, 3], [1, 2, 4, 4], [1, 5], [6]])
    q, k, v, _, s = problem(tree, torch.float64, Hq=2, Hkv=1, D=3, Dv=2, sink=sink)
    leaves = [x.requires_grad_() for x in (q, k, v, s) if x is not None]

    def run(*x):
        return algorithm.reference(*x[:3], tree.end, tree.position, 0.6, sink=x[3] if sink else None, **OPTIONS[option])

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
