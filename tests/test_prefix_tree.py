import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import prefix_attention as oracle
from rlcore.prefix_tree import PrefixTree

paths_strategy = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=14)
groups_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=5),
        st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=5),
    ),
    min_size=1,
    max_size=4,
)


def check_packing(tree, sequences, rows, predictions_from):
    """Everything the tree says against rows per path: tokens, depths, subtree ends, and aligned predictions."""
    descendants = [0] * tree.M
    for tokens, path in zip(sequences, rows, strict=True):
        for depth, row in enumerate(path):
            assert int(tree.input_ids[row]) == tokens[depth]
            assert int(tree.position[row]) == depth
            descendants[row] = max(descendants[row], max(path) + 1)
    assert tree.end.tolist() == descendants
    assert max(tree.position.tolist()) + 1 == tree.depth
    offsets = tree.offsets.tolist()
    for s, first in enumerate(predictions_from):
        own = slice(offsets[s], offsets[s + 1])
        assert tree.target[own].tolist() == list(sequences[s][first:])
        assert tree.loss_rows[own].tolist() == rows[s][first - 1 : -1]
        assert int(tree.last_rows[s]) == rows[s][-1]
    assert offsets[-1] == tree.N


@given(paths_strategy)
@settings(max_examples=60, deadline=None)
def test_from_paths_is_the_trie(paths):
    tree = PrefixTree.from_paths(paths)
    rows = oracle.trie_rows(paths)
    assert tree.M == 1 + max(max(path) for path in rows)
    assert tree.S == len(paths)
    check_packing(tree, paths, rows, [1] * len(paths))
    firsts = list(dict.fromkeys(path[0] for path in paths))
    assert tree.group.tolist() == [firsts.index(path[0]) for path in paths]


@given(
    st.lists(
        st.lists(st.sampled_from([-(2**63), -3, 0, 255, 256, 2**40, 2**63 - 1]), min_size=1, max_size=6), min_size=1
    )
)
@settings(max_examples=40, deadline=None)
def test_packed_order_is_numeric_for_any_ids(paths):
    tree = PrefixTree.from_paths(paths)
    check_packing(tree, paths, oracle.trie_rows(paths), [1] * len(paths))
    assert tree.M == len({tuple(path[: n + 1]) for path in paths for n in range(len(path))})


def test_paths_that_extend_one_another():
    """Deeper than 255 and 65,535 tokens, where the depths are sorted as wider integers."""
    for length, step in ((300, 1), (70_000, 9_000)):
        paths = [[7] * n + [n % 3] for n in range(length, 0, -step)]
        tree = PrefixTree.from_paths(paths)
        assert tree.depth == length + 1 and tree.M == length + len(paths)
        rows = tree.loss_rows.numpy()
        for s, path in enumerate(paths):
            own = rows[int(tree.offsets[s]) : int(tree.offsets[s + 1])]
            assert np.array_equal(tree.position.numpy()[own], np.arange(len(path) - 1))
            assert np.array_equal(tree.input_ids.numpy()[own], path[:-1])
            assert (tree.end.numpy()[own] > own[-1]).all()


@given(groups_strategy)
@settings(max_examples=60, deadline=None)
def test_from_groups_packs_prompts_once(groups):
    prompts, responses = [p for p, _ in groups], [r for _, r in groups]
    tree = PrefixTree.from_groups(prompts, responses)
    rows = oracle.group_rows(prompts, responses)
    sequences = [p + r for p, answers in groups for r in answers]
    assert tree.M == sum(len(p) + sum(map(len, r)) for p, r in groups)
    first = [len(p) for p, answers in groups for _ in answers]
    check_packing(tree, sequences + prompts, rows, first)
    assert tree.group.tolist() == [g for g, answers in enumerate(responses) for _ in answers]


@given(paths_strategy)
@settings(max_examples=30, deadline=None)
def test_nodes_are_the_unbranched_runs(paths):
    tree = PrefixTree.from_paths(paths)
    nodes = tree.nodes
    assert nodes.start[0] == 0 and nodes.stop[-1] == tree.M and nodes.stop[:-1] == nodes.start[1:]
    end = tree.end.tolist()
    for start, stop, parent in zip(*nodes, strict=True):
        assert len(set(end[start:stop])) == 1
        covering = [k for k in range(len(nodes.start)) if nodes.start[k] < start < end[nodes.start[k]]]
        assert parent == (covering[-1] if covering else -1)


def test_worked_example():
    tree = PrefixTree.from_groups([[5, 6], [7]], [[[1, 2], [], [3]], [[4]]])
    assert tree.input_ids.tolist() == [5, 6, 1, 2, 3, 7, 4]
    assert tree.position.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert tree.end.tolist() == [5, 5, 4, 4, 5, 7, 7]
    assert tree.target.tolist() == [1, 2, 3, 4]
    assert tree.offsets.tolist() == [0, 2, 2, 3, 4]
    assert tree.loss_rows.tolist() == [1, 2, 1, 5]
    assert tree.last_rows.tolist() == [3, 1, 4, 6]
    assert tree.group.tolist() == [0, 0, 0, 1]
    assert tree.nodes == ((0, 2, 4, 5), (2, 4, 5, 7), (-1, 0, 0, -1))
    assert (tree.M, tree.N, tree.S, tree.depth) == (7, 4, 4, 4)
    assert tree.node_table.dtype == torch.int64 and tree.target.dtype == torch.int64


def test_paths_may_repeat_extend_or_be_one_token():
    tree = PrefixTree.from_paths([[1, 2, 3], [1, 2], [1, 2, 3], [4], [1], [1, 5]])
    assert tree.input_ids.tolist() == [1, 2, 3, 5, 4]
    assert tree.end.tolist() == [4, 3, 3, 4, 5]
    assert tree.offsets.tolist() == [0, 2, 3, 5, 5, 5, 6]
    assert tree.target.tolist() == [2, 3, 2, 2, 3, 5]
    assert tree.loss_rows.tolist() == [0, 1, 0, 0, 1, 0]


@given(paths_strategy, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_order_of_paths_permutes_predictions_and_nothing_else(paths, source):
    order = list(range(len(paths)))
    source.shuffle(order)
    one, other = PrefixTree.from_paths(paths), PrefixTree.from_paths([paths[s] for s in order])
    for name in ("input_ids", "position", "end", "node_table"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    for t, s in enumerate(order):
        a = slice(int(one.offsets[s]), int(one.offsets[s + 1]))
        b = slice(int(other.offsets[t]), int(other.offsets[t + 1]))
        assert torch.equal(one.loss_rows[a], other.loss_rows[b])


def test_groups_with_the_same_prompt_stay_apart():
    tree = PrefixTree.from_groups([[1], [1]], [[[2]], [[2]]])
    assert tree.M == 4
    assert tree.group.tolist() == [0, 1]


def test_tokens_may_be_tensors_or_arrays():
    plain = PrefixTree.from_groups([[1, 2]], [[[3], [4, 5]]])
    mixed = PrefixTree.from_groups([torch.tensor([1, 2])], [[np.array([3], dtype=np.int32), torch.tensor([4, 5])]])
    assert torch.equal(plain.input_ids, mixed.input_ids)
    paths = PrefixTree.from_paths([torch.tensor([1, 2, 3]), (1, 2, 4), np.array([1], dtype=np.int32), [5]])
    expected = PrefixTree.from_paths([[1, 2, 3], [1, 2, 4], [1], [5]])
    for name in ("input_ids", "end", "target", "loss_rows", "last_rows", "offsets", "group", "node_table"):
        assert torch.equal(getattr(paths, name), getattr(expected, name)), name


def test_to_moves_index_tensors_and_keeps_the_host_table():
    tree = PrefixTree.from_groups([[1, 2]], [[[3], [4]]]).to("meta")
    assert tree.device.type == tree.end.device.type == tree.loss_rows.device.type == "meta"
    assert tree.node_table.device.type == "cpu"


def test_stats():
    stats = PrefixTree.from_groups([[0] * 10], [[[1] * 5, [2] * 5, []]]).stats()
    assert (stats.tokens_before, stats.tokens_after) == (30, 20)
    assert stats.token_bound == 1.5
    assert stats.attention_bound == (2 * 15 * 16 / 2) / (10 * 11 / 2 + 2 * sum(range(11, 16)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PrefixTree.from_groups([[1], []], [[[2]], [[3]]]), r"prompts\[1\].*empty prompt"),
        (lambda: PrefixTree.from_groups([[1]], []), "responses: expected one list per prompt"),
        (lambda: PrefixTree.from_groups([], []), "prompts: expected at least one prompt"),
        (lambda: PrefixTree.from_groups([[1]], [[[[2]]]]), r"responses\[0\]\[0\]"),
        (lambda: PrefixTree.from_paths([]), "paths: expected at least one path"),
        (lambda: PrefixTree.from_paths([[1], []]), r"paths\[1\].*empty path"),
        (lambda: PrefixTree.from_paths([[1.5]]), r"paths\[0\].*float64"),
        (lambda: PrefixTree.from_paths([[1], [2, 1.5]]), r"paths\[1\].*float64"),
        (lambda: PrefixTree.from_paths([[1], [[2]]]), r"paths\[1\].*2 dimensions"),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
