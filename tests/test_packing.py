"""Micro-batches of groups by length: what may share one, and how many there are."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlcore as rl
from rlcore.packing import best_fit

batches = st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 12), max_size=5)), min_size=1, max_size=9)


def split_up(groups):
    return [prompt for prompt, _ in groups], [lengths for _, lengths in groups]


def owners(groups):
    """The group and length of every sequence."""
    return [(g, length) for g, (_, lengths) in enumerate(groups) for length in lengths]


def cost(groups, sequences):
    own = owners(groups)
    return sum(own[s][1] for s in sequences) + sum(groups[g][0] for g in {own[s][0] for s in sequences})


def bins_in_order(groups, most):
    """One group after the other; one that exceeds `most` alone goes in parts, one response after the other."""
    sizes = []
    for prompt, lengths in groups:
        if not lengths:
            continue
        if prompt + sum(lengths) <= most:
            sizes.append(prompt + sum(lengths))
            continue
        part = []
        for length in lengths:
            if part and prompt + sum(part) + length > most:
                sizes.append(prompt + sum(part))
                part = []
            part.append(length)
        sizes.append(prompt + sum(part))
    count = used = 0
    for size in sizes:
        if not count or used + size > most:
            count, used = count + 1, 0
        used += size
    return count


@given(batches, st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_every_sequence_once_and_no_micro_batch_over_the_budget(groups, most):
    found = rl.pack_groups(*split_up(groups), most)
    own = owners(groups)
    assert sorted(s for micro in found for s in micro) == list(range(len(own)))
    assert all(micro == sorted(micro) for micro in found) and [m[0] for m in found] == sorted(m[0] for m in found)
    for micro in found:
        assert cost(groups, micro) <= most or sum(own[s][1] > 0 for s in micro) <= 1
        for g in {own[s][0] for s in micro}:
            split = sum(own[s][0] == g for s in micro) < len(groups[g][1])
            assert not split or groups[g][0] + sum(groups[g][1]) > most
    assert len(found) <= bins_in_order(groups, most)


@given(batches, st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_whole_groups_are_never_split(groups, most):
    found, own = rl.pack_groups(*split_up(groups), most, whole_groups=True), owners(groups)
    places = [{i for i, micro in enumerate(found) if any(own[s][0] == g for s in micro)} for g in range(len(groups))]
    assert all(len(place) == bool(lengths) for place, (_, lengths) in zip(places, groups, strict=True))
    assert sum(map(len, found)) == len(own)
    for micro in found:
        assert cost(groups, micro) <= most or len({own[s][0] for s in micro}) == 1


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 40), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_best_fit_does_not_know_the_order(sizes, most, source):
    order = list(range(len(sizes)))
    source.shuffle(order)
    loads = [
        sorted(sum(given_sizes[i] for i in chosen) for chosen in best_fit(given_sizes, most))
        for given_sizes in (sizes, [sizes[i] for i in order])
    ]
    assert loads[0] == loads[1]


def test_worked_example():
    """Prompts of 10: groups of 60, 30, 40 and 70 in micro-batches of 100; a group of 160 goes in parts."""
    prompts = [10] * 4
    responses = [[20, 30], [10, 10], [30], [30, 30]]
    assert rl.pack_groups(prompts, responses, 100) == [[0, 1, 4], [2, 3, 5, 6]]
    assert rl.pack_groups([10], [[70, 40, 40]], 100) == [[0], [1, 2]]
    assert rl.pack_groups([10], [[70, 40, 40]], 100, whole_groups=True) == [[0, 1, 2]]
    assert rl.pack_groups([10], [[95, 5, 5]], 100) == [[0], [1, 2]]


def test_where_order_beats_size():
    """Largest first puts 4 + 4 together and needs three; in order, two are full."""
    assert rl.pack_groups([0] * 6, [[4], [3], [3], [4], [3], [3]], 10) == [[0, 1, 2], [3, 4, 5]]


@given(batches, st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_a_micro_batch_without_rows_is_a_group_without_rows(groups, most):
    """Empty responses go with others of their group, also where the group is split."""
    own = owners(groups)
    for micro in rl.pack_groups(*split_up(groups), most):
        silent = {own[s][0] for s in micro}
        assert any(own[s][1] for s in micro) or not any(any(groups[g][1]) for g in silent)


def test_empty_responses_of_a_split_group():
    assert rl.pack_groups([10], [[95, 0, 95]], 100) == [[0, 1], [2]]
    assert rl.pack_groups([10], [[0, 95, 95, 0]], 100) == [[0, 1, 3], [2]]
    assert rl.pack_groups([100], [[5, 0, 0]], 100) == [[0, 1, 2]]


def test_many_groups_pack_tightly():
    source = random.Random(0)
    lengths = [[source.randrange(1, 100) for _ in range(8)] for _ in range(300)]
    found = rl.pack_groups([50] * 300, lengths, 2048)
    assert len(found) <= 1.05 * (300 * 50 + sum(map(sum, lengths))) / 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [[1], [2]], 4), r"responses: expected one list per prompt \(1\), got 2"),
        (([1], [[1]], 0), "max_tokens: expected a positive int, got 0"),
        (([1], [[1]], 4.0), "max_tokens: expected a positive int, got 4.0"),
        (([-1], [[1]], 4), r"prompts\[0\]: expected a length in tokens, got -1"),
        (([1], [[1, 2.5]], 4), r"responses\[0\]\[1\]: expected a length in tokens, got 2.5"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        rl.pack_groups(*arguments)


def test_lengths_may_be_arrays_and_must_be_lists():
    assert rl.pack_groups(np.array([10]), [np.array([70, 40, 40])], 100) == [[0], [1, 2]]
    with pytest.raises(TypeError, match=r"responses\[0\]: expected a list, got 3"):
        rl.pack_groups([1], [3], 4)
