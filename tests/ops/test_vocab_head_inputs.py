"""logprob from logits that exist, and what every function of the family says about bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_head_cases import DTYPES, set_chunk

from accuracy import assert_accurate, to_float64
from oracles import vocab_head as oracle
from rlcore.algorithms import vocab_head as algorithm
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.objective import Objective
from rlcore.layout import TokenBatch
from rlcore.ops import backend
from rlcore.ops.vocab_head import linear_logprob, linear_policy_loss, logprob

# ------------------------------------------------------------------------------------------------ logprob


def scores_case(data, dtype, shape=(47,), V=123):
    z, target = torch.randn(*shape, V, dtype=torch.float64) * 3, torch.randint(V, shape)
    if data == "peaked":
        z.scatter_add_(-1, target[..., None], torch.full((*shape, 1), 30.0, dtype=torch.float64))
    elif data == "negative":
        z -= 1e4 if dtype != torch.float16 else 3e3
    elif data == "large":
        z *= 1e3
    return z.to(dtype), target


def plain(z, target, t):
    """A few lines of plain torch in the logits' dtype."""
    log_p = (z / (t[..., None].to(z.dtype) if isinstance(t, torch.Tensor) else t)).log_softmax(-1)
    return log_p.gather(-1, target[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def grads(f, z, d):
    z = z.detach().requires_grad_()
    out = f(z)[:2]
    return *(x.detach() for x in out), torch.autograd.grad(
        out, z, [y.to(x.dtype) for x, y in zip(out, d, strict=True)]
    )[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("data", ["random", "peaked", "negative", "large"])
@pytest.mark.parametrize("t", [1.0, 0.3, "rows"])
def test_logprob_accuracy(data, t, dtype, monkeypatch):
    set_chunk(monkeypatch, 123, 10, 3)
    z, target = scores_case(data, dtype)
    t = torch.rand(47) + 0.5 if t == "rows" else t
    d = torch.randn(47, 2, dtype=torch.float64).unbind(1)
    logp, entropy, d_z = grads(lambda z: logprob(z, target, t, entropy=True), z, d)
    base = grads(lambda z: plain(z, target, t), z, d)
    assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and d_z.dtype == dtype
    # With the identity as weight, d raw logits is d hidden.
    head = oracle.Head(to_float64(z), torch.eye(123).double().numpy(), target.numpy(),
                       temperature=to_float64(t) if isinstance(t, torch.Tensor) else t)  # fmt: skip
    expected = (*head.forward(), head.backward(*(x.numpy() for x in d))[0])
    for name, x, y, z in zip(("logp", "entropy", "d_logits"), (logp, entropy, d_z), expected, base, strict=True):
        # An entropy of 1e-85 is 0 in float32: its floor is that of a difference of terms of order 1.
        assert_accurate(x, y, z, gradient=name == "d_logits", norm=1.0 if name == "entropy" else None, name=name)
    # The reference divides by the temperature, C++ multiplies by its inverse: a logit's last digit may differ.
    last_place = 2**-23 * abs(head.hidden).max() / (float(t.min()) if isinstance(t, torch.Tensor) else t)
    with backend.backend("reference"):
        for x, y in zip(grads(lambda z: logprob(z, target, t, entropy=True), head_logits(head, dtype), d),
                        (logp, entropy, d_z), strict=True):  # fmt: skip
            torch.testing.assert_close(x, y, rtol=2e-2 if x.dtype.itemsize == 2 else 1e-4, atol=max(1e-3, last_place))


def head_logits(head, dtype):
    return torch.from_numpy(head.hidden).to(dtype)


@given(masked=st.sampled_from([0.2, 0.6, 1.0]), seed=st.integers(0, 99), block=st.integers(1, 9), sliced=st.booleans())
@settings(max_examples=25, deadline=None)
def test_logprob_masks_slices_and_blocks(masked, seed, block, sliced):
    """[B, T, V] sliced along T and full of NaN under the mask: kept rows as alone, the rest untouched zeros."""
    torch.manual_seed(seed)
    z, target = scores_case("random", torch.float64, (3, 11))
    t = torch.rand(3, 11, dtype=torch.float64) + 0.5
    keep = torch.rand(3, 11) >= masked
    d = torch.randn(3, 11, 2, dtype=torch.float64).unbind(2)
    expected = grads(lambda z: logprob(z, target[keep], t[keep], entropy=True), z[keep], [x[keep] for x in d])
    whole = torch.full((3, 13, 123), torch.nan, dtype=torch.float64)
    whole[:, 1:12] = z.masked_fill(~keep[..., None], torch.nan)
    given_z = whole[:, 1:12] if sliced else whole[:, 1:12].contiguous()
    labels, heat = target.masked_fill(~keep, -100), t.masked_fill(~keep, torch.nan)
    hidden_gradients = [x.masked_fill(~keep, torch.nan) for x in d]
    with pytest.MonkeyPatch.context() as patch:
        set_chunk(patch, 123, 10, block, itemsize=8)
        for compacts in (selection.compacts, lambda device: False):
            patch.setattr(selection, "compacts", compacts)
            found = grads(lambda z: logprob(z, labels, heat, entropy=True, mask=keep), given_z, hidden_gradients)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x[keep], y, rtol=1e-12, atol=1e-12)
                assert not x[~keep].any()


def test_logprob_gradcheck():
    z, target = scores_case("random", torch.float64, (4,), 5)
    keep = torch.tensor([1, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda z: logprob(z, target, 0.7, True, keep)[:2], z.requires_grad_())


# ------------------------------------------------------------------------------------------------ bad input


def good():
    return {"hidden": torch.randn(6, 4), "weight": torch.randn(5, 4), "target": torch.randint(5, (6,))}


BAD_HEAD = [
    ({"hidden": torch.randn(4)}, ValueError, r"hidden: expected shape \[N, H\] or \[B, T, H\]; got \(4,\)"),
    ({"hidden": torch.randint(5, (6, 4))}, TypeError, r"hidden: expected float32.*; got torch.int64"),
    ({"hidden": [1.0]}, TypeError, r"hidden: expected a torch.Tensor; got list"),
    ({"weight": torch.randn(5, 3)}, ValueError, r"weight: expected shape \[V, 4\].*; got \(5, 3\)"),
    ({"weight": torch.randn(0, 4)}, ValueError, r"weight: expected shape \[V, 4\] with V >= 1.*; got \(0, 4\)"),
    (
        {"weight": torch.randn(5, 4).bfloat16()},
        TypeError,
        r"weight: expected dtype torch.float32.*; got torch.bfloat16",
    ),
    ({"bias": torch.randn(5).double()}, TypeError, r"bias: expected dtype torch.float32.*; got torch.float64"),
    ({"bias": torch.randn(4)}, ValueError, r"bias: expected shape \(5,\).*; got \(4,\)"),
    ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target: expected shape \(6,\).*; got \(5,\)"),
    ({"target": torch.zeros(6)}, TypeError, r"target: expected int64 labels; got torch.float32"),
    ({"target": torch.tensor([0, 1, 2, 5, 0, 0])}, ValueError, r"target: expected labels in \[0, 5\).*; got 5"),
    ({"target": torch.tensor([0, 1, 2, -100, 0, 0])}, ValueError, r"target: expected labels in \[0, 5\).*; got -100"),
    ({"mask": torch.ones(5)}, ValueError, r"mask: expected shape \(6,\) like target; got \(5,\)"),
    ({"mask": [True] * 6}, TypeError, r"mask: expected a torch.Tensor or None; got list"),
    ({"temperature": 0.0}, ValueError, r"temperature: expected a finite number above 0; got 0"),
    ({"temperature": float("nan")}, ValueError, r"temperature: expected a finite number above 0; got nan"),
    ({"temperature": "hot"}, TypeError, r"temperature: expected a number; got str"),
    ({"temperature": torch.ones(5)}, ValueError, r"temperature: expected a number or shape \(6,\).*; got shape \(5,\)"),
    ({"temperature": -torch.ones(6)}, ValueError, r"temperature: expected values above 0"),
    ({"temperature": torch.ones(6, requires_grad=True)}, ValueError, r"temperature: expected a constant"),
    ({"softcap": -1.0}, ValueError, r"softcap: expected a finite number above 0; got -1"),
    ({"softcap": torch.ones(2)}, ValueError, r"softcap: expected a number or a 0-d tensor; got shape \(2,\)"),
    ({"logit_scale": float("inf")}, ValueError, r"logit_scale: expected a finite number; got inf"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_HEAD)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_bad_head_input(change, error, message, name):
    call = algorithm.linear_logprob if name == "reference" else linear_logprob
    with pytest.raises(error, match=message):
        call(**{**good(), **change})
    if name == "auto" and not {"target", "mask"} & set(change):
        inputs = {**good(), **change}
        batch = TokenBatch(inputs.pop("target"), torch.tensor([0, 6]), advantage=torch.ones(6))
        with pytest.raises((error, AttributeError, ValueError)):
            linear_policy_loss(inputs.pop("hidden"), inputs.pop("weight"), batch, Objective(), **inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.randn(5)}, ValueError, r"logits: expected shape \[N, V\] or \[B, T, V\].*; got \(5,\)"),
        ({"logits": torch.randn(6, 0)}, ValueError, r"logits: expected shape .* with V >= 1; got \(6, 0\)"),
        (
            {"target": torch.zeros(2, 3, dtype=torch.int64)},
            ValueError,
            r"target: expected shape \(6,\).*; got \(2, 3\)",
        ),
        ({"target": torch.full((6,), 5)}, ValueError, r"target: expected labels in \[0, 5\)"),
        ({"mask": torch.ones(2)}, ValueError, r"mask: expected shape \(6,\)"),
        ({"temperature": -1.0}, ValueError, r"temperature: expected a finite number above 0; got -1"),
    ],
)
@pytest.mark.parametrize("call", [logprob, algorithm.logprob])
def test_bad_logits_input(change, error, message, call):
    with pytest.raises(error, match=message):
        call(**{"logits": torch.randn(6, 5), "target": torch.zeros(6, dtype=torch.int64), **change})


@pytest.mark.parametrize("where", ["linear_policy_loss", "folded"])
def test_bad_labels_in_a_folded_loss(where):
    inputs = good()
    inputs["target"][3] = 5
    batch = TokenBatch(inputs["target"], torch.tensor([0, 6]), advantage=torch.ones(6))
    call = linear_policy_loss if where == "linear_policy_loss" else algorithm.folded
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 5\) on unmasked rows; got 5"):
        call(inputs["hidden"], inputs["weight"], batch, Objective())


def test_hidden_must_have_the_shape_of_the_batch():
    batch = TokenBatch(torch.zeros(2, 3, dtype=torch.int64), advantage=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"hidden: expected shape \(2, 3, 'H'\).*; got \(6, 4\)"):
        linear_policy_loss(torch.randn(6, 4), torch.randn(5, 4), batch, Objective())


def test_missing_fields_are_named():
    batch = TokenBatch(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"batch\.advantage"):
        linear_policy_loss(torch.randn(6, 4), torch.randn(5, 4), batch, Objective())


def test_int32_labels_are_labels():
    inputs = good()
    expected = linear_logprob(**inputs).logp
    assert torch.equal(linear_logprob(**{**inputs, "target": inputs["target"].int()}).logp, expected)
