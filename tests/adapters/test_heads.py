"""Value heads, reward heads and bare decoders on trees, against single sequences: values and every gradient."""

import copy

import pytest
import torch

import rlcore as rl
from rlcore.adapters.transformers import AttachError, head

transformers = pytest.importorskip("transformers")
from decoder_cases import SHAPES, build  # noqa: E402

ARCHITECTURES = ["Qwen3", "Mistral", "GptOss", "Gemma2"]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one, other):
    """Values and gradients to 1e-5 of their norms; gradients at least of 1e-2 of the norm of all."""
    (found, ours), (expected, theirs) = one, other
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert ours.keys() == theirs.keys()
    floor = 1e-2 * torch.stack([g.norm() for g in theirs.values()]).norm()
    for name, g in theirs.items():
        assert g.norm() > 0 and (ours[name] - g).norm() <= 1e-5 * max(g.norm(), floor), name


def compare(model, on_tree, on_one):
    """on_tree(model, tree) against on_one(model, ids, predictions) of all sequences, concatenated."""
    plain = copy.deepcopy(model).eval()
    rl.attach(model)
    for shape in SHAPES.values():
        tree, sequences = shape()
        counts = tree.offsets.diff().tolist()
        found = on_tree(model, tree)
        expected = torch.cat(
            [on_one(plain, torch.tensor([ids]), n) for ids, n in zip(sequences, counts, strict=True)]
        )
        weights = torch.randn(expected.shape)
        one, other = ((x.detach(), gradients(m, (x * weights).sum())) for m, x in ((model, found), (plain, expected)))
        assert_close(one, other)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_score_per_path(name):
    """A reward head at the last token of every path, also of paths that end inside of others or are empty answers."""
    model = build(name, kind="ForSequenceClassification", num_labels=2)
    compare(
        model,
        lambda m, tree: m.score(rl.trunk(m, tree, rows="last")),
        lambda m, ids, n: m(ids, use_cache=False).logits,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_value_per_prediction(name):
    """A value head on the rows that the policy's loss reads."""
    if not hasattr(transformers, f"{name}ForTokenClassification"):
        pytest.skip("transformers has no such model")
    model = build(name, kind="ForTokenClassification", num_labels=1, classifier_dropout=0.0)
    compare(
        model,
        lambda m, tree: m.score(rl.trunk(m, tree)),
        lambda m, ids, n: m(ids, use_cache=False).logits[0, ids.shape[1] - n - 1 : -1],
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bare_decoders(name):
    def states(model, tree):
        hidden = rl.trunk(model, tree, rows="all")
        torch.testing.assert_close(hidden[tree.loss_rows], rl.trunk(model, tree))
        torch.testing.assert_close(hidden[tree.last_rows], rl.trunk(model, tree, rows="last"))
        return hidden[tree.loss_rows]

    compare(
        build(name, kind="Model"),
        states,
        lambda m, ids, n: m(ids, use_cache=False).last_hidden_state[0, ids.shape[1] - n - 1 : -1],
    )


def test_rows_of_a_causal_model():
    model = rl.attach(build("Qwen3"))
    tree, _ = SHAPES["flat groups"]()
    hidden = rl.trunk(model, tree, rows="all")
    torch.testing.assert_close(hidden[tree.last_rows], rl.trunk(model, tree, rows="last"))
    with pytest.raises(ValueError, match=r'rows: expected "loss", "last" or "all", got \'first\''):
        rl.trunk(model, tree, rows="first")


def test_adapters_under_a_reward_head():
    """PEFT trains the score head as a whole beside the adapters."""
    peft = pytest.importorskip("peft")
    base = build("Qwen3", kind="ForSequenceClassification", num_labels=1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    compare(
        model,
        lambda m, tree: m.base_model.model.score(rl.trunk(m, tree, rows="last")),
        lambda m, ids, n: m(ids, use_cache=False).logits,
    )


def test_there_is_no_vocabulary_head():
    model = rl.attach(build("Qwen3", kind="ForSequenceClassification"))
    with pytest.raises(ValueError, match="a vocabulary head, got Qwen3ForSequenceClassification"):
        head(model)


def test_refuses_what_differs_without_a_head_too(monkeypatch):
    with pytest.raises(AttachError, match=r"training mode changes the hidden states by .*: active dropout"):
        rl.attach(build("GPTNeoX", kind="Model", hidden_dropout=0.1))
    model = build("Mistral", kind="ForSequenceClassification", sliding_window=100)
    original = rl.adapters.transformers._tree_attention
    monkeypatch.setattr(
        rl.adapters.transformers,
        "_tree_attention",
        lambda *a, **k: original(*a, **{**k, "sliding_window": None}),
    )
    with pytest.raises(AttachError, match="hidden states on a tree differ from those of single sequences"):
        rl.attach(model)


def test_refuses_a_language_model_without_its_head():
    model = build("Qwen3")
    model.lm_head = None
    with pytest.raises(AttachError, match="no output head"):
        rl.attach(model)
