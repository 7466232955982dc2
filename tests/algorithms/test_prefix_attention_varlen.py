"""The composition over variable-length flash attention: plan and merge with a stand-in on the CPU, else on a GPU."""

import sys
from types import ModuleType

import pytest
import torch

import rlcore as rl
from accuracy import assert_accurate
from oracles import prefix_attention as oracle
from rlcore.algorithms import prefix_attention_varlen as varlen
from rlcore.ops import backend
from rlcore.prefix_tree import PrefixTree

GROUPS = (
    [[1, 2, 3], [4] * 30, [5], [6, 6]],
    [[[1], [], [2, 3]], [[3] * 26, [4] * 5, [5] * 5, [6] * 7], [[1], [2], [3] + [4] * 6], [[]]],
)
PATHS = [[0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 9], [0, 1, 2, 3, 7, 7, 7], [8, 8], [8, 9, 9], [0, 1, 2, 3, 7, 6], [0, 5]]
FORESTS = {
    "groups": (PrefixTree.from_groups(*GROUPS), oracle.group_rows(*GROUPS)),
    "paths": (PrefixTree.from_paths(PATHS), oracle.trie_rows(PATHS)),
    "one row": (PrefixTree.from_paths([[3]]), [[0]]),
}


def scores(q, k, part, scale):
    """Per sequence (its rows, its keys, z [Hq, rows, keys]) as flash attention pairs them."""
    ratio = q.shape[1] // k.shape[1]
    q_ends, k_ends = part.q_offsets.tolist(), part.k_offsets.tolist()
    for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:]):
        assert 0 < b - a <= part.q_longest and 0 < d - c <= part.k_longest
        z = torch.einsum("ihd,jhd->hij", q[a:b], k[c:d].repeat_interleave(ratio, 1)) * scale
        if part.causal:
            z = z.masked_fill(torch.ones(b - a, d - c).triu(1).bool(), -torch.inf)
        yield slice(a, b), slice(c, d), z


def stand_in(q, k, v, part, scale):
    assert q.shape[2] % 8 == 0 and part.q_offsets.dtype == torch.int32
    ratio = q.shape[1] // k.shape[1]
    o, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=q.dtype)
    for rows, keys, z in scores(q, k, part, scale):
        o[rows] = torch.einsum("hij,jhd->ihd", z.softmax(-1), v[keys].repeat_interleave(ratio, 1))
        lse[rows] = z.logsumexp(-1).T
    return o, lse


def stand_in_backward(do, q, k, v, o, lse, part, scale):
    ratio = q.shape[1] // k.shape[1]
    K, V = (x.repeat_interleave(ratio, 1) for x in (k, v))
    dq, dk, dv = (torch.empty_like(x) for x in (q, K, V))
    delta = (do * o).sum(-1)
    for rows, keys, z in scores(q, k, part, scale):
        p = (z - lse[rows].T[..., None]).exp()
        ds = p * (torch.einsum("ihd,jhd->hij", do[rows], V[keys]) - delta[rows].T[..., None]) * scale
        dq[rows] = torch.einsum("hij,jhd->ihd", ds, K[keys])
        dk[keys] = torch.einsum("hij,ihd->jhd", ds, q[rows])
        dv[keys] = torch.einsum("hij,ihd->jhd", p, do[rows])
    return dq, *(x.unflatten(1, (-1, ratio)).sum(2) for x in (dk, dv))


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None,
):  # fmt: skip
    """The parameters are those of flash-attn 2.7 and 2.8, the result is the stand-in's."""
    part = as_part(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal)
    assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
    o, lse = stand_in(q, k, v, part, softmax_scale)
    return o, lse.T.contiguous(), torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    part = as_part(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal)
    assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
    assert deterministic is True and rng_state is None
    assert softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous()
    found = stand_in_backward(dout, q, k, v, out, softmax_lse.T, part, softmax_scale)
    for x, y, like in zip((dq, dk, dv), found, (q, k, v), strict=True):
        assert x.is_contiguous() and x.shape == like.shape and x.dtype == like.dtype
        x.copy_(y)
    return torch.empty(0)


def as_part(q_offsets, k_offsets, q_longest, k_longest, dropout, causal):
    assert dropout == 0.0 and isinstance(causal, bool) and type(q_longest) is type(k_longest) is int
    return varlen.Part(causal, None, None, q_offsets, k_offsets, q_longest, k_longest)


@pytest.fixture
def flash_attn(monkeypatch):
    """A package with the published names and parameters."""
    module = ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward
    module._wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    varlen.package.cache_clear()
    yield module
    varlen.package.cache_clear()


@pytest.mark.parametrize("form", ["", "flash-attn"])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("forest", FORESTS)
def test_plan_and_merge_with_a_stand_in(monkeypatch, request, forest, heads, sink, form):
    if form:
        package = request.getfixturevalue("flash_attn")
        assert varlen.package() is package
    else:
        monkeypatch.setattr(varlen, "attend", stand_in)
        monkeypatch.setattr(varlen, "attend_backward", stand_in_backward)
    tree, rows = FORESTS[forest]
    q, k, v, do = (torch.randn(tree.M, h, 5) for h in (heads[0], heads[1], heads[1], heads[0]))
    s = torch.randn(heads[0]) if sink else None
    o, lse = varlen.forward(q, k, v, tree.node_table, 0.4, s)
    got = (o, *varlen.backward(do, q, k, v, o, lse, tree.node_table, 0.4, s))
    arrays = [x.double().numpy() for x in (q, k, v)]
    wide = None if s is None else s.double().numpy()
    expected = oracle.attention(*arrays, rows, 0.4, sink=wide, do=do.double().numpy())
    for name, x, reference in zip(("o", "dq", "dk", "dv", "dsink"), got, expected, strict=True):
        if name != "dsink" or sink:
            assert_accurate(x, reference, norm=10.0, name=name)


def test_what_is_taken_is_stated(monkeypatch, request):
    state = backend._flash_state.__wrapped__
    assert rl.backends()["flash"] != "live"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.MonkeyPatch.context() as without:
        without.setattr(varlen.importlib, "import_module", missing)
        varlen.package.cache_clear()
        assert "torch's own" in state()
    package = request.getfixturevalue("flash_attn")
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: {"flash-attn": "2.8.3"}[name])
    assert state() == "flash-attn 2.8.3"
    del package._wrapped_flash_attn_varlen_backward  # as before 2.7
    varlen.package.cache_clear()
    assert varlen.package() is None


def missing(name):
    raise ImportError(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["torch", "flash-attn"])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("D", [64, 100])
@pytest.mark.parametrize("forest", FORESTS)
def test_on_a_gpu(monkeypatch, forest, D, sink, form):
    """rl.backend("native") on a GPU against the reference in the same dtype and in float64."""
    if form == "torch":
        monkeypatch.setattr(varlen, "package", lambda: None)
    elif varlen.package() is None:
        pytest.skip("needs flash-attn")
    tree = FORESTS[forest][0].to("cuda")
    inputs = [torch.randn(tree.M, h, D, device="cuda").bfloat16() for h in (4, 2, 2, 4)]
    s = torch.randn(4, device="cuda") if sink else None
    results = {}
    for name, dtype in (("native", torch.bfloat16), ("reference", torch.bfloat16), ("oracle", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (*inputs[:3], s) if x is not None]
        with rl.backend("reference" if name == "oracle" else name):
            o = rl.prefix_attention(*leaves[:3], tree, sink=(*leaves, None)[3])
            results[name] = (o, *torch.autograd.grad(o, leaves, inputs[3].to(dtype)))
    norm = max(float(x.abs().max()) for x in results["oracle"][1:])
    for x, base, reference in zip(results["native"], results["reference"], results["oracle"], strict=True):
        gradient = x is not results["native"][0]
        assert_accurate(x, reference, base, gradient=gradient, norm=norm if gradient else None)
