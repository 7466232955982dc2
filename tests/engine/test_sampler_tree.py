"""Branching: any prefix goes on, nothing is computed twice, and random numbers belong to places in the tree."""

from __future__ import annotations

import copy

import pytest
import torch
from decoder_cases import build

import rlcore as rl
from rlcore.adapters.transformers import head
from rlcore.engine.sampler import sample
from rlcore.engine.sampler_tree import Sampler
from rlcore.engine.seeding import generator

PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 7], [5, 6, 12, 13], [5]]
EOS = 2


def sampler(model, seed=0, length=6, **options):
    return Sampler(model, max_new_tokens=length, eos_id=EOS, pad_id=0, seed=seed, **options)


def model_of(name="Qwen3"):
    """Flat distributions, so that sequences of all lengths come up."""
    return build(name, initializer_range=0.1).eval()


@pytest.fixture(scope="module")
def model():
    return model_of()


def check_logp(model, tree, node, temperature=1.0):
    """A sequence's log-probs against one plain forward pass over its path."""
    it, path = tree.nodes[node], tree.path(node)
    with torch.no_grad():
        logits = model(torch.tensor([path])).logits[0, it.at - 1 : -1]
    expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(it.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(it.model_logp), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(it.behaviour_logp), expected, atol=2e-5, rtol=0)


class Passed:
    """The shapes [rows, tokens] that went through a model inside the block."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.shapes = []
        self.hook = self.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape)),
            with_kwargs=True,
        )
        return self

    def __exit__(self, *error):
        self.hook.remove()

    @property
    def tokens(self):
        return sum(rows * tokens for rows, tokens in self.shapes)


def grow(tree, prompts=PROMPTS):
    """A tree with branches of every kind; returns the sequences that were sampled."""
    starts = tree.start(prompts)
    for node in starts:
        tree.branch(node, 3)
    for _ in range(3):
        tree.step()
    sampled = [i for i, node in enumerate(tree.nodes) if node.limit]
    running = next(i for i in sampled if tree.nodes[i].running)
    deep = tree.branch(running, 2, at=tree.nodes[running].at + 1)  # from the middle of one that runs
    tree.branch(running, 2)  # from where it is
    tree.branch(starts[0], 1, at=4)  # from inside of a prompt
    tree.run()
    for node in deep:
        assert len(tree.path(node)) > tree.nodes[node].at
        again = tree.branch(node, 2, at=tree.nodes[node].at + 1)  # a branch of a branch, from one that has ended
        tree.run()
        tree.branch(again[0], 1, at=tree.nodes[node].at)  # through it, from its parent
    tree.run()
    return [i for i, node in enumerate(tree.nodes) if node.limit]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "Gemma2", "GptOss"])
def test_log_probs_are_those_of_a_fresh_pass(name, temperature):
    """Also beyond sliding windows of four tokens, which branches from before the window reach."""
    model = model_of(name)
    tree = sampler(model, length=9, temperature=temperature)
    for node in grow(tree):
        check_logp(model, tree, node, temperature)


def test_sequences_end_and_hold_what_they_say(model):
    tree = sampler(model)
    sampled = grow(tree)
    lengths = set()
    for node in sampled:
        it = tree.nodes[node]
        assert tree.path(node)[: it.at] == tree.path(it.parent)[: it.at] and tree.path(node)[it.at :] == it.tokens
        assert EOS not in it.tokens[:-1] and (it.tokens[-1] == EOS or len(it.tokens) == 6)
        lengths.add(len(it.tokens))
        # Its own tokens but the last, and the one before them.
        assert all(k.shape[1] == v.shape[1] == len(it.tokens) for k, v in it.kv)
    assert len(lengths) > 2 and not tree._cache.layers


def test_no_prefix_is_computed_again(model):
    """Every prompt token but the last once, every sampled token but the last once, and one more for each branch."""
    tree = sampler(model)
    with Passed(model) as passed:
        starts = tree.start(PROMPTS)
        assert passed.shapes == [(1, 1), (3, 4)], "what all begin with, then the rest but the last, padded"
        passed.shapes.clear()
        children = [tree.branch(node, 4) for node in starts]
        tree.step()
        assert passed.shapes == [(4, 1)], "one row for each branch, not one for each sequence"
        tree.run()
        drawn = sum(len(tree.nodes[i].tokens) for group in children for i in group)
        assert passed.tokens == 4 + drawn - 16
        longest = max(children[0], key=lambda i: len(tree.nodes[i].tokens))
        passed.shapes.clear()
        new = tree.branch(longest, 5, at=tree.nodes[longest].at + 2)
        new += tree.branch(longest, 1, at=tree.nodes[longest].at + 2)
        tree.run()
        assert passed.shapes[0] == (1, 1) and all(tokens == 1 for _, tokens in passed.shapes)
        assert passed.tokens == 1 + sum(len(tree.nodes[i].tokens) - 1 for i in new)


def test_a_running_sequence_and_its_branches_share_a_row(model):
    tree = sampler(model)
    node = tree.branch(tree.start([PROMPTS[0]])[0])[0]
    tree.step()
    assert tree.nodes[node].running
    with Passed(model) as passed:
        tree.branch(node, 3)
        tree.step()
        assert passed.shapes == [(1, 1)]


def test_only_what_runs_is_copied(model):
    """At rest: one key per prompt token but the last (shared ones once), and one per sampled token."""
    tree = sampler(model, length=5)
    first = tree.start([PROMPTS[0], PROMPTS[1]])
    held = [sum(node.kv[0][0].shape[1] for node in tree.nodes if node.kv)]
    assert held == [2 + (5 - 1) + (2 - 1)]  # a branch's keys begin one token before its own
    children = tree.branch(first[0], 2) + tree.branch(first[1], 2)
    tree.step()
    rows = [i for i in children if tree.nodes[i].running]
    assert tree._cache.layers[0].keys.shape[0] == len(rows)
    assert tree._cache.layers[0].keys.shape[2] == max(len(tree.path(i)) - 1 for i in rows)
    tree.run()
    assert sum(node.kv[0][0].shape[1] for node in tree.nodes) == held[0] + sum(
        len(tree.nodes[i].tokens) for i in children
    )
    assert all(k.untyped_storage().nbytes() == k.numel() * 4 for node in tree.nodes for pair in node.kv for k in pair)


def test_columns_that_nothing_needs_are_left_out(model):
    tree = sampler(model)
    long, short = (tree.branch(node)[0] for node in tree.start([PROMPTS[0], [5, 6]]))
    tree.nodes[long].limit = 1
    assert tree.step() == [long] and tree.nodes[short].running
    assert [layer.keys.shape[2] for layer in tree._cache.layers] == [len(tree.path(short)) - 1] * 3
    tree.run()
    check_logp(model, tree, short)


def answers(tree, nodes):
    return [tree.nodes[i].tokens for i in nodes]


def test_answers_do_not_depend_on_what_else_runs(model):
    alone = sampler(model)
    expected = alone.branch(alone.start([PROMPTS[0]])[0], 3)
    alone.run()
    kept = next(i for i in expected if len(alone.nodes[i].tokens) > 2)
    middle = alone.branch(kept, 2, at=8)
    alone.run()

    crowded = sampler(model)
    starts = crowded.start(PROMPTS)
    first = crowded.branch(starts[0], 2)
    crowded.branch(starts[2], 5)
    crowded.step()
    first += crowded.branch(starts[0], 1)
    crowded.step()
    others = crowded.branch(starts[0], 1, at=3)
    crowded.run()
    assert answers(crowded, first) == answers(alone, expected)
    same = crowded.branch(first[expected.index(kept)], 2, at=8)
    crowded.branch(others[0], 2, at=4)
    crowded.run()
    assert answers(crowded, same) == answers(alone, middle)
    other = sampler(model, seed=1)
    changed = other.branch(other.start([PROMPTS[0]])[0], 3)
    other.run()
    assert answers(other, changed) != answers(alone, expected)
    assert len({tuple(tokens) for tokens in answers(alone, expected)}) > 1


@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "GptOss"])
def test_what_is_read_after_a_prefix(name):
    """Tokens after a prompt, inside of it, after one that runs and one that ended: log-probs of a fresh pass."""
    model = model_of(name)
    tree = sampler(model, length=7)
    starts = tree.start([torch.tensor(prompt) for prompt in PROMPTS])
    children = tree.branch(starts[0], 20)
    for _ in range(2):
        tree.step()
    running = next(i for i in children if tree.nodes[i].running)
    read = [tree.extend(starts[3], [30, 31]), tree.extend(starts[1], [30, 31, 32], at=1)]
    read += [tree.extend(running, [33]), tree.extend(running, [34, 35, 36, 37, 38], at=len(PROMPTS[0]) + 1)]
    sampled = [i for node in read for i in tree.branch(node, 2)]
    tree.run()
    ended = next(i for i in children if tree.nodes[i].tokens[-1] == EOS)
    read.append(tree.extend(ended, [8, 9]))  # a turn behind the end token
    read.append(tree.extend(read[-1], [10]))
    sampled += tree.branch(read[-1], 3) + tree.branch(read[-1], 1, at=len(tree.path(ended)) + 1)
    tree.run()
    for node in (*sampled, *children):
        check_logp(model, tree, node)
    assert tree.path(read[1]) == [5, 30, 31, 32] and tree.path(read[-1]) == [*tree.path(ended), 8, 9, 10]
    table = tree.table()
    packed = rl.PrefixTree.from_nodes(*table, share=True)
    for s, node in enumerate(i for i, it in enumerate(tree.nodes) if it.limit):
        own = packed.target[int(packed.offsets[s]) : int(packed.offsets[s + 1])].tolist()
        parts = lineage(tree, node)[::-1]
        ends = [tree.nodes[after].at for after in parts[1:]] + [len(tree.path(node))]
        taken = [range(tree.nodes[i].at, end) for i, end in zip(parts, ends, strict=True) if tree.nodes[i].limit]
        assert own == [tree.path(node)[t] for part in taken for t in part], "what was read is no prediction"


def test_what_is_read_passes_once_and_holds_its_own_keys(model):
    tree = sampler(model)
    start = tree.start([PROMPTS[0]])[0]
    with Passed(model) as passed:
        read = tree.extend(start, [30, 31, 32])
        assert passed.shapes == [(1, 3)], "the prompt's last token, and all but the last that are read"
        passed.shapes.clear()
        tree.branch(read, 4)
        tree.step()
        assert passed.shapes == [(1, 1)]
    keys = tree.nodes[read].kv[0][0]
    assert keys.shape[1] == 3 and keys.untyped_storage().nbytes() == keys.numel() * 4


def test_every_branch_may_have_a_length_of_its_own(model):
    """The tokens that both have are the same: a number belongs to a place, not to a length."""
    found = []
    for lengths in ((3, 11), (11, 3), (None, None)):
        tree = sampler(model, length=8)
        start = tree.start([[5]])[0]
        nodes = [i for length in lengths for i in tree.branch(start, 6, max_new_tokens=length)]
        tree.run()
        found.append(answers(tree, nodes))
        for i, node in enumerate(nodes):
            most = lengths[i // 6] or 8
            tokens = tree.nodes[node].tokens
            assert len(tokens) == most or (len(tokens) < most and tokens[-1] == EOS)
    assert {len(tokens) for tokens in found[0]} & {9, 10, 11}
    for rows in zip(*found, strict=True):
        least = min(map(len, rows))
        assert len({tuple(tokens[:least]) for tokens in rows}) == 1


def test_same_distribution_as_sample(model):
    """With the numbers of `sample` in place of its own, the same answers and log-probs."""
    drawn = sample(model, PROMPTS, 3, max_new_tokens=6, eos_id=EOS, pad_id=0, generator=generator(4), top_k=9)
    table = torch.rand(12, 6, generator=generator(4)).tolist()
    tree = sampler(model, top_k=9)
    nodes = [i for node in tree.start(PROMPTS) for i in tree.branch(node, 3)]
    for node, row in zip(nodes, table, strict=True):
        tree.nodes[node].uniform = row
    tree.run()
    for r, node in enumerate(nodes):
        it, length = tree.nodes[node], int(drawn.lengths[r])
        assert it.tokens == drawn.ids[r, :length].tolist()
        for ours, theirs in ((it.behaviour_logp, drawn.behaviour_logp), (it.model_logp, drawn.model_logp)):
            torch.testing.assert_close(torch.tensor(ours), theirs[r, :length], atol=2e-5, rtol=0)


def test_the_table_makes_a_prefix_tree(model):
    """One path per sequence, predictions of all that was sampled, and the log-probs that it was sampled at."""
    tree = sampler(model)
    sampled = grow(tree)
    table = tree.table()
    assert sum(map(len, table.tokens)) == sum(len(node.tokens) for node in tree.nodes)
    packed = rl.PrefixTree.from_nodes(*table)
    attached = rl.attach(copy.deepcopy(model))
    logp = rl.linear_logprob(rl.trunk(attached, packed), target=packed.target, **head(attached)._asdict()).logp
    for s, node in enumerate(sampled):
        own, it = slice(int(packed.offsets[s]), int(packed.offsets[s + 1])), tree.nodes[node]
        first = min(tree.nodes[i].at for i in lineage(tree, node) if tree.nodes[i].limit)
        assert packed.target[own].tolist() == tree.path(node)[first:]
        torch.testing.assert_close(logp[own][-len(it.tokens) :], torch.tensor(it.model_logp), atol=2e-5, rtol=0)
    assert tree.table([sampled[3]]).leaves == [table.leaves[3]]


def lineage(tree, node):
    """The node and all that it goes back to."""
    return [node, *lineage(tree, tree.nodes[node].parent)] if node >= 0 else []


def test_bad_input(model):
    tree = sampler(model)
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected at least one token"):
        tree.start([[1], []])
    node = tree.start([[5, 6]])[0]
    for arguments, message in (
        ({"node": 9}, "node: expected one of 1 nodes, got 9"),
        ({"node": node, "at": 3}, "at: expected 1 to 2, the tokens of node 0, got 3"),
        ({"node": node, "at": 0}, "at: expected 1 to 2"),
        ({"node": node, "at": 1.5}, "at: expected 1 to 2, the tokens of node 0, got 1.5"),
        ({"node": node, "n": 0}, "n: expected a positive int, got 0"),
        ({"node": node, "max_new_tokens": 0}, "max_new_tokens: expected a positive int, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tree.branch(**arguments)
    for arguments, message in (
        ((node, []), "tokens: expected at least one token, got none"),
        ((node, [1, 40]), "tokens: expected ids below 40, got 1 to 40"),
        ((node, 3), "tokens: expected a list of token ids"),
        ((node, [1], 3), "at: expected 1 to 2, the tokens of node 0, got 3"),
        ((9, [1]), "node: expected one of 1 nodes, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            tree.extend(*arguments)
    for prompts, message in (
        ([1, 2], r"prompts\[0\]: expected a list of token ids"),
        ([[1], [-1]], r"prompts\[1\]: expected ids below 40, got -1 to -1"),
        (torch.rand(1, 2), r"prompts\[0\]: expected a list of token ids, got 1 dimensions of float32"),
    ):
        with pytest.raises(ValueError, match=message):
            tree.start(prompts)
    with pytest.raises(TypeError, match="prompts: expected a list, got 5"):
        tree.start(5)
    with pytest.raises(ValueError, match="node: expected one of 1 nodes, got 99"):
        tree.path(99)
    assert len(tree.nodes) == 1 and tree.start([]) == []
    with pytest.raises(ValueError, match=r"sequences\[0\]: expected one of 1 nodes, got -1"):
        tree.table([-1])
    with pytest.raises(TypeError, match="sequences: expected a list, got 3"):
        tree.table(3)
    for setting, value in (("temperature", 0.0), ("temperature", "1"), ("top_k", -1), ("top_p", 0.0), ("length", 0)):
        name = "max_new_tokens" if setting == "length" else setting
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value!r}"):
            sampler(model, **{setting: value})
    children = tree.branch(node, 40)
    tree.run()
    ended = next(i for i in children if tree.nodes[i].tokens[-1] == EOS)
    with pytest.raises(ValueError, match="is the end token"):
        tree.branch(ended)


def test_refuses_layers_that_keep_no_keys():
    import transformers

    config = transformers.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match="model"):
        sampler(transformers.MambaForCausalLM(config)).start([[1, 2, 3]])
    chunked = build("Llama", layer_types=["chunked_attention"] * 3)
    with pytest.raises(ValueError, match="chunked_attention"):
        sampler(chunked)


def test_refuses_depths_at_which_sequences_depend_on_each_other():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tree = sampler(build("Llama", rope_parameters=rope, max_position_embeddings=12).eval())
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected at most 12 tokens .*, got 13 \+ 0"):
        tree.start([[5], [7] * 13])
    node = tree.branch(tree.start([[5, 6, 7, 8, 9, 10]])[0])[0]
    tree.step()
    with pytest.raises(ValueError, match=r"at: expected at most 12 tokens with those that may follow, got 7 \+ 6"):
        tree.branch(node)
    with pytest.raises(ValueError, match=r"tokens: expected at most 12 tokens .*, got 13 \+ 0"):
        tree.extend(node, [5] * 6)
    short = tree.branch(tree.extend(node, [5]), max_new_tokens=4)[0]
    tree.run()
    check_logp(tree.model, tree, node)
    check_logp(tree.model, tree, short)
