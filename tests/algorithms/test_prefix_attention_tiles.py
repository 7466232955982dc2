"""The tiles of the GPU kernels: every visible pair is covered once, full tiles are full, splits add up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefix_tree import groups_strategy, paths_strategy

from rlcore.algorithms import prefix_attention_tiles as tiles
from rlcore.algorithms.prefix_attention import visible
from rlcore.prefix_tree import PrefixTree


def seen(tree, window):
    rows = torch.arange(tree.M)
    return visible(rows, rows, tree.end, tree.position, tree.position, window).numpy()


def covered(work, tree, group, size, of_queries, lanes, keys, window):
    """[lanes, rows] how often each pair is taken; checks that full tiles are seen as a whole."""
    pairs = np.repeat(seen(tree, window), group, axis=0)
    count = np.zeros_like(pairs, dtype=int)
    for tile, _, begin, middle, end in work.items:
        for s in range(begin, end):
            first, steps = work.segments[s]
            for other in range(first, first + steps * size, size):
                lane, key = (tile * lanes, other) if of_queries else (other, tile * keys)
                block = np.s_[lane : lane + lanes, max(key, 0) : max(key + keys, 0)]
                count[block] += 1
                if s < middle:
                    assert pairs[block].all()
                    whole = other >= 0 and other + size <= (tree.M if of_queries else tree.M * group)
                    assert whole, "full tiles are loaded without a look at the borders"
    assert count.max() == 1 and (count[pairs] == 1).all()


def grouped(groups):
    return PrefixTree.from_groups([prompt for prompt, _ in groups], [responses for _, responses in groups])


def long(lengths):
    return PrefixTree.from_groups([[1] * (10 + n[0]) for n in lengths], [[[2] * m for m in n] for n in lengths])


lengths_strategy = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=4), min_size=1, max_size=3)
trees = paths_strategy.map(PrefixTree.from_paths) | groups_strategy.map(grouped) | lengths_strategy.map(long)


@given(
    tree=trees, group=st.sampled_from([1, 2, 3, 7, 20]), lanes=st.sampled_from([4, 16]), keys=st.sampled_from([2, 8]),
    window=st.none() | st.integers(1, 12), items=st.sampled_from([1, 9, 300]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_pair_once(tree, group, lanes, keys, window, items):
    table = tree.node_table.numpy()
    work = tiles.query_work(table, group, lanes, keys, window)
    assert sorted(work.items[:, 0]) == list(range(-(-tree.M * group // lanes))) and work.slots == 0
    covered(work, tree, group, keys, True, lanes, keys, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_ITEMS", items)
        patch.setattr(tiles, "_LEAST_STEPS", 1)
        work = tiles.key_work(table, group, lanes, keys, window, 2)
    covered(work, tree, group, lanes, False, lanes, keys, window)
    steps = [work.segments[begin:end, 1].sum() for *_, begin, _, end in work.items]
    assert steps == sorted(steps, reverse=True)
    slots = sorted((slot, tile) for tile, slot, *_ in work.items.tolist() if slot >= 0)
    assert slots == [(first + part, tile) for tile, first, parts in work.splits.tolist() for part in range(parts)]


def test_siblings_are_not_visited_and_long_prefixes_are_split():
    tree = PrefixTree.from_groups([[1] * 4096], [[[2] * 1024] * 8])
    table = tree.node_table.numpy()
    work = tiles.query_work(table, 4, 128, 64, None)
    last = work.items[work.items[:, 0] == tree.M * 4 // 128 - 1][0]
    assert work.segments[last[2] : last[4], 1].sum() == (4096 + 1024) // 64
    work = tiles.key_work(table, 4, 64, 128, None, 8)
    most = int(work.segments[:, 1].sum()) * 8 / 264
    for *_, begin, _, end in work.items:
        assert work.segments[begin:end, 1].sum() <= most + 1
    # The last keys of the prompt are still seen by all responses; those of a response are not split.
    assert set(work.splits[:, 0]) <= set(range(32))


@pytest.mark.parametrize("table", [[[0, 2, 3, -1], [1, 3, 3, 0]], [[0, 2, 3, -1], [2, 9, 3, 0]], [[1, 2, 2, -1]]])
def test_tables_that_are_none(table):
    for work in (tiles.query_work, lambda *a: tiles.key_work(*a, 1)):
        with pytest.raises(ValueError, match="node_table: expected runs"):
            work(np.asarray(table), 1, 16, 16, None)
