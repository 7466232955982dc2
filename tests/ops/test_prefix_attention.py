import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rlcore as rl
from accuracy import assert_accurate
from oracles import prefix_attention as oracle
from rlcore.ops import backend
from rlcore.ops import prefix_attention_native as native
from rlcore.ops.prefix_attention import prefix_attention
from rlcore.prefix_tree import PrefixTree

PATHS = [[0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 9], [0, 1, 2, 3, 7, 7, 7], [8, 8], [8, 9, 9], [0, 1, 2, 3, 7, 6], [0, 5]]
TREE, ROWS = PrefixTree.from_paths(PATHS), oracle.trie_rows(PATHS)
OPTIONS = {"plain": {}, "window": {"window": 3}, "softcap": {"softcap": 1.5}}


def inputs(M, dtype=torch.float32, Hq=4, Hkv=2, D=8, Dv=None):
    shapes = (M, Hq, D), (M, Hkv, D), (M, Hkv, Dv or D)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def random_tree(seed, paths=6):
    source = random.Random(seed)
    tokens = [[source.randrange(3) for _ in range(source.randrange(2, 12))] for _ in range(paths)]
    return PrefixTree.from_paths(tokens, share=True)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("widths", [(8, 8), (8, 5), (3, 8)])
def test_against_oracle(option, widths, sink):
    q, k, v = inputs(TREE.M, torch.float64, D=widths[0], Dv=widths[1])
    s = torch.randn(4, dtype=torch.float64, requires_grad=True) if sink else None
    do = torch.randn(TREE.M, 4, widths[1], dtype=torch.float64)
    o = prefix_attention(q, k, v, TREE, **OPTIONS[option], sink=s)
    leaves = [q, k, v, s] if sink else [q, k, v]
    got = (o, *torch.autograd.grad(o, leaves, do))
    arrays = [x.detach().numpy() for x in (q, k, v)]
    expected = oracle.attention(*arrays, ROWS, widths[0] ** -0.5, **OPTIONS[option],
                                sink=s.detach().numpy() if sink else None, do=do.numpy())  # fmt: skip
    for x, reference in zip(got, expected, strict=False):
        assert_accurate(x, reference, norm=10.0)


@pytest.mark.parametrize("option", OPTIONS)
def test_strided_inputs_and_gradients(option):
    """Heads-first, last-dimension-strided and expanded tensors give what their contiguous copies give."""
    M = TREE.M
    q = torch.randn(4, M, 8).transpose(0, 1)
    k = torch.randn(M, 2, 16)[..., ::2]
    v = torch.randn(8, 2, M).permute(2, 1, 0)
    sink = torch.randn(8)[::2]
    for do in (
        torch.randn(8, 4, M).permute(2, 1, 0),
        torch.randn(1, 4, 1).expand(M, 4, 8),
        torch.randn(M, 4, 16)[..., 8:],
    ):
        results = []
        for prepare in (lambda x: x.detach(), lambda x: x.detach().contiguous()):
            leaves = [prepare(x).requires_grad_() for x in (q, k, v, sink)]
            o = prefix_attention(*leaves[:3], TREE, sink=leaves[3], **OPTIONS[option])
            results.append((o, *torch.autograd.grad(o, leaves, prepare(do))))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", OPTIONS)
def test_reference_backend_agrees_and_differentiates_twice(option):
    q, k, v = inputs(TREE.M, torch.float64)
    o = prefix_attention(q, k, v, TREE, **OPTIONS[option])
    with rl.backend("reference"):
        expected = prefix_attention(q, k, v, TREE, **OPTIONS[option])
    torch.testing.assert_close(o, expected)
    (g,) = torch.autograd.grad(expected.square().sum(), q, create_graph=True)
    assert torch.autograd.grad(g.sum(), k)[0].isfinite().all()
    (g,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r'differentiated once.*backend\("reference"\)'):
        torch.autograd.grad(g.sum(), k)


@given(st.permutations(range(5)), st.lists(st.integers(0, 4), min_size=5, max_size=5))
@settings(max_examples=25, deadline=None)
def test_permuting_responses_permutes_outputs(order, lengths):
    prompt = [0] * 4
    rows = [torch.randn(n, 3, 2, 4, dtype=torch.float64) for n in lengths]
    head = torch.randn(4, 3, 2, 4, dtype=torch.float64)

    def run(sequence):
        tree = PrefixTree.from_groups([prompt], [[[1] * lengths[s] for s in sequence]])
        q, k, v = torch.cat([head, *(rows[s] for s in sequence)]).unbind(1)
        o = prefix_attention(q, k, v, tree)
        return o[:4], dict(zip(sequence, o[4:].split([lengths[s] for s in sequence]), strict=True))

    one, other = run(list(range(5))), run(list(order))
    torch.testing.assert_close(one[0], other[0])
    for s in range(5):
        torch.testing.assert_close(one[1][s], other[1][s])


@pytest.mark.skipif(backend.native() is None, reason="needs the C++ extension")
@pytest.mark.parametrize("native_first", [True, False])
def test_the_backward_pass_has_the_backend_of_the_forward_pass(monkeypatch, native_first):
    """Whichever is asked for by then: `cuda` leaves attention on a CPU to the composition."""
    ran = []
    for f in (native.forward, native.backward):
        monkeypatch.setattr(native, f.__name__, lambda *x, f=f: (ran.append(f.__name__), f(*x))[1])
    q, k, v = inputs(TREE.M)
    monkeypatch.setattr(backend, "_requested", "native" if native_first else "cuda")
    o = prefix_attention(q, k, v, TREE)
    monkeypatch.setattr(backend, "_requested", "cuda" if native_first else None)
    torch.autograd.grad(o.sum(), (q, k, v))
    assert ran == (["forward", "backward"] if native_first else [])


def test_no_grad_and_frozen_inputs():
    q, k, v = inputs(TREE.M)
    with torch.no_grad():
        assert not prefix_attention(q, k, v, TREE).requires_grad
    o = prefix_attention(q, k.detach(), v.detach(), TREE)
    assert torch.autograd.grad(o.sum(), q)[0].shape == q.shape


def test_autocast_casts_as_scaled_dot_product_attention_does():
    q, k, v = inputs(TREE.M)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = prefix_attention(q, k, v.bfloat16(), TREE)
        like = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, q, q)))
    assert o.dtype == like.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(o.float().sum(), (q, k, v)))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, option, sink):
    q, k, v = (x.detach() for x in inputs(TREE.M, dtype))
    s = torch.randn(4, dtype=dtype) if sink else None
    index = TREE.end, TREE.position, TREE.node_table
    numbers = 0.3, OPTIONS[option].get("window"), OPTIONS[option].get("softcap"), ""
    o, lse = torch.ops.rlcore.prefix_attention_forward(q, k, v, *index, s, *numbers)
    torch.library.opcheck(torch.ops.rlcore.prefix_attention_forward, (q, k, v, *index, s, *numbers))
    arguments = torch.randn_like(o), q, k, v, o, lse, *index, s, *numbers
    torch.library.opcheck(torch.ops.rlcore.prefix_attention_backward, arguments)


def attention_loss(q, k, v, tree, sink):
    return prefix_attention(q * 1.5, k, v, tree, sink=sink).square().sum()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks_or_recompilation(compiler):
    """The first tree is compiled for its shape, the second for every shape: twenty more add nothing."""
    torch._dynamo.reset()
    compiled = torch.compile(attention_loss, fullgraph=True, backend=compiler)
    sink = torch.randn(4, requires_grad=True)
    for seed in range(22):
        tree = random_tree(seed, paths=4 + seed)
        leaves = [*inputs(tree.M), sink]
        expected = torch.autograd.grad(attention_loss(*leaves[:3], tree, sink), leaves)
        with torch._dynamo.config.patch(error_on_recompile=seed >= 2):
            got = torch.autograd.grad(compiled(*leaves[:3], tree, sink), leaves)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: ((q[0], k, v, TREE), {}), ValueError, r"q: expected \[rows, heads, head size\]"),
        (lambda q, k, v: ((q[1:], k, v, TREE), {}), ValueError, "q: expected the tree's"),
        (lambda q, k, v: ((q, k[1:], v, TREE), {}), ValueError, "k: expected the tree's"),
        (lambda q, k, v: ((q, k.double(), v, TREE), {}), TypeError, "k: expected the dtype of q"),
        (lambda q, k, v: ((q.int(), k, v, TREE), {}), TypeError, "q: expected a floating point tensor"),
        (lambda q, k, v: ((q, k[:, :1], v, TREE), {}), ValueError, "v: expected the 1 heads of k"),
        (lambda q, k, v: ((q, k[..., 1:], v, TREE), {}), ValueError, "k: expected the head size of q"),
        (lambda q, k, v: ((q[:, :3], k, v, TREE), {}), ValueError, "number of heads that divides the 3"),
        (lambda q, k, v: ((q, k, v, None), {}), TypeError, "tree: expected a PrefixTree"),
        (lambda q, k, v: ((q, k, v, TREE.to("meta")), {}), ValueError, r"use tree.to\(device\)"),
        (lambda q, k, v: ((q, k, v, TREE), {"window": 0}), ValueError, "window: expected at least 1"),
        (lambda q, k, v: ((q, k, v, TREE), {"softcap": 0.0}), ValueError, "softcap: expected a positive"),
        (lambda q, k, v: ((q, k, v, TREE), {"sink": torch.zeros(2)}), ValueError, "sink: expected one value per"),
        (lambda q, k, v: ((q, k, v, TREE), {"rows": [0]}), TypeError, "rows: expected a torch.Tensor, got list"),
        (lambda q, k, v: ((q, k, v, TREE), {"rows": torch.ones(1)}), TypeError, "rows: expected one dimension"),
        (lambda q, k, v: ((q, k, v, TREE), {"rows": torch.tensor([TREE.M])}), ValueError, "rows: expected 0 to"),
        (lambda q, k, v: ((q, k, v, TREE), {"rows": TREE.loss_rows.to("meta")}), ValueError, "rows: expected the tree"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments, options = change(*(x.detach() for x in inputs(TREE.M)))
    with pytest.raises(error, match=message):
        prefix_attention(*arguments, **options)
