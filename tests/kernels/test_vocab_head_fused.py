"""The fused kernel, which holds no logits, against the oracle, and batch_invariant(), which runs it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vocab_head_cases import check_forward, check_further, check_gradients, coefficients, gradients_of, make

import rlcore as rl

pytest.importorskip("triton")

LOW = (torch.bfloat16, torch.float16)
SMALL = {"shape": (21,), "H": 19, "V": 75}  # two row tiles, two depths and a part, three ranges, two tiles in a range


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    from rlcore.kernels import vocab_head_fused as kernels

    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, (16, 16, 16, 4, 2)))
    monkeypatch.setattr(kernels, "SPLIT", 32)
    monkeypatch.setattr(kernels, "GROUP", 2)


def head_of(case, device):
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    kwargs = {name: move(x) for name, x in case.kwargs().items()}
    return (move(case.hidden), move(case.weight), move(case.target)), kwargs


def invariant(case, device, entropy=True, statistics=False):
    head, kwargs = head_of(case, device)
    with rl.backend("triton"), rl.batch_invariant():
        return rl.linear_logprob(*head, entropy=entropy, statistics=statistics, **kwargs)


CASES = [("random", "plain", torch.float32), ("peaked", "rows", torch.float32), ("negative", "bias", torch.float32),
         ("forbidden", "softcap", torch.float32), ("peaked", "bias", LOW[0]), ("random", "rows", LOW[1])]  # fmt: skip


@pytest.mark.parametrize(("data", "setting", "dtype"), CASES)
def test_accuracy(device, data, setting, dtype):
    case = make(data, setting, dtype, masked=0.3, **SMALL)
    out = invariant(case, device)
    check_forward(case, out.logp.cpu(), out.entropy.cpu())
    again = invariant(case, device, entropy=False)
    assert torch.equal(again.logp, out.logp) and again.entropy is None
    more = invariant(case, device, statistics=True)
    assert torch.equal(more.logp, out.logp) and torch.equal(more.entropy, out.entropy)
    check_further(case, *(x.cpu() for x in more[2:]))


def test_of_several_likeliest_the_lowest(device):
    """In a tile, in the tiles of a range, and in two ranges."""
    case = make(**SMALL)
    case.weight[[50, 60, 74]] = 3 * case.hidden[0]
    case.weight[[5, 9, 20]] = 3 * case.hidden[1]
    found = invariant(case, device, statistics=True).top1
    assert found[0] in (50, 5) and found[1] == 5
    case.weight[[5, 9, 20]] = case.weight[[50, 60, 74]]
    assert invariant(case, device, statistics=True).top1[0] == 5


def test_a_row_is_the_same_bits_in_any_batch(device):
    sizes = SMALL | {"shape": (37,)}  # three row tiles in groups of two
    case = make("random", "rows", **sizes)
    whole = invariant(case, device)
    check_forward(case, whole.logp.cpu(), whole.entropy.cpu())
    for rows in ([3], list(range(5, 20)), [36, 20, 14, 8, 2]):
        part = replace(case, hidden=case.hidden[rows], target=case.target[rows], temperature=case.temperature[rows])
        for x, y in zip(invariant(part, device)[:2], whole[:2], strict=True):
            assert torch.equal(x, y[rows])


def test_masked_rows_are_not_read_and_labels_out_of_range_have_no_logprob(device):
    from rlcore.kernels import vocab_head_fused as kernels

    case = make("random", "bias", **SMALL)
    mask = torch.ones(21, dtype=torch.bool)
    mask[:16] = mask[18] = False  # a whole tile, and a row of the other
    case.hidden[~mask], case.target[~mask] = torch.nan, -100
    case.target[19], case.target[20] = 75, -1
    (hidden, weight, target), _ = head_of(case, device)
    one = torch.ones((), device=device)
    found = kernels.statistics(hidden, weight, target, mask.to(device), case.bias.to(device), one, None, one, True)
    for x in found:
        assert not x[~mask.to(device)].any()
    assert found[2].isnan().nonzero().squeeze(1).tolist() == [19, 20]
    assert found[3].isfinite().all()


def test_gradients_and_the_loss(device):
    """Backward is the chunked one, from the fused statistics; a policy loss is that of the invariant log-probs."""
    case = make("peaked", "rows", masked=0.3, **SMALL)
    moved = case.fresh()
    (hidden, weight, target), kwargs = head_of(moved, device)
    with rl.backend("triton"), rl.batch_invariant():
        out = rl.linear_logprob(hidden, weight, target, entropy=True, **kwargs)
        found = gradients_of(*out[:2], moved.leaves, *(x.to(device) for x in coefficients(case)))
        batch = rl.TokenBatch(target, mask=kwargs["mask"], offsets=torch.tensor([0, 21], device=device),
                              advantage=torch.randn(21, device=device))  # fmt: skip
        numbers = case.numbers() | {"temperature": kwargs["temperature"]}
        loss, _ = rl.linear_policy_loss(hidden, weight, batch, rl.Objective(), kwargs["bias"], **numbers)
    check_gradients(case, found)
    with rl.backend("triton"):
        assert torch.equal(loss, rl.policy_loss(out.logp, batch, rl.Objective(), out.entropy)[0])


def test_where_it_can_not_be(device):
    case = make(**SMALL)
    with rl.batch_invariant(), rl.backend("reference"), pytest.raises(RuntimeError, match=r"needs the Triton backend"):
        rl.linear_logprob(case.hidden, case.weight, case.target)
    with rl.batch_invariant(), pytest.raises(RuntimeError, match="float64"), rl.backend("triton"):
        rl.linear_logprob(case.hidden.double().to(device), case.weight.double().to(device), case.target.to(device))
