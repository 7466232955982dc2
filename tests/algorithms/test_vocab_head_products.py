"""The head's products in the weight's own low precision, as on a GPU, with stand-ins for the products themselves."""

from __future__ import annotations

import pytest
import torch
from vocab_head_cases import check_forward, check_gradients, coefficients, gradients_of, make

from rlcore.algorithms import vocab_head_chunks as chunks
from rlcore.algorithms import vocab_head_products as products
from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms import vocab_head_tiles as tiles
from rlcore.algorithms.objective import Objective
from rlcore.layout import TokenBatch
from rlcore.ops.vocab_head import linear_logprob, linear_policy_loss

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=["adds", "slices"])
def as_on_a_gpu(monkeypatch, request):
    """Rows stay, operands keep their dtype, results are float32; every product's operands and result are recorded.

    With torch's product that adds to float32 memory, and without.
    """
    seen = []

    def wide(a, b, out):
        seen.append((a.dtype, b.dtype, out.dtype))
        assert a.dtype == b.dtype
        dtype = torch.promote_types(a.dtype, torch.float32)
        return a.to(dtype) @ b.to(dtype)

    monkeypatch.setattr(products, "keeps_float32", lambda x: x.dtype in LOW)
    monkeypatch.setattr(products, "mm", lambda a, b, out: out.copy_(wide(a, b, out)))
    monkeypatch.setattr(products, "addmm", lambda a, b, out: out.add_(wide(a, b, out)))
    monkeypatch.setattr(products, "ADDS_TO_FLOAT32", request.param)
    monkeypatch.setattr(products, "PRODUCT_BYTES", 50 * 31 * 4)
    monkeypatch.setattr(selection, "compacts", lambda device: False)
    return seen


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("frozen", [False, True])
def test_no_operand_is_upcast_and_no_sum_rounded(as_on_a_gpu, frozen, dtype):
    case = make("peaked", "rows", dtype, masked=0.2).fresh()
    if frozen:
        case.weight.requires_grad_(False)
        case.bias.requires_grad_(False)
    out = linear_logprob(case.hidden, case.weight, case.target, entropy=not frozen, chunk_bytes=20 * 123 * 4,
                         **case.kwargs())  # fmt: skip
    leaves = [case.hidden] if frozen else case.leaves
    found = gradients_of(*out[:2], leaves, *coefficients(case))
    check_forward(case, out.logp, out.entropy)
    check_gradients(case, found, with_entropy=not frozen)
    # By tiles d weight is one product: of bfloat16 it may be rounded at once.
    at_once = set() if frozen or dtype == torch.float16 else {(dtype, dtype, dtype)}
    assert set(as_on_a_gpu) == {(dtype, dtype, torch.float32)} | at_once


@pytest.mark.parametrize("frozen", [False, True])
def test_d_hidden_is_float32_until_the_incoming_gradient_has_met_it(as_on_a_gpu, frozen):
    """Seen through autocast, which gives float32 leaves float32 gradients of a bfloat16 head."""
    case = make("random", "plain", torch.bfloat16)
    batch = TokenBatch(case.target, torch.tensor([0, 20, 47]), advantage=torch.randn(47))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden = case.hidden.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            if frozen:
                value = linear_logprob(hidden, case.weight, case.target).logp.sum()
            else:
                value, _ = linear_policy_loss(hidden, case.weight, batch, Objective("none", "reinforce"))
        found.append(torch.autograd.grad(3 * value, hidden)[0])
        assert found[-1].dtype == dtype
    assert torch.equal(found[0].bfloat16(), found[1])
    thirds = found[0] / 3
    assert (thirds.bfloat16().float() - thirds).abs().max() > 1e-4 * thirds.abs().max()


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("mode", ["chunks", "tiles", "frozen"])
def test_float16_gradients_of_any_size(as_on_a_gpu, mode, size):
    """d logits neither vanish nor overflow, whatever the incoming gradients are; d weight and d hidden hold these."""
    case = make("random", "bias", torch.float16, shape=(150,) if mode == "chunks" else (47,))
    if mode != "frozen":
        case.weight.requires_grad_()
    hidden = case.hidden.float().requires_grad_()  # a float32 leaf, so that its gradient has room for any size
    with torch.autocast("cpu", torch.float16):
        out = linear_logprob(hidden, case.weight, case.target, case.bias, chunk_bytes=40 * 123 * 4,
                             entropy=mode != "frozen", **case.numbers())  # fmt: skip
    d = [size * x.double() for x in coefficients(case)]
    if mode == "frozen":
        d[1] = 0 * d[1]
    terms = (out.logp * d[0]).sum() + (0 if out.entropy is None else (out.entropy * d[1]).sum())
    found = torch.autograd.grad(terms, hidden)[0].double().numpy()
    expected = case.oracle().backward(*(x.numpy() for x in d))[0]
    assert abs(found - expected).max() < 4e-3 * abs(expected).max()


@pytest.mark.parametrize("dtype", LOW)
def test_folded_gradients_keep_small_numbers_until_the_loss_scale_comes(as_on_a_gpu, dtype):
    case = make("random", "bias", dtype).fresh()
    batch = TokenBatch(case.target, torch.tensor([0, 20, 47]), advantage=torch.randn(47) * 1e-6)
    loss, _ = linear_policy_loss(case.hidden, case.weight, batch, Objective("none", "reinforce"), case.bias,
                                 chunk_bytes=20 * 123 * 4, **case.numbers())  # fmt: skip
    found = torch.autograd.grad(loss, case.leaves, torch.tensor(65536.0))
    d = -batch.advantage.double().numpy() / 47 * 65536
    expected = case.oracle().backward(d, 0 * d)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        assert abs(x.double().numpy() - y).max() < 0.02 * abs(y).max()


def test_a_budget_cuts_chunks_and_changes_no_number():
    case = make("random", "bias", torch.float64)
    seen = []
    original = chunks.logits_buffer

    def spy(weight, rows, dtype):
        seen.append(rows)
        return original(weight, rows, dtype)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "logits_buffer", spy)
        for budget in (None, 10 * 123 * 8, 1):
            again = case.fresh()
            out = linear_logprob(again.hidden, again.weight, again.target, again.bias, again.temperature,
                                 chunk_bytes=budget)  # fmt: skip
            results.append([out.logp, *torch.autograd.grad(out.logp.sum(), again.leaves)])
    assert seen == [47, 47, 10, 10, 1, 1]
    for found in results[1:]:
        for x, y in zip(found, results[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("budget", "error"), [(0, ValueError), (-5, ValueError), (1.5, TypeError), (True, TypeError)])
def test_budgets_that_are_none(budget, error):
    case = make()
    with pytest.raises(error, match="chunk_bytes"):
        linear_logprob(case.hidden, case.weight, case.target, chunk_bytes=budget)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [123, 50, 1])
def test_gradients_by_tiles_of_the_vocabulary(as_on_a_gpu, dtype, columns):
    """As on a GPU where rows are fewer than entries; d weight leaves the product in its own dtype."""
    case = make("peaked", "rows", dtype, masked=0.2).fresh()
    assert tiles.by_tiles(case.hidden, case.weight)
    out = linear_logprob(case.hidden, case.weight, case.target, entropy=True,
                         chunk_bytes=47 * columns * (8 if dtype == torch.float64 else 4), **case.kwargs())  # fmt: skip
    check_gradients(case, gradients_of(*out[:2], case.leaves, *coefficients(case)))


def test_rows_more_than_entries_go_by_chunks(as_on_a_gpu):
    case = make("random", "bias", shape=(150,)).fresh()
    out = linear_logprob(case.hidden, case.weight, case.target, case.bias, entropy=True, chunk_bytes=40 * 123 * 4,
                         **case.numbers())  # fmt: skip
    check_gradients(case, gradients_of(*out[:2], case.leaves, *coefficients(case)))


def test_chunks_of_a_gpu_are_whole_tiles_and_begin_aligned():
    """In 2.5 GiB with a float32 d hidden of 8,192 and 32,768 rows; as the caller says, whatever is held."""
    device = torch.device("meta")
    for N, rows in ((8192, 4096), (32768, 3328)):
        held = selection.held_bytes(torch.empty(N, 4096, dtype=torch.bfloat16, device=device), torch.float32)
        assert held == N * 4096 * 4
        assert selection.chunk_rows(151936, torch.float32, device, None, held) == rows
        assert rows * 151936 * 4 + held < 2.5 * 2**30
    assert selection.chunk_rows(151936, torch.float32, device, 2**29, 2**40) == 768
    assert selection.chunk_rows(151936, torch.float32, device, 2**29) == 768
    buffer = chunks.logits_buffer(torch.empty(50257, 4, device=device), 8, torch.float32)
    assert buffer.shape == (8, 50257) and buffer.stride() == (50304, 1)


@pytest.mark.parametrize(("n", "bound"), [(8192, 4096), (32768, 3328), (129, 128), (300, 256), (4000, 4096), (50, 20),
                                          (0, 128), (0, 0)])  # fmt: skip
def test_chunks_of_a_gpu_are_as_few_as_can_be_and_end_between_tiles(n, bound):
    for rows in (slice(7, 7 + n), torch.arange(n)):
        cut = list(selection.even_chunks(rows, bound, torch.device("meta")))
        places = [list(range(x.start, x.stop)) if isinstance(x, slice) else x.tolist() for x in cut]
        assert [i for x in places for i in x] == list(range(n + 7)[rows] if isinstance(rows, slice) else range(n))
        assert len(cut) == -(-n // max(bound, 1)) and all(0 < len(x) <= bound for x in places)
        if bound % 128 == 0:
            assert all(len(x) % 128 == 0 for x in places[:-1])


@pytest.mark.parametrize("mode", ["folded", "debugged", "recompute", "chunks", "frozen"])
def test_a_float32_d_hidden_leaves_less_for_logits(as_on_a_gpu, monkeypatch, mode):
    """As on a GPU: of 16-bit operands, where one is made."""
    original, seen = chunks.logits_buffer, []

    def spy(weight, rows, dtype):
        seen.append(rows)
        return original(weight, rows, dtype)

    monkeypatch.setattr(chunks, "logits_buffer", spy)
    case = make("random", "plain", torch.bfloat16, shape=(150,)).fresh()
    monkeypatch.setitem(selection.CHUNK_BYTES, "cpu", 50 * 123 * 4 + 150 * case.hidden.shape[1] * 4)
    monkeypatch.setitem(selection.ROW_BLOCK, "cpu", 1)
    whole = selection.chunk_rows(123, torch.float32, case.hidden.device)
    assert whole > 50
    batch = TokenBatch(case.target, torch.tensor([0, 150]), advantage=torch.randn(150))
    if mode in ("folded", "debugged"):
        debugged = Objective.custom(lambda logp, entropy, batch: (-batch.advantage * logp, {}), debug=True)
        objective = debugged if mode == "debugged" else Objective("none", "reinforce")
        linear_policy_loss(case.hidden, case.weight, batch, objective)
        assert seen == [50]
    elif mode == "frozen":
        linear_logprob(case.hidden, case.weight.detach(), case.target)
        assert seen == [50]
    else:
        hidden = case.hidden if mode == "chunks" else case.hidden.detach()
        linear_logprob(hidden, case.weight, case.target).logp.sum().backward()
        assert seen == [whole, 50 if mode == "chunks" else whole]


def test_a_factor_meets_products_of_an_upcast_weight():
    d_logits, weight = torch.randn(5, 7), torch.randn(7, 3).bfloat16()
    found = products.project_back(d_logits, weight, torch.empty(5, 3), torch.tensor(0.25))
    torch.testing.assert_close(found, 0.25 * d_logits @ weight.float())


def test_torch_takes_the_products_as_they_are_called():
    """The signatures of the mixed products, which the CPU has none of."""
    a, b = (torch.empty(4, 4, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out = torch.empty(4, 4, device="meta")
    assert products.mm(a, b, out) is out
    if products.ADDS_TO_FLOAT32:
        assert products.addmm(a, b, out) is out
