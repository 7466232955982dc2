import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
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
    tree = PrefixTree.from_paths(paths, share=True)
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
    tree = PrefixTree.from_paths(paths, share=True)
    check_packing(tree, paths, oracle.trie_rows(paths), [1] * len(paths))
    assert tree.M == len({tuple(path[: n + 1]) for path in paths for n in range(len(path))})


def test_paths_that_extend_one_another():
    """Deeper than 255 and 65,535 tokens, where the depths are sorted as wider integers."""
    for length, step in ((300, 1), (70_000, 9_000)):
        paths = [[7] * n + [n % 3] for n in range(length, 0, -step)]
        tree = PrefixTree.from_paths(paths, share=True)
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
    tree = PrefixTree.from_groups(prompts, responses, share=True)
    rows = oracle.group_rows(prompts, responses)
    sequences = [p + r for p, answers in groups for r in answers]
    assert tree.M == sum(len(p) + sum(map(len, r)) for p, r in groups)
    first = [len(p) for p, answers in groups for _ in answers]
    check_packing(tree, sequences + prompts, rows, first)
    assert tree.group.tolist() == [g for g, answers in enumerate(responses) for _ in answers]


@given(paths_strategy)
@settings(max_examples=30, deadline=None)
def test_nodes_are_the_unbranched_runs(paths):
    tree = PrefixTree.from_paths(paths, share=True)
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
    assert [x.tolist() for x in tree.loss_reads] == [[1, 2, 5], [0, 1, 0, 2]]
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
    one, other = (PrefixTree.from_paths(ordered, share=True) for ordered in (paths, [paths[s] for s in order]))
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
    whole = PrefixTree.from_groups(torch.tensor([[1, 2], [1, 3]]), torch.tensor([[[4, 5]], [[6, 7]]]))
    assert whole.input_ids.tolist() == [1, 2, 4, 5, 1, 3, 6, 7]
    paths = PrefixTree.from_paths([torch.tensor([1, 2, 3]), (1, 2, 4), np.array([1], dtype=np.int32), [5]])
    expected = PrefixTree.from_paths([[1, 2, 3], [1, 2, 4], [1], [5]])
    for name in ("input_ids", "end", "target", "loss_rows", "last_rows", "offsets", "group", "node_table"):
        assert torch.equal(getattr(paths, name), getattr(expected, name)), name


def test_to_moves_index_tensors_and_keeps_the_host_table():
    tree = PrefixTree.from_groups([[1, 2]], [[[3], [4]]]).to("meta")
    assert tree.device.type == tree.end.device.type == tree.loss_rows.device.type == "meta"
    assert all(x.device.type == "meta" for x in (*tree.loss_reads, *tree.last_reads))
    assert tree.node_table.device.type == "cpu"


def test_stats():
    stats = PrefixTree.from_groups([[0] * 10], [[[1] * 5, [2] * 5, []]]).stats()
    assert (stats.tokens_before, stats.tokens_after) == (30, 20)
    assert stats.token_bound == 1.5
    assert stats.attention_bound == (2 * 15 * 16 / 2) / (10 * 11 / 2 + 2 * sum(range(11, 16)))
    for silent in (PrefixTree.from_groups([[1, 2]], [[[], []]]), PrefixTree.from_groups([[1, 2]], [[]])):
        assert silent.stats() == (0, 2, 1.0, 1.0, True)


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
        (lambda: PrefixTree.from_paths([[1], [2, [3]]]), r"paths\[1\]: expected a list of token ids"),
        (lambda: PrefixTree.from_paths([[1], [2**63]]), r"paths\[1\]: .* int64 holds, got 9223372036854775808"),
        (lambda: PrefixTree.from_groups([[2**63]], [[[1]]]), r"prompts\[0\]: .* int64 holds"),
        (lambda: PrefixTree.from_paths([[1, 2]], predict=[2**70]), r"predict\[0\]: expected an index from 1 to 2"),
        (lambda: PrefixTree.from_paths([[1, 2]], predict=[[0, [1]]]), r"predict\[0\].*2 zeros and ones"),
        (lambda: PrefixTree.from_paths([[1, 2]], predict=[0]), r"predict\[0\]: expected an index from 1 to 2.*got 0"),
        (lambda: PrefixTree.from_paths([[1, 2]], predict=[3]), r"predict\[0\]: expected an index from 1 to 2.*got 3"),
        (lambda: PrefixTree.from_paths([[1, 2], [1, 2]], predict=[1, [1, 1]]), r"predict\[1\].*0 first"),
        (lambda: PrefixTree.from_paths([[1, 2]], predict=[[0, 1, 1]]), r"predict\[0\].*2 zeros and ones"),
        (lambda: PrefixTree.from_paths([[1, 2]], predict=[[0, 2]]), r"predict\[0\]"),
        (lambda: PrefixTree.from_paths([[1, 2]], predict=[None]), r"predict\[0\].*got None"),
        (lambda: PrefixTree.from_paths([[1, 2]], predict=[True]), r"predict\[0\].*got True"),
        (lambda: PrefixTree.from_paths([[1, 2]], predict=[1, 1]), r"predict: expected one entry for each of 1, got 2"),
        (lambda: PrefixTree.from_paths([[1, 2]], group=[0, 1]), "group: expected one id for each of 1 paths, got 2"),
        (lambda: PrefixTree.from_paths([[1, 2]], group=[0.5]), "group: .*float64"),
        (lambda: PrefixTree.from_nodes([[1], [2]], [-1, 0], group=[0, 1]), "group: .* each of 1 paths, got 2"),
        (lambda: PrefixTree.from_nodes([], []), "tokens: expected at least one node"),
        (lambda: PrefixTree.from_nodes([[1], [2]], [-1]), "parent: expected one index for each of 2 nodes, got 1"),
        (lambda: PrefixTree.from_nodes([[1], [2]], [-1, 2]), r"parent\[1\].*got 2"),
        (lambda: PrefixTree.from_nodes([[1], [2]], [-1, -2]), r"parent\[1\].*got -2"),
        (lambda: PrefixTree.from_nodes([[1], [2], [3]], [-1, 2, 1]), r"parent\[1\]: .* cycle"),
        (lambda: PrefixTree.from_nodes([[1]], [0]), r"parent\[0\]: .* cycle"),
        (lambda: PrefixTree.from_nodes([[], []], [-1, 0]), "tokens: .* none on the one to node 1"),
        (lambda: PrefixTree.from_nodes([[1], [[2]]], [-1, 0]), r"tokens\[1\].*2 dimensions"),
        (lambda: PrefixTree.from_nodes([[1]], [-1], leaves=[1]), r"leaves\[0\]: .* got 1"),
        (lambda: PrefixTree.from_nodes([[1]], [-1], leaves=[]), "leaves: expected at least one"),
        (lambda: PrefixTree.from_nodes([[1]], [-1], leaves=0), "leaves: expected a list of indices"),
        (lambda: PrefixTree.from_nodes([[1]], 0), "parent: expected a list of indices"),
        (lambda: PrefixTree.from_nodes([[1, 2], [3]], [-1, 0], predict=[0, 0]), r"predict\[0\]: .* from 1"),
        (lambda: PrefixTree.from_nodes([[], [3]], [-1, 0], predict=[0, 0]), r"predict\[1\]: .* from 1"),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["paths", "predict", "group", "responses", "tokens"])
def test_errors_name_what_is_no_list(name):
    calls = {
        "responses": lambda: PrefixTree.from_groups([[1]], [2]),
        "tokens": lambda: PrefixTree.from_nodes(2, [-1]),
    }
    with pytest.raises(TypeError, match=rf"^{name}(\[0\])?: expected a list, got 2"):
        calls.get(name, lambda: PrefixTree.from_paths(**{"paths": [[1, 2]], name: 2}))()


# ---- which tokens are predictions


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_predict_chooses_among_the_predictions_of_all(data):
    paths = data.draw(paths_strategy)
    whole = PrefixTree.from_paths(paths, share=True)
    masks, given_as = [], []
    for path in paths:
        if data.draw(st.booleans()):
            n = data.draw(st.integers(1, len(path)))
            masks.append([int(t >= n) for t in range(len(path))])
            given_as.append(n)
        else:
            masks.append([0, *data.draw(st.lists(st.integers(0, 1), min_size=len(path) - 1, max_size=len(path) - 1))])
            given_as.append(masks[-1])
    group = [data.draw(st.integers(0, 3)) for _ in paths]
    tree = PrefixTree.from_paths(paths, predict=given_as, group=group, share=True)
    kept = torch.tensor([bit for mask in masks for bit in mask[1:]], dtype=torch.bool)
    assert torch.equal(tree.target, whole.target[kept])
    assert torch.equal(tree.loss_rows, whole.loss_rows[kept])
    assert tree.offsets.diff().tolist() == [sum(mask) for mask in masks]
    assert tree.group.tolist() == group
    for name in ("input_ids", "position", "end", "last_rows", "node_table"):
        assert torch.equal(getattr(tree, name), getattr(whole, name))


def test_forced_tokens_are_read_and_not_predicted():
    """A tool's answer between two turns: 5 and 6 are context for 7, and the loss does not know them."""
    tree = PrefixTree.from_paths([[1, 2, 5, 6, 7]], predict=[[0, 1, 0, 0, 1]])
    assert tree.target.tolist() == [2, 7] and tree.loss_rows.tolist() == [0, 3]
    assert tree.input_ids.tolist() == [1, 2, 5, 6, 7]


# ---- trees of nodes


@st.composite
def node_trees(draw):
    """Node tokens (some empty), parents before or after their children, and leaves: any nodes, also twice."""
    K = draw(st.integers(1, 9))
    tokens = draw(st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=K, max_size=K))
    above = [draw(st.integers(-1, i - 1)) for i in range(K)]
    name = draw(st.permutations(range(K)))
    parent = [-1] * K
    for i, p in enumerate(above):
        parent[name[i]] = -1 if p < 0 else name[p]
    paths = [path_of(k, parent) for k in range(K)]
    able = [k for k in range(K) if any(tokens[j] for j in paths[k])]
    assume(able)
    return tokens, parent, draw(st.lists(st.sampled_from(able), min_size=1, max_size=6))


def path_of(node, parent):
    return ([] if parent[node] < 0 else path_of(parent[node], parent)) + [node]


@given(node_trees(), st.data())
@settings(max_examples=80, deadline=None)
def test_nodes_are_a_trie_of_named_tokens(case, data):
    """Tokens renamed so that no two nodes agree: the trie of the renamed paths is the tree of the nodes."""
    tokens, parent, leaves = case
    named = [[100 * (i + 1) + j for j in range(len(own))] for i, own in enumerate(tokens)]
    bits = [data.draw(st.lists(st.integers(0, 1), min_size=len(own), max_size=len(own))) for own in tokens]
    for k, own in enumerate(tokens):
        if own and not any(tokens[j] for j in path_of(k, parent)[:-1]):
            bits[k][0] = 0
    paths = [path_of(leaf, parent) for leaf in leaves]
    spelled = [[token for k in path for token in named[k]] for path in paths]
    predict = [[bit for k in path for bit in bits[k]] for path in paths]
    tree = PrefixTree.from_nodes(tokens, parent, bits, leaves, share=True)
    trie = PrefixTree.from_paths(spelled, predict=predict, share=True)
    real = {name: tokens[name // 100 - 1][name % 100] for names in named for name in names}
    assert tree.M == trie.M and torch.equal(tree.offsets, trie.offsets)
    assert tree.target.tolist() == [real[name] for name in trie.target.tolist()]
    rows = [path_rows(tree, int(last)) for last in tree.last_rows]
    for path, own in zip(spelled, rows, strict=True):
        assert tree.input_ids[own].tolist() == [real[name] for name in path]
    # One row of the one is one row of the other: the same paths run through both.
    others = [path_rows(trie, int(last)) for last in trie.last_rows]
    pairs = {pair for own, other in zip(rows, others, strict=True) for pair in zip(own, other, strict=True)}
    assert len(pairs) == tree.M
    there = dict(pairs)
    assert [there[row] for row in tree.loss_rows.tolist()] == trie.loss_rows.tolist()
    assert oracle.keys_of_rows(rows) == [[j for j in range(i + 1) if i < tree.end[j]] for i in range(tree.M)]


def path_rows(tree, last):
    return [row for row in range(last + 1) if tree.end[row] > last]


def test_worked_example_of_nodes():
    """Two turns that branch, children before their parent, an empty node, siblings that agree."""
    tree = PrefixTree.from_nodes([[7], [1, 2], [7], [], [8, 9]], [1, -1, 1, 1, 3], predict=[0, 1, 0, 0, [0, 1]])
    assert tree.input_ids.tolist() == [1, 2, 7, 7, 8, 9]
    assert tree.end.tolist() == [6, 6, 3, 4, 6, 6]
    assert tree.position.tolist() == [0, 1, 2, 2, 2, 3]
    assert tree.target.tolist() == [2, 7, 2, 7, 2, 9] and tree.loss_rows.tolist() == [0, 1, 0, 1, 0, 4]
    assert tree.offsets.tolist() == [0, 2, 4, 6] and tree.last_rows.tolist() == [2, 3, 5]
    assert torch.equal(PrefixTree.from_nodes([[1], [2], [3]], [-1, 0, 0], group=[4, 2]).group, torch.tensor([4, 2]))
    chosen = PrefixTree.from_nodes([[7], [1, 2], [7], [], [8, 9]], [1, -1, 1, 1, 3], leaves=[3, 0])
    assert chosen.input_ids.tolist() == [1, 2, 7] and chosen.last_rows.tolist() == [1, 2]
    assert chosen.target.tolist() == [2, 2, 7]


def test_roots_are_numbered_by_their_first_path():
    tree = PrefixTree.from_nodes([[1], [2], [3], [4], [5]], [-1, -1, 1, 0, 0], leaves=[2, 3, 4, 2])
    assert tree.group.tolist() == [0, 1, 1, 0]


# ---- sharing turned off


@given(paths_strategy | node_trees(), st.data())
@settings(max_examples=60, deadline=None)
def test_unshared_paths_are_trees_of_their_own(case, data):
    if isinstance(case, tuple):
        tree = PrefixTree.from_nodes(case[0], case[1], leaves=case[2], share=True)
    else:
        predict = [data.draw(st.integers(1, len(path))) for path in case]
        tree = PrefixTree.from_paths(case, predict=predict, share=True)
    alone = tree.unshared()
    spelled = [tree.input_ids[path_rows(tree, int(last))].tolist() for last in tree.last_rows]
    offset = np.cumsum([0, *map(len, spelled)]).tolist()
    rows = [list(range(a, b)) for a, b in zip(offset[:-1], offset[1:], strict=True)]
    assert alone.input_ids.tolist() == [token for path in spelled for token in path]
    assert alone.position.tolist() == [depth for path in spelled for depth in range(len(path))]
    assert alone.end.tolist() == [path[-1] + 1 for path in rows for _ in path]
    assert alone.last_rows.tolist() == [path[-1] for path in rows]
    for name in ("target", "offsets", "group"):
        assert torch.equal(getattr(alone, name), getattr(tree, name))
    assert torch.equal(alone.input_ids[alone.loss_rows], tree.input_ids[tree.loss_rows])
    assert torch.equal(alone.position[alone.loss_rows], tree.position[tree.loss_rows])
    for s, path in enumerate(rows):
        own = alone.loss_rows[int(alone.offsets[s]) : int(alone.offsets[s + 1])].tolist()
        assert set(own) <= set(path)
    assert len(alone.node_table) == alone.S and alone.depth == tree.depth
    assert alone.stats() == tree.stats()._replace(shared=False)
    assert alone.unshared() is alone


def test_sharing_is_off_where_it_can_not_pay():
    long = [[0, *[branch] * 300] for branch in (1, 2, 3)]
    tree = PrefixTree.from_paths(long)
    assert tree.M == 903 and tree.stats()[:2] == (903, 901) and not tree.stats().shared
    assert PrefixTree.from_paths(long, share=True).M == 901
    groups = ([[5]], [[path[1:] for path in long]])
    assert PrefixTree.from_groups(*groups).M == 903
    assert PrefixTree.from_groups(*groups, share=True).M == 901
    assert PrefixTree.from_groups([[5] * 300], groups[1]).stats().shared
    assert PrefixTree.from_groups([[5] * 300], groups[1], share=False).M == 1800
    assert PrefixTree.from_paths([[1, 2], [3, 4]]).stats().shared  # nothing to turn off
    nodes = ([[0], *(path[1:] for path in long)], [-1, 0, 0, 0])
    assert [PrefixTree.from_nodes(*nodes, share=share).M for share in (None, True, False)] == [903, 901, 903]
    # Few tokens are shared, but by far most query-key pairs: a long prompt beside many short paths.
    deep = PrefixTree.from_paths([[9] * 400 + [1], [9] * 400 + [2], *([i] * 8 for i in range(10, 1210))])
    assert deep.stats().token_bound < 1.05 < deep.stats().attention_bound and deep.stats().shared
    assert PrefixTree.from_groups([[1, 2]], [[]], share=False).M == 2  # a prompt without responses has no path
