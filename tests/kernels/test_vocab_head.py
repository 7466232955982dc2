"""The vocabulary head's Triton kernels against the oracle, on a GPU or in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vocab_head_cases import (
    DATA,
    SETTINGS,
    Case,
    check_forward,
    check_further,
    check_gradients,
    coefficients,
    gradients_of,
    make,
)

import rlcore as rl
from accuracy import assert_accurate, to_float64
from oracles import vocab_head as oracle
from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.vocab_head_passes import Coefficients, RowStatistics, Scale

pytest.importorskip("triton")

LOW = (torch.bfloat16, torch.float16)
SMALL = {"shape": (7,), "H": 9, "V": 75}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of two whole blocks and a part; chunks of four rows."""
    from rlcore.kernels import vocab_head as kernels

    monkeypatch.setattr(kernels, "BLOCK", 32)
    monkeypatch.setattr(kernels, "GRADIENT_BLOCK", 32)
    for device in ("cpu", "default"):
        monkeypatch.setitem(selection.CHUNK_BYTES, device, 4 * 75 * 4)


@pytest.fixture
def rows_stay(monkeypatch):
    """As on a GPU: dropped rows stay in the products."""
    monkeypatch.setattr(selection, "compacts", lambda device: False)


def there(case: Case, device: str) -> Case:
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return Case(**{name: move(x) for name, x in vars(case).items()})


def run(case: Case, device: str, entropy: bool = True):
    """(logp, entropy, gradients) of the Triton backend, on the CPU again."""
    moved = there(case, device).fresh()
    with rl.backend("triton"):
        out = rl.linear_logprob(moved.hidden, moved.weight, moved.target, entropy=entropy, **moved.kwargs())
        d = [x.to(device) for x in coefficients(case)]
        gradients = gradients_of(*out[:2], moved.leaves, *d)
    return out.logp.cpu(), out.entropy.cpu() if entropy else None, [x.cpu() for x in gradients]


CASES = [("random", setting, torch.float32) for setting in SETTINGS]
CASES += [(data, setting, torch.float32) for data in DATA if data != "random" for setting in ("bias", "rows")]
CASES += [("peaked", "cold", dtype) for dtype in (torch.float32, *LOW, torch.float64)]


@pytest.mark.parametrize(("data", "setting", "dtype"), CASES)
def test_accuracy(device, data, setting, dtype):
    case = make(data, setting, dtype, shape=(13,), H=9, V=75, masked=0.2)
    logp, entropy, gradients = run(case, device)
    check_forward(case, logp, entropy)
    check_gradients(case, gradients)


def test_runs_are_equal_to_the_last_bit(device):
    case = make("random", "rows", **SMALL)
    for x, y in zip(run(case, device)[2], run(case, device)[2], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("V", [1, 31, 32, 96])
def test_vocabularies_around_a_block(device, V):
    case = make("random", "rows", shape=(1, 3), H=5, V=V)
    logp, entropy, gradients = run(case, device)
    check_forward(case, logp, entropy)
    check_gradients(case, gradients)


def test_logp_alone(device, rows_stay):
    case = make("peaked", "softcap", **SMALL)
    logp, _, gradients = run(case, device, entropy=False)
    check_forward(case, logp, None)
    check_gradients(case, gradients, with_entropy=False)


@pytest.mark.parametrize(("data", "setting", "dtype"), [
    ("random", "rows", torch.float32), ("peaked", "softcap", LOW[0]), ("forbidden", "bias", torch.float32),
    ("flat", "plain", LOW[1]), ("random", "bias", torch.float64),
])  # fmt: skip
def test_statistics(device, data, setting, dtype, rows_stay):
    """The likeliest token, its log-prob and sum p^2; logp and entropy are the same bits as without."""
    case = make(data, setting, dtype, masked=0.3, **SMALL)
    case.hidden[~case.mask], case.target[~case.mask] = torch.nan, -100
    moved = there(case, device)
    head = (moved.hidden, moved.weight, moved.target)
    with rl.backend("triton"):
        plain, out = (rl.linear_logprob(*head, entropy=True, statistics=x, **moved.kwargs()) for x in (False, True))
    assert torch.equal(plain.logp, out.logp) and torch.equal(plain.entropy, out.entropy) and plain.top1 is None
    check_further(replace(case, hidden=case.hidden.nan_to_num()), *(x.cpu() for x in out[2:]))


def test_statistics_of_logits_that_exist(device):
    """Of equals the lowest, in one block or two; p -> 1; forbidden entries first; masked rows are zeros."""
    logits = torch.randn(5, 75)
    logits[0, [9, 20, 50]], logits[1, [40, 70]], logits[2, 74] = 9.0, 9.0, 80.0
    logits[3, :40], logits[4] = -torch.inf, torch.nan
    target, mask = torch.tensor([9, 70, 74, 50, -100]), torch.tensor([1, 1, 1, 1, 0])
    with rl.backend("triton"):
        out = rl.logprob(logits.to(device), target.to(device), mask=mask.to(device), statistics=True)
    log_p = logits[:4].double().log_softmax(1)
    assert out.top1.tolist() == [9, 40, 74, int(log_p[3].argmax()), 0]
    assert torch.equal(out.top1_logp[:3], out.logp[:3]) and out.sum_sq[2] == 1
    assert_accurate(out.top1_logp[:4], log_p.amax(1))
    assert_accurate(out.sum_sq[:4], log_p.exp().square().sum(1))
    assert out.top1_logp[4] == out.sum_sq[4] == 0


def test_masked_rows_never_matter(device, rows_stay):
    clean = make("random", "rows", masked=0.5, **SMALL)
    dirty = replace(clean, hidden=clean.hidden.clone(), target=clean.target.clone())
    dirty.hidden[~clean.mask] = torch.nan
    dirty.target[~clean.mask] = -100
    dirty.temperature = clean.temperature.masked_fill(~clean.mask, torch.nan)
    for x, y in zip(run(clean, device), run(dirty, device), strict=True):
        for a, b in zip(x, y, strict=True) if isinstance(x, list) else [(x, y)]:
            assert torch.equal(a, b) and b.isfinite().all()


def test_strided_inputs(device):
    """Every second row of hidden, labels and temperatures, a transposed weight: as good as compact ones."""
    case = make("random", "rows", **SMALL)
    apart = replace(case, hidden=case.hidden.repeat_interleave(2, 0)[::2], target=case.target.repeat_interleave(2)[::2],
                    weight=case.weight.t().contiguous().t(),
                    temperature=case.temperature.repeat_interleave(2)[::2])  # fmt: skip
    assert not apart.hidden.is_contiguous() and not apart.weight.is_contiguous()
    moved = there(apart, device)
    with rl.backend("triton"):
        out = rl.linear_logprob(moved.hidden, moved.weight, moved.target, entropy=True, **moved.kwargs())
    check_forward(case, out.logp.cpu(), out.entropy.cpu())


def test_head_and_policy_loss_compile_whole(device):
    case = there(make("random", "bias", **SMALL), device).fresh()
    batch = rl.TokenBatch(case.target, torch.tensor([0, 7], device=device), advantage=torch.randn(7, device=device))

    def loss(hidden, weight, bias):
        out = rl.linear_logprob(hidden, weight, case.target, bias, entropy=True)
        return rl.policy_loss(out.logp, batch, rl.Objective(entropy=0.1), out.entropy)[0]

    found = []
    with rl.backend("triton"):
        for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            value = run(*case.leaves)
            found.append([value.detach(), *torch.autograd.grad(value, case.leaves)])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_no_rows(device):
    case = make(shape=(0,), H=4, V=40)
    logp, entropy, (d_hidden, d_weight) = run(case, device)
    assert logp.shape == entropy.shape == (0,) and d_hidden.shape == (0, 4) and not d_weight.any()


# ------------------------------------------------------------------------------------------------ logits that exist


def stored(scores, layout):
    """Scores [B, T, V] as they may lie in memory."""
    if layout == "slice of T":
        return torch.cat((scores, scores[:, :2]), 1)[:, : scores.shape[1]]
    if layout == "T first":
        return (scores.transpose(0, 1) * 1).contiguous().transpose(0, 1)
    if layout == "V first":
        return (scores.transpose(1, 2) * 1).contiguous().transpose(1, 2)
    return scores * 1


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("layout", "dtype"), [
    ("rows", torch.float32), ("rows", torch.float16), ("slice of T", torch.bfloat16), ("T first", torch.float32),
    ("V first", torch.bfloat16), ("slice of T", torch.float64),
])  # fmt: skip
def test_logprob(device, layout, dtype, in_place):
    B, T, V = 2, 4, 75
    scores = (torch.randn(B, T, V, dtype=torch.float64) * 3).to(dtype)
    keep = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]).bool()
    scores[~keep] = torch.nan
    target = torch.randint(V, (B, T)).masked_fill(~keep, -100)
    heat = torch.rand(B, T) + 0.5
    d = [torch.randn(B, T, dtype=torch.float64) for _ in range(2)]
    for x in d:
        x[0, 1] = 0.0  # a row without a gradient
    leaf = scores.to(device).requires_grad_()
    logits = stored(leaf, layout)
    with rl.backend("triton"):
        out = rl.logprob(logits, target.to(device), heat.to(device), True, keep.to(device), inplace_backward=in_place)
        gradient = torch.autograd.grad(out[:2], leaf, [x.to(device, out.logp.dtype) for x in d])[0].cpu()
    head = oracle.Head(to_float64(scores.nan_to_num()).reshape(-1, V), torch.eye(V, dtype=torch.float64).numpy(),
                       target.reshape(-1).numpy(), temperature=to_float64(heat).reshape(-1),
                       mask=keep.reshape(-1).numpy())  # fmt: skip
    logp, entropy = head.forward()
    assert_accurate(out.logp, logp.reshape(B, T))
    assert_accurate(out.entropy, entropy.reshape(B, T))
    assert gradient.dtype == dtype and not gradient[~keep].any() and not gradient[0, 1].any()
    d_hidden, _, _ = head.backward(*(x.reshape(-1).numpy() for x in d))
    assert_accurate(gradient, d_hidden.reshape(B, T, V), gradient=True)


def test_logprob_without_a_mask(device):
    """Nothing stands between the kernel's outputs and the custom op's, which may share no memory."""
    logits, target = torch.randn(3, 40) * 3, torch.tensor([0, 39, 7])
    with rl.backend("triton"):
        out = rl.logprob(logits.to(device), target.to(device), entropy=True)
    log_p = logits.double().log_softmax(1)
    assert_accurate(out.logp, log_p[torch.arange(3), target])
    assert_accurate(out.entropy, -(log_p.exp() * log_p).sum(1))


# ------------------------------------------------------------------------------------------------ the passes


def passes_input(device, dtype=torch.float32, n=5, V=75):
    logits = torch.randn(n, V, dtype=torch.float64) * 4
    logits[1, 7] = 60.0  # p -> 1
    target = torch.tensor([3, 7, 0, V - 1, 40])
    scale = Scale(torch.tensor(0.8), torch.tensor(30.0), torch.tensor(-1.1), torch.randn(V))
    d = Coefficients(torch.randn(n), torch.randn(n))
    d.logp[2] = d.entropy[2] = 0.0
    move = lambda xs: type(xs)(*(None if x is None else x.to(device) for x in xs))  # noqa: E731
    return logits.to(device, dtype), target.to(device), move(scale), move(d)


def test_passes_equal_those_of_torch(device):
    """With a bias, a softcap and a negative scale: the numbers of the passes that every backend is tested against."""
    from rlcore.ops.vocab_head_triton import TRITON

    logits, target, scale, d = passes_input(device)
    before = logits.clone()
    found = TRITON.statistics(logits, target, scale, True)
    assert torch.equal(logits, before)
    wide = Scale(*(x.double() for x in scale))
    expected = reference.statistics_(logits.double(), target, wide, True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=2e-6)
    gradient, rows = TRITON.gradient(logits, target, found, d, scale, raw=False, drop=True)
    d64 = Coefficients(d.logp.double(), d.entropy.double())
    exact, _ = reference.gradient_(before.double(), target, expected, d64, wide, raw=True)
    assert rows == slice(0, 5) and gradient.data_ptr() == logits.data_ptr() and not gradient[2].any()
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", LOW)
def test_a_narrow_gradient_takes_the_front_of_each_row(device, dtype):
    """Written over the logits it is that in memory of its own, rounded once."""
    from rlcore.kernels import vocab_head as kernels

    logits, target, scale, d = passes_input(device)
    args = (scale.bias, scale.temperature, scale.softcap, scale.logit_scale)
    stats = kernels.statistics(logits, target, *args, True)
    apart = kernels.gradient(logits, torch.empty_like(logits), target, *args, stats, *d)
    over = kernels.gradient(logits, kernels.narrower(logits, dtype), target, *args, stats, *d)
    assert over.dtype == dtype and torch.equal(over, apart.to(dtype))
    assert (over.data_ptr() == logits.data_ptr()) == (torch.version.hip is None)


def test_on_amd_a_narrow_gradient_has_memory_of_its_own(monkeypatch):
    from rlcore.kernels import vocab_head as kernels

    logits = torch.empty(3, 5)
    assert kernels.narrower(logits, torch.bfloat16).data_ptr() == logits.data_ptr()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels.narrower(logits, torch.bfloat16).data_ptr() != logits.data_ptr()
    assert kernels.narrower(logits, torch.float32) is logits


def test_labels_out_of_range_and_numbers_that_are_none(device):
    """NaN, never a plausible number; a row without a coefficient is zero even then."""
    from rlcore.ops.vocab_head_triton import TRITON

    logits, target, scale, d = passes_input(device)
    target[0], target[2], target[4] = -100, 75, 2**40
    logits[3, 70] = torch.nan
    stats = TRITON.statistics(logits, target, scale, True)
    assert stats.logp.isnan().tolist() == [True, False, True, True, True]
    assert stats.entropy.isnan().tolist() == [False, False, False, True, False]
    gradient, _ = TRITON.gradient(logits, target, stats, d, scale, raw=True)
    assert gradient.isnan().all(1).tolist() == [True, False, False, True, True] and not gradient[2].any()


def test_a_label_of_another_shard_adds_nothing(device):
    from rlcore.ops.vocab_head_triton import TRITON

    logits, target, scale, d = passes_input(device)
    stats = TRITON.statistics(logits, target, scale, True)
    whole, _ = TRITON.gradient(logits.clone(), target, stats, d, scale, raw=True)
    for part in (slice(0, 40), slice(40, 75)):
        shard = scale._replace(bias=scale.bias[part])
        found, _ = TRITON.gradient(logits[:, part].clone(), target - part.start, stats, d, shard, raw=True)
        assert torch.equal(found, whole[:, part])


def test_the_first_logits_may_all_be_forbidden(device):
    """-inf, or the lowest number, in a whole block before anything finite."""
    from rlcore.ops.vocab_head_triton import TRITON

    logits, target, _, _ = passes_input(device)
    logits[:2, :40], logits[2:, :40] = -torch.inf, torch.finfo(torch.float32).min
    target[:] = 50
    one = torch.ones((), device=device)
    found = TRITON.statistics(logits, target, Scale(one, None, one), True)
    expected = reference.statistics_(logits.double(), target, Scale(one, None, one), True)
    for x, y in zip(found, RowStatistics(*expected), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ on a GPU alone

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_nothing_waits_for_the_gpu(dtype):
    case = there(make("peaked", "rows", dtype, masked=0.3), "cuda").fresh()
    d = [x.cuda() for x in coefficients(make())]
    batch = rl.TokenBatch(case.target, torch.tensor([0, 20, 47]).cuda(), case.mask, advantage=torch.randn(47).cuda())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = rl.linear_logprob(case.hidden, case.weight, case.target, entropy=True, **case.kwargs())
        found = gradients_of(*out[:2], case.leaves, *d)
        scores = rl.logprob(case.hidden @ case.weight.t(), case.target, entropy=True, mask=case.mask)
        loss, _ = rl.linear_policy_loss(case.hidden, case.weight, batch, rl.Objective(), case.bias, **case.numbers())
        folded = torch.autograd.grad(loss, case.leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in (*out[:2], *found, *scores[:2], loss, *folded))


@on_a_gpu
def test_in_a_cuda_graph():
    case = there(make("random", "bias", torch.bfloat16, masked=0.3), "cuda")

    def step():
        again = case.fresh()
        out = rl.linear_logprob(again.hidden, again.weight, again.target, entropy=True, **again.kwargs())
        return [*out[:2], *torch.autograd.grad(out[:2], again.leaves, [torch.ones_like(x) for x in out[:2]])]

    expected = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@on_a_gpu
def test_more_logits_than_32_bits_count(monkeypatch):
    from rlcore.kernels import vocab_head as kernels

    monkeypatch.undo()
    n, V = 16400, 131072
    logits = torch.zeros(n, V, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.randn(V, device="cuda")
    target, one = torch.full((n,), 5, device="cuda"), torch.ones((), device="cuda")
    stats = kernels.statistics(logits, target, None, one, None, one, True)
    log_p = logits[-1].double().log_softmax(0)
    torch.testing.assert_close(stats[2][-1].double(), log_p[5], rtol=1e-6, atol=1e-6)
    d = torch.ones(n, device="cuda")
    kernels.gradient(logits, logits, target, None, one, None, one, stats, d, None)
    expected = -log_p.exp()
    expected[5] += 1
    torch.testing.assert_close(logits[-1].double(), expected, rtol=2**-7, atol=1e-8)
