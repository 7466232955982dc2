"""The custom ops obey torch's rules, compile whole, and recompile for nothing that changes from step to step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from vocab_head_cases import make

from rlcore.algorithms.objective import KL, TIS, Objective
from rlcore.layout import TokenBatch
from rlcore.ops import vocab_head_raw as raw
from rlcore.ops.vocab_head import linear_logprob, linear_policy_loss, logprob

H, V = 8, 19


def head(N=11, bias=True, mask=True, rows=True, softcap=True, dtype=torch.float32):
    """Flat inputs of the raw ops: hidden, weight, bias, target, mask, temperature, softcap, logit_scale."""
    number = lambda x: torch.tensor(x)  # noqa: E731
    return [
        torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype), torch.randn(V, dtype=dtype) if bias else None,
        torch.randint(V, (N,)), torch.rand(N) < 0.7 if mask else None, torch.rand(N) + 0.5 if rows else number(0.7),
        number(5.0) if softcap else None, number(1.5),
    ]  # fmt: skip


SPARSE = {"bias": False, "mask": False, "rows": False, "softcap": False}


@pytest.mark.parametrize("options", [{}, SPARSE, {"dtype": torch.bfloat16}, {"N": 0, **SPARSE}])
def test_opcheck_logprob(options):
    inputs = head(**options)
    N = inputs[0].shape[0]
    torch.library.opcheck(raw.linear_logprob_forward, (*inputs, True))
    torch.library.opcheck(raw.linear_logprob_forward, (*inputs, False, None, False, True))
    torch.library.opcheck(raw.linear_logprob_frozen, inputs)
    stats = list(raw.linear_logprob_forward(*inputs, True)[:4])
    for d_entropy, needs in ((torch.randn(N), [True, True, True]), (None, [True, False, False]), (None, [False] * 3)):
        torch.library.opcheck(raw.linear_logprob_backward, (*inputs, stats, torch.randn(N), d_entropy, needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_opcheck_logprob_from_logits(shape, dtype):
    logits, target = torch.randn(*shape, V, dtype=dtype), torch.randint(V, shape).reshape(-1)
    N = target.shape[0]
    inputs = (logits, target, torch.rand(N) < 0.7, torch.rand(N) + 0.5)
    torch.library.opcheck(raw.logprob_forward, (*inputs, True))
    torch.library.opcheck(raw.logprob_forward, (*inputs, False, True))
    stats = list(raw.logprob_forward(*inputs, True)[:4])
    torch.library.opcheck(raw.logprob_backward, (*inputs, stats, torch.randn(N), torch.randn(N)))
    torch.library.opcheck(raw.logprob_backward, (*inputs, stats, torch.randn(N), None))


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]])
@pytest.mark.parametrize("objective", [Objective(), Objective("sequence", entropy=0.1, kl=KL(), correction=TIS())])
def test_opcheck_folded(objective, needs):
    hidden, weight, bias, target, mask, temperature, softcap, logit_scale = head()
    batch = batch_of(target, mask)
    inputs = (hidden, weight, bias, temperature, softcap, logit_scale, objective.key, list(objective.numbers),
              batch.tensors(), False, needs)  # fmt: skip
    torch.library.opcheck(raw.linear_policy_loss, inputs)


def batch_of(target, mask):
    N = target.shape[0]
    fields = {name: -torch.rand(N) for name in ("advantage", "old_logp", "ref_logp", "rollout_logp")}
    return TokenBatch(target, torch.tensor([0, 3, 3, N]), mask=mask, **fields)


def steps(count):
    """Inputs of one step after another: another length, temperature, cap, scale and set of bounds each time."""
    weight, bias = torch.randn(V, H, requires_grad=True), torch.randn(V, requires_grad=True)
    for i in range(count):
        hidden, _, _, target, mask, temperature, *_ = head(N=11 + i)
        objective = Objective(
            clip=(0.1 + 0.01 * i, 0.2 + 0.01 * i),
            entropy=0.1 + 0.01 * i,
            kl=KL("k3", 0.1 * i),
            correction=TIS(1 + 0.1 * i),
        )
        numbers = (1.0 + 0.05 * i, 4.0 + 0.1 * i, 1.0 + 0.02 * i)
        yield [hidden.requires_grad_(), weight, bias], target, mask, temperature, numbers, objective


def recompute(leaves, target, mask, temperature, numbers, objective):
    hidden, weight, bias = leaves
    out = linear_logprob(hidden, weight, target, bias, *numbers, entropy=True, mask=mask)
    return out.logp.sum() + (out.entropy * temperature).sum()


def frozen(leaves, target, mask, temperature, numbers, objective):
    hidden, weight, bias = leaves
    scaled = linear_logprob(hidden, weight.detach(), target, bias.detach(), temperature, *numbers[1:], mask=mask)
    return (scaled.logp * temperature).sum()


def folded(leaves, target, mask, temperature, numbers, objective):
    hidden, weight, bias = leaves
    fields = dict.fromkeys(("advantage", "old_logp", "ref_logp", "rollout_logp"), temperature - 1)
    batch = TokenBatch(target, torch.tensor([0, 3, 3, target.shape[0]]), mask=mask, **fields)
    loss, metrics = linear_policy_loss(hidden, weight, batch, objective, bias, *numbers)
    return loss + 0 * metrics["clip_fraction"]


def from_logits(leaves, target, mask, temperature, numbers, objective):
    hidden, weight, bias = leaves
    out = logprob(hidden @ weight.t() + bias, target, numbers[0], True, mask)
    return out.logp.sum() + out.entropy.sum()


def compare(f, backend, count):
    """Compiled against eager over `count` steps; the number of graphs after the first two steps and at the end."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    settled = 0
    for i, step in enumerate(steps(count)):
        found, expected = compiled(*step), f(*step)
        leaves = [x for x in step[0] if f is not frozen or x is step[0][0]]
        found_gradients, expected_gradients = (torch.autograd.grad(x, leaves) for x in (found, expected))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_gradients, expected_gradients)
        settled = counter.frame_count if i == 1 else settled
    return settled, counter.frame_count


@pytest.mark.parametrize("f", [recompute, frozen, folded, from_logits])
def test_compiles_whole_and_recompiles_for_no_new_value(f):
    """The second step tells dynamo which sizes and numbers change; twenty more change nothing."""
    settled, at_the_end = compare(f, "aot_eager", 22)
    assert at_the_end == settled


@pytest.mark.parametrize(
    "f", [folded, *(pytest.param(f, marks=pytest.mark.slow) for f in (recompute, frozen, from_logits))]
)
def test_compiles_with_inductor(f):
    compare(f, "inductor", 3)


def test_bad_labels_raise_from_compiled_code():
    case = make(H=H, V=V)
    case.target[3] = V
    f = torch.compile(lambda h, w, y: linear_logprob(h, w, y).logp, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="target: expected labels"):
        f(case.hidden, case.weight, case.target)
