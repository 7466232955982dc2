"""The CUDA row passes of the vocabulary head against the oracle, on a GPU or emulated."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from policy_loss_cases import make_batch, make_objective, rich
from torch import Tensor
from vocab_head_cases import (
    DATA,
    SETTINGS,
    check_forward,
    check_further,
    check_gradients,
    coefficients,
    gradients_of,
    make,
)

import rlcore as rl
from accuracy import assert_accurate
from oracles import vocab_head as oracle
from rlcore.algorithms.vocab_head_passes import Coefficients, Scale
from rlcore.ops import vocab_head_cuda as passes
from rlcore.ops.vocab_head_cuda import TYPES

NAN = torch.nan


def to(case, device):
    """The case with its tensors on a device."""
    found = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{name: x.to(device) for name, x in found.items() if isinstance(x, Tensor)})


def run(case, device):
    """(logp, entropy, gradients) through the public op, on the CPU."""
    there = to(case, device).fresh()
    with rl.backend("cuda"):
        out = rl.linear_logprob(there.hidden, there.weight, there.target, entropy=True, **there.kwargs())
        gradients = gradients_of(*out[:2], there.leaves, *(x.to(device) for x in coefficients(case)))
    return out.logp.cpu(), out.entropy.cpu(), [x.cpu() for x in gradients]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("data", DATA)
def test_linear_logprob(data, setting, device):
    case = make(data, setting, shape=(7,), masked=0.2)
    logp, entropy, gradients = run(case, device)
    check_forward(case, logp, entropy)
    check_gradients(case, gradients)


def test_backward_outside_of_the_block(device, monkeypatch):
    case, ran = to(make("random", "rows", shape=(7,)), device).fresh(), []
    write = passes.write_gradient
    monkeypatch.setattr(passes, "write_gradient", lambda *x: (ran.append(1), write(*x)))
    with rl.backend("cuda"):
        out = rl.linear_logprob(case.hidden, case.weight, case.target, **case.kwargs())
    torch.autograd.grad(out.logp.sum(), case.leaves)
    assert ran


def test_statistics(device, monkeypatch):
    """The copies that torch works on are of two rows each."""
    monkeypatch.setattr(passes, "COPY_BYTES", 2 * 123 * 4)
    case = to(make("peaked", "rows", shape=(7,), masked=0.2), device)
    with rl.backend("cuda"):
        out = rl.linear_logprob(case.hidden, case.weight, case.target, statistics=True, **case.kwargs())
    check_further(to(case, "cpu"), *(x.cpu() for x in out[2:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_logprob_of_16_bits(dtype, device):
    case = make("random", "rows", dtype, shape=(5,))
    logp, entropy, gradients = run(case, device)
    check_forward(case, logp, entropy)
    check_gradients(case, gradients)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_linear_policy_loss(ratio, device):
    """The folded head, whose coefficients are those of the policy loss's kernels."""
    head = make("random", "rows", shape=(18,))
    case = rich(ratio, "ppo", "seq_mean_token_mean", lengths=(4, 1, 0, 7, 6))
    objective = make_objective(case)
    _, _, batch = make_batch(case, torch.float32)
    batch = batch.derived(target=head.target)
    found = []
    for name, where in (("reference", "cpu"), ("cuda", device)):
        there = to(head, where).fresh()
        with rl.backend(name):
            loss, metrics = rl.linear_policy_loss(there.hidden, there.weight, batch.to(where), objective,
                                                  bias=there.bias, **there.numbers())  # fmt: skip
            found.append((loss.detach(), *torch.autograd.grad(loss, there.leaves), metrics))
    for x, y in zip(found[0][:-1], found[1][:-1]):
        torch.testing.assert_close(y.cpu(), x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))
    for key, value in found[0][-1].items():
        torch.testing.assert_close(found[1][-1][key].cpu(), value, rtol=1e-4, atol=1e-5, msg=key)


# ---- the passes by themselves


def rows(n: int, V: int, dtype=torch.float32, spread: float = 4.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(n, V, generator=g, dtype=torch.float64)).to(dtype)


class Identity:
    """The weight of a head whose hidden states are its logits."""

    def __matmul__(self, x):
        return x


def expected(a: Tensor, target: Tensor, temperature: Tensor, softcap, logit_scale, d_logp, d_entropy):
    """(logp, entropy, d raw logits) of the oracle."""
    n = a.shape[0]
    head = oracle.Head(a.double().numpy(), Identity(), target.numpy(), None, temperature.double().expand(n).numpy(),
                       softcap, logit_scale)  # fmt: skip
    logp, entropy = head.forward()
    return logp, entropy, torch.stack([torch.from_numpy(head.d_raw(i, d_logp[i].item(), d_entropy[i].item()))
                                       for i in range(n)])  # fmt: skip


def scale_of(temperature: Tensor, softcap, logit_scale, device) -> Scale:
    cap = None if softcap is None else torch.tensor(softcap)
    return Scale(temperature.to(device), cap, torch.tensor(logit_scale))


def both_passes(a: Tensor, target: Tensor, scale: Scale, d: Coefficients, device: str, out=None):
    """Statistics and d logits (in place without `out`) of logits that lie on the device already."""
    with rl.backend("cuda"):
        stats = passes.statistics_(a, target.to(device), scale, True)
        out = a if out is None else out
        passes.write_gradient(a, target.to(device), stats, Coefficients(*(x.to(device) for x in d)), scale, out)
    return stats, out


# Vectors of four and eight, their remainders, one row's worth of every loop (512 threads of 16 logits), two slices.
SIZES = (1, 3, 4, 31, 2049, 8192 + 2048 + 5, 16384 + 9)


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sizes(dtype, V, device):
    a, target = rows(3, V, dtype), torch.tensor([0, V - 1, V // 2])
    temperature = torch.tensor([0.7, 1.0, 2.0])
    d = Coefficients(torch.tensor([0.5, -2.0, 0.0]), torch.tensor([1.5, 0.0, -0.3]))
    logp, entropy, d_raw = expected(a, target, temperature, None, 1.25, *d)
    stats, found = both_passes(a.to(device), target, scale_of(temperature, None, 1.25, device), d, device)
    assert_accurate(stats.logp.cpu(), logp)
    assert_accurate(stats.entropy.cpu(), entropy)
    assert_accurate(found.cpu(), d_raw, d_raw.to(dtype), gradient=True)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bits_do_not_depend_on_where_rows_lie(dtype, start, device):
    V = 8192 + 100
    a, target = rows(2, V, dtype).to(device), torch.tensor([5, V - 1])
    scale = scale_of(torch.tensor(0.9), 7.0, 1.0, device)
    d = Coefficients(torch.tensor([1.0, -1.0]), torch.tensor([0.2, 0.1]))
    store = torch.full((2, V + 7), NAN, dtype=dtype, device=device)
    store[:, start : start + V] = a
    stats, found = both_passes(store[:, start : start + V], target, scale, d, device)
    for i in range(2):
        one = Coefficients(d.logp[i : i + 1], d.entropy[i : i + 1])
        single, alone = both_passes(a[i : i + 1].clone(), target[i : i + 1], scale, one, device)
        assert all(torch.equal(x[i : i + 1], y) for x, y in zip(stats, single))
        assert torch.equal(found[i], alone[0])
    assert store[:, :start].isnan().all() and store[:, start + V :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_gradient_of_float32_logits_in_16_bits(shift, dtype, device):
    V = 1003
    a, target, temperature = rows(3, V), torch.tensor([1, 2, 3]), torch.tensor(1.0)
    d = Coefficients(torch.tensor([0.5, -2.0, 0.0]), torch.tensor([0.1, 0.0, 0.0]))
    out = torch.full((3, V + 5), NAN, dtype=dtype, device=device)[:, shift : shift + V]
    _, found = both_passes(a.to(device), target, scale_of(temperature, 9.0, 1.0, device), d, device, out)
    _, whole = both_passes(a.to(device), target, scale_of(temperature, 9.0, 1.0, device), d, device)
    assert torch.equal(found, whole.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [1, 3, 7, 2048, 3 * 4096 + 5, 16384 + 9])
@pytest.mark.parametrize("shift", [0, 1])
def test_narrower_gradients_take_the_front_of_each_row(shift, V, dtype, device):
    """No second chunk: no thread writes what another has yet to read, and what is between rows stays."""
    a, target, temperature = rows(3, V), torch.tensor([0, V - 1, V // 2]), torch.tensor(1.0)
    d = Coefficients(*(x.to(device) for x in (torch.tensor([0.5, -2.0, 0.0]), torch.tensor([0.1, 0.0, 0.0]))))
    scale = scale_of(temperature, 9.0, 1.0, device)
    stats, whole = both_passes(a.clone().to(device), target, scale, d, device)
    store = torch.full((3, V + 5), NAN, device=device)
    z = store[:, shift : shift + V].copy_(a)
    found, kept = passes.gradient_(z, target.to(device), stats, d, scale, raw=True, dtype=dtype)
    assert found.data_ptr() == z.data_ptr() and kept == slice(0, 3)
    assert torch.equal(found, whole.to(dtype))
    assert store[:, :shift].isnan().all() and store[:, shift + V :].isnan().all()


def test_rows_without_a_coefficient_are_zeroed_and_not_read(device):
    V = 2100
    a = torch.full((4, V), NAN)
    a[1] = 0.0
    d = Coefficients(torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.zeros(4))
    target = torch.tensor([-100, 3, 0, V])
    for dtype in TYPES:
        scale = scale_of(torch.tensor(1.0), None, 1.0, device)
        _, found = both_passes(a.to(dtype).to(device), target, scale, d, device)
        assert (found[[0, 2, 3]] == 0).all() and found[1].isfinite().all()


def test_labels_out_of_range_and_rows_without_a_distribution(device):
    a = torch.zeros(6, 40)
    a[3], a[4, 7], a[5, 7] = -torch.inf, torch.inf, NAN
    target = torch.tensor([-1, 40, 39, 0, 7, 0])
    d = Coefficients(torch.ones(6), torch.zeros(6))
    stats, found = both_passes(a.to(device), target, scale_of(torch.tensor(1.0), None, 1.0, device), d, device)
    wrong = torch.tensor([True, True, False, True, True, True])
    assert torch.equal(stats.logp.isnan().cpu(), wrong)
    assert torch.equal(found.isnan().all(1).cpu(), wrong) and found[2].isfinite().all()


def test_digits_where_one_token_has_all_of_the_probability(device):
    a = torch.full((1, 5000), -21.0)
    a[0, 4321] = 0.0
    target, temperature = torch.tensor([4321]), torch.tensor(1.0)
    d = Coefficients(torch.ones(1), torch.zeros(1))
    logp, entropy, d_raw = expected(a, target, temperature, None, 1.0, *d)
    stats, found = both_passes(a.to(device), target, scale_of(temperature, None, 1.0, device), d, device)
    assert stats.logp.item() == pytest.approx(logp.item(), rel=1e-5)
    assert stats.entropy.item() == pytest.approx(entropy.item(), rel=1e-5)
    assert found[0, 4321].item() == pytest.approx(d_raw[0, 4321].item(), rel=1e-5)


def test_no_rows(device):
    a, target = torch.empty(0, 9, device=device), torch.empty(0, dtype=torch.int64)
    d = Coefficients(torch.empty(0), None)
    with rl.backend("cuda"):
        scale = scale_of(torch.tensor(1.0), None, 1.0, device)
        stats = passes.statistics_(a, target.to(device), scale, True)
        passes.write_gradient(a, target.to(device), stats, Coefficients(d.logp.to(device), None), scale, a)
    assert stats.logp.shape == (0,)


def test_other_dtypes_stay_with_torch(device):
    case = make("random", "plain", torch.float64, shape=(3,))
    logp, entropy, gradients = run(case, device)
    assert logp.dtype == torch.float64
    check_forward(case, logp, entropy)
    check_gradients(case, gradients)
