"""The Triton reductions of the segments family against the oracle, on a GPU or in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rlcore as rl
from accuracy import assert_accurate
from interpreter import INTERPRETED
from oracles import segments as oracle
from rlcore.algorithms import segments as reference
from rlcore.ops import segments as ops

pytest.importorskip("triton")

LENGTHS = {
    "ragged": (3, 47, 31, 12),
    "empty and one": (0, 5, 0, 0, 1, 0),
    "at the cuts": (31, 1, 32, 33, 0, 70),
    "one long": (150,),
    "nothing": (0, 0),
    "many": (1,) * 20,
    "a long one among short ones": (3, 0, 2, 2, 2, 2, 2, 60, 5, 5),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("sum", "mean", "std", "min", "max", "count")
CASES = [
    *((name, "float32", layout) for name in LENGTHS for layout in ("contiguous", "masked")),
    *(("ragged", dtype, "masked") for dtype in DTYPES if dtype != "float32"),
    ("ragged", "float32", "strided"),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """The interpreter takes milliseconds for a program, however little it does: few rows in many pieces."""
    from rlcore.kernels import segments, segments_rank

    if INTERPRETED:
        monkeypatch.setattr(segments_rank, "BLOCK", 16)
        for name, value in {"LONG": (32, 8), "SHORT": (8, 1), "FEW": 10, "MERGED": 4}.items():
            monkeypatch.setattr(segments, name, value)


@pytest.fixture
def no_reference(monkeypatch):
    """Nothing may quietly run elsewhere."""
    for name in (*(f"segment_{kind}" for kind in (*KINDS, "rank", "topk")), "group_advantage"):
        monkeypatch.setattr(ops.reference, name, None)


def make_case(lengths, dtype, layout):
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
    n = int(offsets[-1])
    x = torch.randn(n, 3, dtype=torch.float64).to(dtype)[:, 1] if layout == "strided" else torch.randn(n).to(dtype)
    if layout != "masked":
        return x, offsets, None
    mask = torch.rand(n) < 0.6
    return x.masked_fill(~mask, torch.nan), offsets, mask


def reduce(kind, *arguments, **options):
    with rl.backend("triton"):
        return getattr(ops, f"segment_{kind}")(*arguments, **options)


def to(device, *given):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in given]


@pytest.mark.parametrize(("name", "dtype", "layout"), CASES)
def test_reductions_agree_with_the_oracle(device, no_reference, small_blocks, name, dtype, layout):
    x, offsets, mask = make_case(LENGTHS[name], DTYPES[dtype], layout)
    size, ids = len(LENGTHS[name]), oracle.ids_of(offsets, len(x))
    there = to(device, x, offsets, mask)
    for kind in KINDS:
        got = reduce(kind, there[0], offsets=there[1], mask=there[2])
        wide = torch.float64 if dtype == "float64" else torch.float32
        assert got.dtype == (torch.int64 if kind == "count" else wide)
        assert kind != "std" or torch.equal(got, reduce(kind, there[0], offsets=there[1], mask=there[2]))
        assert_accurate(got.cpu().to(wide), oracle.segment_reduce(kind, x, ids, size, mask), name=kind)


@pytest.mark.parametrize("masked", [False, True])
def test_by_ids_in_any_order_and_padded(device, no_reference, small_blocks, masked):
    B, T, S = 5, 21, 7
    x, ids = torch.randn(B, T), torch.randint(S - 1, (B, T))  # the last segment is empty
    mask = torch.rand(B, T) < 0.7 if masked else None
    x = x if mask is None else x.masked_fill(~mask, torch.nan)
    flat = None if mask is None else mask.reshape(-1)
    for given, rows, size in ({"ids": ids, "num_segments": S}, ids.reshape(-1), S), ({}, torch.arange(B * T) // T, B):
        there = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in given.items()}
        there |= {"mask": None if mask is None else mask.to(device)}
        for kind in KINDS:
            want = oracle.segment_reduce(kind, x.reshape(-1), rows, size, flat)
            assert_accurate(reduce(kind, x.to(device), **there).cpu().float(), want, name=kind)
        rank = reduce("rank", x.to(device), **there).cpu()
        assert rank.shape == x.shape
        assert np.array_equal(rank.reshape(-1).numpy(), oracle.segment_rank(x.reshape(-1), rows, size, flat))
        values, index = (t.cpu().numpy() for t in reduce("topk", x.to(device), 4, **there))
        best, expected = oracle.segment_topk(x.reshape(-1), 4, rows, size, flat)
        assert np.array_equal(values, best) and np.array_equal(index, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["ragged", "empty and one", "nothing", "a long one among short ones"])
def test_places_and_largest_values(device, no_reference, small_blocks, name, dtype):
    """Many values are equal, some NaN or infinite: the oracle's order is that of the reference."""
    lengths = LENGTHS[name]
    _, offsets, mask = make_case(lengths, DTYPES[dtype], "masked")
    n = len(mask)
    x = torch.randint(-3, 4, (n,)).to(DTYPES[dtype]) * torch.tensor([1.0, -0.0])[torch.randint(2, (n,))]
    for value in (torch.inf, -torch.inf, torch.nan):
        x[torch.rand(n) < 0.1] = value
    ids = torch.from_numpy(oracle.ids_of(offsets, n))
    for keep in (None, mask):
        gone = torch.full_like(ids, len(lengths)) if keep is None else ids.masked_fill(~keep, len(lengths))
        expected = reference.ranks(x, ids if keep is None else gone, len(lengths))
        expected = expected if keep is None else expected.masked_fill(~keep, -1)
        there = to(device, x, offsets, keep)
        got = reduce("rank", there[0], offsets=there[1], mask=there[2])
        assert torch.equal(got.cpu(), expected)
        for k in (1, 3):
            values, rows = (t.cpu() for t in reduce("topk", there[0], k, offsets=there[1], mask=there[2]))
            assert values.dtype == torch.float32 and rows.shape == (len(lengths), k)
            for s in range(len(lengths)):
                chosen = [i for place in range(k) for i in range(n) if ids[i] == s and expected[i] == place]
                assert rows[s].tolist() == chosen + [-1] * (k - len(chosen))
                best = [float(x[i]) for i in chosen] + [-np.inf] * (k - len(chosen))
                assert np.array_equal(values[s].numpy(), np.array(best, np.float32), equal_nan=True)


def test_the_pieces_that_ship(device, no_reference):
    """In pieces, with NaN and infinity, which stay in their segment."""
    x, offsets = torch.randn(6000), torch.tensor([0, 2500, 2600, 6000])
    x[7], x[2550] = torch.nan, torch.inf
    for kind in ("sum", "mean", "std", "min", "max"):
        got = reduce(kind, x.to(device), offsets=offsets.to(device)).cpu()
        assert got.isnan().tolist() == [True, kind == "std", False], kind
        assert_accurate(got[2:], oracle.segment_reduce(kind, x[2600:], np.zeros(3400), 1), name=kind)
    assert got[1] == torch.inf


def test_deviations_of_values_far_from_zero(device, no_reference):
    """A mean of squares would lose all digits."""
    x = torch.randn(5000) + 1e5
    got = reduce("std", x.to(device), offsets=torch.tensor([0, 5000]).to(device)).cpu()
    assert_accurate(got, [oracle.std(x.double().tolist())])


GROUPS = {
    "plain": {},
    "leave one out": {"center": "leave_one_out", "scale": "none"},
    "leave one out, by batch": {"center": "leave_one_out", "scale": "batch", "spread": "residual"},
    "group over batch": {"scale": "batch"},
    "batch over group": {"center": "batch", "ddof": 0},
    "residual": {"center": "leave_one_out", "spread": "residual", "eps": 0.01},
    "batch": {"center": "batch", "scale": "batch"},
    "only centred": {"scale": "none"},
    "only scaled": {"center": "none", "scale": "group"},
    "nothing": {"center": "none", "scale": "none"},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", GROUPS)
def test_group_advantage_agrees_with_the_oracle(device, no_reference, small_blocks, rule, weighted):
    """Groups in any order, of one, of equal rewards, of masked rewards alone; more rewards than a piece has rows."""
    group = torch.tensor([5, 7, -3, 7, 9, 7, 5, 2, 9, 7, 2, 5, 7, 9, 7, 7, 7, 4, 7, 7]) * 1000
    n = len(group)
    reward, mask = torch.randn(n).round(decimals=1), torch.rand(n) < 0.8
    mask[group == 9000] = False
    reward[group == 5000] = 0.1
    weight = torch.rand(n).masked_fill(torch.rand(n) < 0.1, 0.0) if weighted else None
    for keep in (None, mask):
        given = reward if keep is None else reward.masked_fill(~keep, torch.nan)
        want = oracle.group_advantage(given, group, **GROUPS[rule], weight=weight, mask=keep)
        there = to(device, given, group, weight, keep)
        with rl.backend("triton"):
            got = rl.group_advantage(there[0], there[1], weight=there[2], mask=there[3], **GROUPS[rule])
            if rule == "plain":
                again = rl.group_advantage(there[0], there[1], weight=there[2], mask=there[3])
                assert torch.equal(got, again)
        assert got.dtype == torch.float32
        # Where a deviation is a rounding error, 1 / eps of it is left of equal rewards.
        assert_accurate(got.cpu(), want, norm=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_group_advantage_of_other_rewards(device, no_reference, dtype):
    reward, group = torch.randint(0, 5, (4, 6)).to(dtype), torch.arange(4)[:, None].expand(4, 6)
    with rl.backend("triton"):
        got = rl.group_advantage(*to(device, reward, group)).cpu()
        assert rl.group_advantage(*to(device, reward[:0], group[:0])).shape == (0, 6)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_accurate(got, oracle.group_advantage(reward, group))


def test_gradients_and_ranks_of_float64_are_the_reference_s(device):
    x, offsets = torch.randn(9).to(device).requires_grad_(), torch.tensor([0, 4, 9]).to(device)
    with rl.backend("triton"):
        for kind in ("sum", "mean", "std", "min"):
            (grad,) = torch.autograd.grad(getattr(ops, f"segment_{kind}")(x, offsets=offsets).sum(), x)
            assert grad.isfinite().all() and grad.abs().sum() > 0
        assert ops.segment_rank(x.detach().double(), offsets=offsets).shape == (9,)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
def test_no_number_length_or_place_compiles_again():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    from compile_kernels import compiling, variants

    from rlcore.kernels import segments as kernels
    from rlcore.kernels import segments_advantage as advantage
    from rlcore.kernels import segments_rank as ranks

    def call(lengths, start, ddof):
        x, offsets, mask = make_case(lengths, torch.float32, "masked")
        x, mask = (torch.cat((t[:1].expand(start), t))[start:] for t in (x, mask))
        kernels.segment_reduce("std", x, offsets, None, mask, None, ddof)
        ranks.segment_topk(x, start + 1, offsets, None, mask)
        group = torch.zeros(len(x), dtype=torch.int64)
        advantage.group_advantage(x, group, "group", "none", False, ddof, ddof / 7, None, mask, torch.float32)

    with compiling("sm_90"):
        for case in (((4096, 1), 0, 1.0), ((1000, 3000, 777), 1, 0.0), ((20000,), 3, 2.5)):
            call(*case)
        once = (ranks.segment_sort_kernel, ranks.segment_rank_kernel, advantage.advantage_kernel)
        assert [variants(kernel) for kernel in once] == [1, 1, 1]
        # Two kinds: deviations in long pieces, scopes in short ones, as there may be as many groups as rewards.
        assert variants(kernels.segment_piece_kernel) == variants(kernels.segment_merge_kernel) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_device():
    x, offsets, mask = to("cuda", *make_case((3, 20_000, 0, 40), torch.float32, "masked"))
    ids = torch.randint(9, x.shape, device="cuda")

    def everything():
        for kind in (*KINDS, "rank"):
            reduce(kind, x, offsets=offsets, mask=mask)
            reduce(kind, x, ids, num_segments=9, mask=mask)
        reduce("topk", x, 3, offsets=offsets)
        return rl.group_advantage(x, ids, mask=mask, spread="residual")

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    graph.replay()
    assert torch.equal(captured, eager)
