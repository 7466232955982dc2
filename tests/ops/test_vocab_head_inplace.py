"""logprob with inplace_backward: the same gradient, in the logits' memory, and an error where that could be wrong."""

from __future__ import annotations

import pytest
import torch
from vocab_head_cases import DTYPES, set_chunk

from accuracy import assert_accurate, to_float64
from oracles import vocab_head as oracle
from rlcore.algorithms.vocab_head_passes import TORCH
from rlcore.ops import backend, vocab_head_passes
from rlcore.ops import vocab_head_raw as raw
from rlcore.ops.vocab_head import logprob

V = 123
NATIVE = backend.native() is not None


@pytest.fixture(params=["native", "torch"])
def passes(request, monkeypatch):
    """The row passes in C++, and torch's."""
    if request.param == "native" and not NATIVE:
        pytest.skip("rlcore._native was not built")
    if request.param == "torch":
        monkeypatch.setattr(vocab_head_passes, "row_passes", lambda x, requested: TORCH)
    set_chunk(monkeypatch, V, 10, 3)


def inputs(shape, dtype, masked=0.3, seed=0):
    """Scores (a leaf), labels, temperatures, mask, and d logp, d entropy; a third of the kept rows has none of both."""
    g = torch.Generator().manual_seed(seed)
    scores = (torch.randn(*shape, V, generator=g, dtype=torch.float64) * 3).to(dtype)
    keep = torch.rand(shape, generator=g) >= masked
    scores[~keep] = torch.nan
    target = torch.randint(V, shape, generator=g).masked_fill(~keep, -100)
    heat = torch.rand(shape, generator=g) + 0.5
    moved = torch.rand(shape, generator=g) >= 0.3
    d = [torch.randn(shape, generator=g, dtype=torch.float64) * moved for _ in range(2)]
    return scores.requires_grad_(), target, heat, keep, d


def stored(scores, layout):
    """Logits that an operation made, [N, V] or [B, T, V], as they may lie in memory."""
    if layout == "slice of T":
        room = scores.detach().new_full((scores.shape[0], scores.shape[1] + 2, V), 7.0)
        return torch.cat((room[:, :1], scores, room[:, 1:2]), 1)[:, 1:-1]
    if layout == "T first":
        return (scores.transpose(0, 1).contiguous() * 1).transpose(0, 1)
    if layout == "V first":
        return (scores.transpose(-1, -2).contiguous() * 1).transpose(-1, -2)
    return scores * 1


LAYOUTS = [((47,), "rows"), ((47,), "V first"), ((3, 11), "rows"), ((3, 11), "slice of T"), ((3, 11), "T first"),
           ((0,), "rows"), ((1,), "V first")]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_the_same_gradient_in_the_logits_memory(shape, layout, dtype, entropy, dense, passes):
    scores, target, heat, keep, d = inputs(shape, dtype, masked=0.0 if dense else 0.3)
    d = [x + 2 for x in d] if dense else d  # every row has a gradient: no row is copied to the side
    t = 0.7 if dense else heat
    found, placed = [], []
    for in_place in (False, True):
        logits = stored(scores, layout)
        logits.register_hook(lambda g, x=logits: placed.append(g.data_ptr() == x.data_ptr()))
        out = logprob(logits, target, t, entropy, keep, inplace_backward=in_place)
        outputs = (out.logp, out.entropy) if entropy else (out.logp,)
        found.append(torch.autograd.grad(outputs, scores, [x.to(y.dtype) for x, y in zip(d, outputs, strict=False)])[0])
    assert torch.equal(*found)
    assert placed == [False, True] or not target.numel()
    flat = [to_float64(x)[keep.numpy()] for x in (scores, heat, *d)]
    head = oracle.Head(
        flat[0], torch.eye(V).double().numpy(), target[keep].numpy(), temperature=t if dense else flat[1]
    )
    expected = head.backward(flat[2], flat[3] if entropy else flat[3] * 0)[0]
    assert not found[1][~keep].any()
    if dtype.itemsize > 2:
        assert_accurate(found[1][keep], expected, gradient=True, norm=1.0, name="d_logits")
    else:
        torch.testing.assert_close(found[1][keep].double(), torch.from_numpy(expected), rtol=1e-2, atol=1e-3)


def small(**options):
    scores, target, *_ = inputs((5,), torch.float32, masked=0.0)
    logits = scores * 1
    return scores, logits, logprob(logits, target, inplace_backward=True, **options)


def test_a_second_run_and_a_double_backward_raise():
    scores, _, out = small(entropy=True)
    out.logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True runs backward once"):
        out.entropy.sum().backward()
    scores, logits, out = small()
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match="can not be differentiated twice"):
        torch.autograd.grad(out.logp.sum(), scores, create_graph=True)
    assert torch.equal(logits.detach(), before)


def test_another_op_that_saved_the_logits_is_told():
    scores, logits, out = small()
    squared, exponential = logits.square().sum(), logits.exp().sum()
    out.logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()
    exponential.backward()  # has saved its result, not the logits
    # The operation whose result the logits are may need it too.
    scores, target, *_ = inputs((5,), torch.float32, masked=0.0)
    out = logprob(scores.tanh(), target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logp.sum().backward()
    # So are two of our own.
    logits = scores * 1
    pair = [logprob(logits, target, inplace_backward=True).logp.sum() for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(pair).backward()
    # And logits that somebody else has changed since the forward pass are not taken for the old ones.
    scores, logits, out = small()
    with torch.no_grad():
        logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logp.sum().backward()


def test_gradients_of_other_uses_add_up():
    scores, target, *_ = inputs((5,), torch.float32, masked=0.0)
    upstream = torch.randn(5, V)
    found = []
    for in_place in (False, True):
        for first in (False, True):
            logits = scores * 2
            logits.retain_grad()
            terms = [(logits * upstream).sum()] if first else []
            terms.append(logprob(logits, target, inplace_backward=in_place).logp.sum())
            terms += [] if first else [(logits * upstream).sum()]
            found.append(torch.autograd.grad(sum(terms), scores)[0])
    for x in found[1:]:
        torch.testing.assert_close(x, found[0])


def test_saved_tensors_that_hooks_move_and_recompute():
    scores, target, *_ = inputs((5,), torch.float32, masked=0.0)
    expected = torch.autograd.grad(logprob(scores * 1, target).logp.sum(), scores)[0]
    call = lambda x: logprob(x * 1, target, inplace_backward=True).logp.sum()  # noqa: E731
    with torch.autograd.graph.save_on_cpu():
        loss = call(scores)
    assert torch.equal(torch.autograd.grad(loss, scores)[0], expected)
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(call, scores, use_reentrant=reentrant)
        loss.backward()
        assert torch.equal(scores.grad, expected)
        scores.grad = None


def test_refuses_what_it_would_corrupt():
    scores, target, *_ = inputs((5,), torch.float32, masked=0.0)
    for leaf, what in ((scores, "a leaf"), (scores[:], "a view of a leaf"), (scores.view(5, V)[1:4], "a view of a")):
        with pytest.raises(ValueError, match=rf"logits: expected the result of an operation .*got {what}"):
            logprob(leaf, target[: leaf.shape[0]], inplace_backward=True)
    row = scores[:1] * 1
    overlapping = (row.expand(5, V), (scores[:, :1] * 1).expand(5, V), (scores * 1).as_strided((5, V), (V - 1, 1)))
    for logits in overlapping:
        with pytest.raises(ValueError, match=r"logits: expected elements that share no memory .*strides"):
            logprob(logits, target, inplace_backward=True)
        # Without the option they are logits like any other.
        alone = logprob(logits.detach().clone(), target).logp
        torch.testing.assert_close(logprob(logits, target).logp, alone)
    with pytest.raises(TypeError, match=r"logits: expected a torch\.Tensor; got list"):
        logprob([1.0], target, inplace_backward=True)


def test_nothing_to_differentiate_leaves_the_logits_alone():
    scores, target, *_ = inputs((5,), torch.float32, masked=0.0)
    before = scores.detach().clone()
    with torch.no_grad():
        logprob(scores, target, 0.7, True, inplace_backward=True)
    logprob(scores.detach(), target, 0.7, True, inplace_backward=True)
    logprob(scores, target, 0.7, True)
    assert torch.equal(scores.detach(), before)


def test_compiled_code_and_the_reference_give_the_same():
    scores, target, *_ = inputs((5,), torch.float32, masked=0.0)
    f = lambda x: logprob(x * 1, target, 0.7, inplace_backward=True).logp.sum()  # noqa: E731
    expected = torch.autograd.grad(f(scores), scores)[0]
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(scores), scores)[0], expected)
    with backend.backend("reference"):
        torch.testing.assert_close(torch.autograd.grad(f(scores), scores)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_opcheck(shape, dtype):
    logits, target = torch.randn(*shape, V, dtype=dtype), torch.randint(V, shape).reshape(-1)
    N = target.shape[0]
    rest = (target, torch.rand(N) < 0.7, torch.rand(N) + 0.5)
    stats = list(raw.logprob_forward(logits, *rest, True)[:4])
    for d_entropy in (torch.randn(N), None):
        torch.library.opcheck(raw.logprob_backward_, (logits.clone(), *rest, stats, torch.randn(N), d_entropy))
