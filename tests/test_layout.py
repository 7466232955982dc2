"""The token layout: shapes, splitting, denominators, and what bad input says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlcore as rl


def ids(n: int) -> torch.Tensor:
    return torch.arange(n)


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def test_shift_padded():
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]])
    target, shifted = rl.shift(tokens, mask)
    assert target.tolist() == [[6, 7, 0, 0], [9, 0, 0, 0]]
    assert shifted.tolist() == [[True, True, False, False], [True, False, False, False]]


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6), data=st.data())
def test_shift_packed_never_crosses_a_border(lengths, data):
    n = sum(lengths)
    if n == 0:
        return
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    target, shifted = rl.shift(ids(n) + 1, mask, offsets(lengths))
    row = 0
    for length in lengths:
        for i in range(length):
            last = i == length - 1
            assert target[row] == (0 if last else row + 2)
            assert bool(shifted[row]) == (not last and bool(mask[row + 1]))
            row += 1


def test_per_sequence_fields_become_per_token():
    batch = rl.TokenBatch(ids(5), offsets([2, 0, 3]), advantage=torch.tensor([1.0, 2.0, 3.0]))
    assert batch.advantage.tolist() == [1, 1, 3, 3, 3]
    padded = rl.TokenBatch(ids(6).reshape(2, 3), advantage=torch.tensor([1.0, 2.0]))
    assert padded.advantage.tolist() == [[1, 1, 1], [2, 2, 2]]
    assert padded.flat().offsets.tolist() == [0, 3, 6]
    assert padded.flat().target.data_ptr() == padded.target.data_ptr()


def test_ambiguous_shapes_are_refused():
    """[2] could mean two tokens or two sequences when one of the sequences is empty."""
    x = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="per_token"):
        rl.TokenBatch(ids(2), offsets([0, 2]), advantage=x)
    marked = rl.per_token(x, offsets([0, 2]))
    assert rl.TokenBatch(ids(2), offsets([0, 2]), advantage=marked).advantage.tolist() == [2, 2]
    assert rl.TokenBatch(ids(2), offsets([1, 1]), advantage=x).advantage.tolist() == [1, 2]
    batch = rl.TokenBatch(ids(2), offsets([0, 2]))
    assert replace(batch, advantage=rl.per_token(x, batch)).advantage.tolist() == [2, 2]


def test_replace_checks_and_counts_again():
    batch = rl.TokenBatch(ids(5), offsets([2, 3]), mask=torch.ones(5))
    half = replace(batch, mask=torch.tensor([1, 0, 0, 0, 1]), advantage=torch.tensor([1.0, 2.0]))
    assert half.mask.dtype == torch.bool and half.advantage.tolist() == [1, 1, 2, 2, 2]
    assert float(half.totals.tokens) == 2
    with pytest.raises(TypeError, match="advantage: expected a floating dtype"):
        replace(batch, advantage=ids(5))
    given = rl.Totals(*(torch.tensor(float(n)) for n in (50, 20, 10)))
    assert replace(rl.TokenBatch(ids(5), offsets([2, 3]), totals=given), mask=torch.ones(5)).totals is given
    part = batch.split(3)[0]
    assert float(replace(part, advantage=torch.ones(part.N)).totals.tokens) == 5


def test_replace_knows_what_is_per_token_in_parts():
    """Two sequences of lengths 0 and 2: as many tokens as sequences, where a shape alone says nothing."""
    advantage = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    batch = rl.TokenBatch(ids(5), offsets([3, 0, 2]), advantage=advantage, weight=torch.tensor([1.0, 2.0, 3.0]))
    parts = batch.take([1, 2]), batch.split(3)[1], batch.take([1, 2]).take([0, 1]), batch.take([1, 2]).to("cpu")
    for part in parts[:1] + parts[2:]:
        assert (part.S, part.N) == (2, 2)
        again = replace(part, mask=torch.ones(2))
        assert again.advantage.tolist() == [4, 5] and again.weight.tolist() == [3, 3]
    assert replace(parts[1], mask=torch.ones(parts[1].N)).advantage.equal(parts[1].advantage)


def test_totals():
    mask = torch.tensor([1, 1, 0, 0, 0, 1])
    batch = rl.TokenBatch(ids(6), offsets([3, 2, 1, 0]), mask=mask, group=torch.tensor([7, 7, 9, 9]))
    assert [float(x) for x in batch.totals] == [3, 4, 2]
    verl_rule = rl.TokenBatch(ids(6), offsets([3, 2, 1, 0]), mask=mask, count_empty=False)
    assert [float(x) for x in verl_rule.totals] == [3, 2, 2]


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(lambda x: sum(x) > 0),
    size=st.integers(1, 12),
    by_group=st.booleans(),
)
def test_split_covers_everything_once(lengths, size, by_group):
    group = torch.tensor([s // 2 for s in range(len(lengths))])
    batch = rl.TokenBatch(ids(sum(lengths)), offsets(lengths), group=group, old_logp=ids(sum(lengths)).float())
    parts = batch.split(size, by="group" if by_group else "sequence")
    assert torch.cat([p.target for p in parts]).equal(batch.target)
    assert torch.cat([p.lengths() for p in parts]).equal(batch.lengths())
    assert torch.cat([p.group for p in parts]).equal(batch.group)
    for part in parts:
        assert part.N > 0 and part.is_micro == (len(parts) > 1)
        assert all(a is b for a, b in zip(part.totals, batch.totals, strict=True))
        assert batch.target[part.rows].equal(part.target)
        assert batch.lengths()[part.sequences].equal(part.lengths())
        units = part.group.unique().numel() if by_group else int((part.lengths() > 0).sum())
        assert size >= part.N or units <= 1 or by_group
        if by_group:
            assert not set(part.group.tolist()) & {g for q in parts if q is not part for g in q.group.tolist()}


def test_split_of_a_part_says_where_it_is_in_the_whole():
    batch = rl.TokenBatch(ids(8), offsets([2, 2, 2, 2]))
    inner = [q for p in batch.split(4) for q in p.split(2)]
    places = [(q.rows.start, q.rows.stop, q.sequences.start) for q in inner]
    assert places == [(0, 2, 0), (2, 4, 1), (4, 6, 2), (6, 8, 3)]
    padded = rl.TokenBatch(ids(8).reshape(4, 2)).split(4)
    assert [p.shape for p in padded] == [(2, 2), (2, 2)]
    assert padded[1].rows == slice(4, 8)


def test_merge_metrics():
    names = ("tokens", "loss", "ratio_min", "ratio_max", "weight_sum", "weight_sq_sum", "ess")
    rows = ((2.0, 0.5, 0.5, 2.0, 2.0, 2.0, 1.0), (1.0, 0.25, 0.7, 3.0, 4.0, 16.0, 1.0))
    parts = [dict(zip(names, row, strict=True)) for row in rows]
    merged = rl.merge_metrics([{k: torch.tensor(v) for k, v in p.items()} for p in parts])
    got = {k: float(v) for k, v in merged.items()}
    assert got["loss"] == 0.75 and got["ratio_min"] == 0.5 and got["ratio_max"] == 3.0
    assert got["ess"] == pytest.approx(36 / (3 * 18))
    assert rl.merge_metrics([]) == {}


BAD = [
    ({"target": [1, 2]}, TypeError, "target: expected a torch.Tensor; got list"),
    ({"target": torch.rand(4)}, TypeError, "target: expected int64"),
    ({"target": ids(4).reshape(1, 2, 2)}, ValueError, r"target: expected shape \[N\] or \[B, T\]"),
    ({"target": ids(0), "offsets": offsets([0])}, ValueError, "at least one token"),
    ({"offsets": None}, ValueError, "offsets: needed"),
    ({"offsets": torch.tensor([0, 4, 2])}, ValueError, "offsets: expected to rise from 0 to N=4"),
    ({"offsets": torch.tensor([1, 4])}, ValueError, "offsets: expected to rise"),
    ({"offsets": torch.tensor([0.0, 4.0])}, ValueError, "offsets: expected int64"),
    ({"mask": torch.ones(3)}, ValueError, r"mask: expected shape \(4,\) like target; got \(3,\)"),
    ({"mask": torch.tensor([1, 2, 0, 1])}, ValueError, "mask: expected bool or 0/1"),
    ({"mask": torch.full((4,), torch.nan)}, ValueError, "mask: expected bool or 0/1"),
    ({"advantage": torch.ones(3)}, ValueError, r"advantage: expected shape \(4,\) \(per token\) or \(2,\)"),
    ({"advantage": ids(4)}, TypeError, "advantage: expected a floating dtype; got torch.int64"),
    ({"group": torch.tensor([0.0, 1.0])}, TypeError, "group: expected integer ids"),
    ({"group": ids(4)}, ValueError, r"group: expected shape \(2,\)"),
    ({"old_logp": torch.ones(2)}, ValueError, "old_logp: expected shape"),
    ({"target": None}, TypeError, "target: expected a torch.Tensor; got NoneType"),
    ({"offsets": torch.tensor([0, 1, 4], device="meta")}, ValueError, "offsets: expected on cpu like target; got meta"),
    ({"totals": (1, 2, 3)}, TypeError, r"totals: expected rl.Totals\(tokens, sequences, groups\); got tuple"),
    ({"totals": rl.Totals(1, 2, 3)}, TypeError, "totals.tokens: expected a 0-d tensor; got 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_fields_are_named(change, error, message):
    good = {"target": ids(4), "offsets": offsets([1, 3])}
    with pytest.raises(error, match=message):
        rl.TokenBatch(**(good | change))


def test_bad_calls_are_named():
    batch = rl.TokenBatch(ids(4), offsets([1, 3]), group=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="max_tokens"):
        batch.split(0)
    with pytest.raises(ValueError, match="by:"):
        batch.split(4, by="token")
    mixed = rl.TokenBatch(ids(3), offsets([1, 1, 1]), group=torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="contiguous"):
        mixed.split(2, by="group")
    with pytest.raises(ValueError, match="group: needed"):
        rl.TokenBatch(ids(3), offsets([1, 2])).split(2, by="group")
    with pytest.raises(ValueError, match="x: expected shape"):
        rl.per_token(torch.ones(3), batch)
    with pytest.raises(ValueError, match="mask: expected shape"):
        rl.shift(ids(4).reshape(2, 2), torch.ones(4))
    with pytest.raises(ValueError, match="offsets: needed"):
        rl.shift(ids(4))
    with pytest.raises(ValueError, match="offsets: expected to rise from 0 to N=6"):
        rl.shift(ids(6), None, torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="offsets: needed for packed input_ids"):
        rl.shift(ids(6).reshape(2, 3), None, torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match="mask: expected bool or 0/1"):
        rl.shift(ids(3).reshape(1, 3), torch.tensor([[0.0, 2.0, 1.0]]))
    with pytest.raises(ValueError, match="with a token in it"):
        rl.shift(ids(0), None, offsets([0]))
    with pytest.raises(TypeError, match=r"input_ids: expected a torch.Tensor"):
        rl.shift([[1, 2]])
    with pytest.raises(ValueError, match="offsets: expected to rise from 0"):
        rl.per_token(torch.ones(2), torch.tensor([2, 3, 5]))
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor"):
        rl.per_token([1.0], offsets([1]))
    with pytest.raises(ValueError, match="max_tokens"):
        batch.split(True)


def test_no_value_is_read_from_the_device():
    """On meta tensors reading a value raises: building a batch and taking a loss of it reads none."""
    with torch.device("meta"):
        batch = rl.TokenBatch(
            torch.zeros(8, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), mask=torch.ones(8),
            advantage=torch.ones(3), old_logp=torch.ones(8), ref_logp=torch.ones(8), rollout_logp=torch.ones(8),
            group=torch.zeros(3, dtype=torch.int64), segment=torch.zeros(8, dtype=torch.int64),
        )  # fmt: skip
        logp = torch.ones(8, requires_grad=True)
    for ratio in ("none", "token", "segment", "sequence"):
        objective = rl.Objective(ratio=ratio, kl=rl.KL(), correction=rl.TIS(), dual_clip=3.0, entropy=0.1)
        loss, metrics = rl.policy_loss(logp, batch, objective, entropy=logp)
        loss.backward()
        assert all(x.device.type == "meta" and x.dim() == 0 for x in metrics.values())


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(lambda x: sum(x) > 0),
    padded=st.booleans(),
    data=st.data(),
)
def test_take_gives_the_rows_of_its_sequences(lengths, padded, data):
    S = len(lengths)
    if padded:
        lengths = [3] * S
    n = sum(lengths)
    shape = (S, 3) if padded else (n,)
    starts = None if padded else offsets(lengths)
    batch = rl.TokenBatch(
        ids(n).reshape(shape), starts, mask=torch.ones(shape), old_logp=ids(n).reshape(shape) / 2, group=ids(S) // 2
    )
    chosen = data.draw(st.lists(st.integers(0, S - 1), unique=True, min_size=1))
    part = batch.take(chosen if data.draw(st.booleans()) else torch.tensor(chosen))
    begins = offsets(lengths).tolist()
    rows = [i for s in chosen for i in range(begins[s], begins[s + 1])]
    assert part.target.flatten().tolist() == rows and part.old_logp.flatten().tolist() == [i / 2 for i in rows]
    assert part.lengths().tolist() == [lengths[s] for s in chosen]
    assert part.group.tolist() == [s // 2 for s in chosen] and part.padded == padded
    assert all(a is b for a, b in zip(part.totals, batch.totals, strict=True))
    assert part.is_micro == (len(chosen) < S) and part.rows is None and part.sequences is None
    assert batch.split(2)[0].take([0]).is_micro == (len(batch.split(2)) > 1 or S > 1)


@pytest.mark.parametrize(
    ("chosen", "error"),
    [([2], ValueError), ([-1], ValueError), ([0, 0], ValueError), ([], ValueError), ([0.5], TypeError),
     (None, TypeError), ([[0], [1, 0]], TypeError), (torch.tensor([[0]]), TypeError),
     (torch.tensor([True, False]), TypeError)],
)  # fmt: skip
def test_take_names_what_it_can_not_take(chosen, error):
    batch = rl.TokenBatch(ids(4), offsets([1, 3]))
    with pytest.raises(error, match="sequences: expected"):
        batch.take(chosen)
