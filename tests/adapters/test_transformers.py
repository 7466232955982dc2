"""Attached models on prefix trees against the same models, one sequence at a time."""

import copy
import time

import pytest
import torch

import rlcore as rl
from rlcore.adapters import transformers_last_layer as last_layer
from rlcore.adapters import transformers_probe as probe
from rlcore.adapters.transformers import AttachError, attach, head, trunk, unwrap
from rlcore.ops.vocab_head import linear_policy_loss
from rlcore.prefix_tree import PrefixTree

transformers = pytest.importorskip("transformers")
from decoder_cases import branching, build, flat_groups, random_trie, single_logits, tree_logits  # noqa: E402


def loss_of(logits, tree, weights):
    return (torch.log_softmax(logits, dim=-1).gather(1, tree.target[:, None])[:, 0] * weights).sum()


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, tolerance, label=""):
    (loss, gradients), (expected, references) = one, other
    assert abs(loss - expected) <= tolerance * abs(expected), f"{label}: loss {loss} against {expected}"
    assert gradients.keys() == references.keys()
    floor = 1e-2 * sum(float(g.double().square().sum()) for g in references.values()) ** 0.5
    for name, reference in references.items():
        distance = float((gradients[name] - reference).double().norm())
        allowed = tolerance * max(float(reference.double().norm()), floor)
        assert distance <= allowed, f"{label} {name}: {distance:.2e} against {allowed:.2e}"


def check_exact(model, tolerance):
    reference = copy.deepcopy(model)
    attach(model)
    for tree, sequences in (flat_groups(), random_trie()):
        weights = torch.randn(tree.N, dtype=model.dtype)
        one = loss_and_gradients(model, loss_of(tree_logits(model, tree), tree, weights))
        other = loss_and_gradients(reference, loss_of(single_logits(reference, tree, sequences), tree, weights))
        assert_same(one, other, tolerance, type(model).__name__)


@pytest.mark.parametrize("name", ["Qwen3", "Gemma2", "GptOss"])
def test_tree_equals_single_sequences_under_eager_attention(name):
    check_exact(build(name, attn_implementation="eager"), 1e-5)


@pytest.mark.parametrize("name", ["Qwen3", "Llama"])
def test_tree_equals_single_sequences_in_float64(name, monkeypatch):
    """With norms that stay in float64 (transformers rounds them to float32) nothing but float64 rounding is left."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    model = build(name, dtype=torch.float64)
    monkeypatch.setattr(type(model.model.norm), "forward", norm)
    check_exact(model, 1e-10)


def objective_batch(tree, sequences, padded):
    """GRPO on made-up advantages and behaviour log-probs; padded repeats every prompt in front of its response."""
    generator = torch.Generator().manual_seed(7)
    advantage = torch.randn(tree.S, generator=generator)
    old = -torch.rand(tree.N, generator=generator) * 4
    if not padded:
        return rl.TokenBatch(tree.target, tree.offsets, advantage=rl.per_token(advantage, tree.offsets), old_logp=old,
                             group=tree.group)  # fmt: skip
    width = max(map(len, sequences))
    target = torch.full((tree.S, width), -100)
    mask = torch.zeros(tree.S, width, dtype=torch.bool)
    old_padded = torch.full((tree.S, width), float("nan"))
    for s, tokens in enumerate(sequences):
        own = slice(int(tree.offsets[s]), int(tree.offsets[s + 1]))
        place = slice(len(tokens) - (own.stop - own.start) - 1, len(tokens) - 1)
        target[s, place], mask[s, place], old_padded[s, place] = tree.target[own], True, old[own]
    return rl.TokenBatch(target, mask=mask, advantage=advantage, old_logp=old_padded, group=tree.group)


@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean"])
def test_policy_update_through_the_tree_equals_repeated_padded_prompts(aggregate):
    """The acceptance item: loss and every gradient to 1e-5 relative, ragged prompts and responses."""
    model = build("Qwen3")
    reference = copy.deepcopy(model)
    objective = rl.Objective(clip=(0.2, 0.28), entropy=0.01, aggregate=aggregate)
    tree, sequences = flat_groups()
    attach(model)
    h = head(model)
    loss, metrics = linear_policy_loss(trunk(model, tree), h.weight, objective_batch(tree, sequences, False), objective,
                                       bias=h.bias, softcap=h.softcap, logit_scale=h.logit_scale)  # fmt: skip
    one = loss_and_gradients(model, loss)

    width = max(map(len, sequences))
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in sequences])
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    attention_mask = (torch.arange(width) < lengths[:, None]).long()
    hidden = reference.model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    loss, expected = linear_policy_loss(
        hidden, reference.lm_head.weight, objective_batch(tree, sequences, True), objective
    )
    assert_same(one, loss_and_gradients(reference, loss), 1e-5)
    for name in metrics:
        torch.testing.assert_close(metrics[name], expected[name], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "Gemma2"])
def test_without_a_tree_an_attached_model_behaves_as_before(name, implementation):
    if (name, implementation) == ("Gemma2", "sdpa"):
        pytest.skip("transformers gives Gemma 2 eager attention only")
    model = build(name, attn_implementation=implementation).eval()
    attached = attach(copy.deepcopy(model))
    ids = torch.randint(3, 40, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    left = {"input_ids": ids, "attention_mask": mask}
    right = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    for batch in (left, right, {"input_ids": ids}, {"input_ids": ids[:1], "position_ids": torch.arange(9)[None] % 4}):
        assert torch.equal(attached(**batch).logits, model(**batch).logits)
        model.train(), attached.train()
        one, other = (loss_and_gradients(m, m(**batch).logits.square().mean()) for m in (attached, model))
        assert one[0] == other[0] and all(torch.equal(one[1][n], other[1][n]) for n in other[1])
        model.eval(), attached.eval()
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 10}, {"num_beams": 2, "do_sample": False}):
        outputs = []
        for m in (attached, model):
            torch.manual_seed(1)
            outputs.append(m.generate(**left, max_new_tokens=12, min_new_tokens=12, **options))
        assert torch.equal(*outputs)
    cached, plain = (m(**left, use_cache=True) for m in (attached, model))
    for a, b in zip(cached.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, b.keys)


def test_saved_models_know_nothing_of_it(tmp_path):
    model = attach(build("Qwen3"))
    model.save_pretrained(tmp_path)
    assert "rlcore" not in (tmp_path / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    ids = torch.randint(3, 40, (2, 5))
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def _of_the_last_layer(hook):
    return getattr(hook, "__module__", None) == last_layer.__name__


def state_of(model):
    return (
        [m.training for m in model.modules()],
        {n: (p.data_ptr(), p.dtype, p.grad is None, p.requires_grad) for n, p in model.named_parameters()},
        {n: (b.clone(), b.data_ptr()) for n, b in model.named_buffers()},
        [dict(vars(c)) for c in probe.adapter.configs(model)],
        [sum(not _of_the_last_layer(hook) for hook in m._forward_hooks.values()) for m in model.modules()],
        [vars(m).get("sliding_window") for m in model.modules()],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "Gemma2"])
def test_the_probe_leaves_nothing_behind(name, dtype):
    model = build(name, dtype=dtype, sliding_window=64)
    model.model.layers[1].train(False)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    before, random_state = state_of(model), torch.get_rng_state()
    attach(model)
    after = state_of(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    for i in (0, 1, 4, 5):
        assert after[i] == before[i]
    assert all(torch.equal(after[2][n][0], b) and after[2][n][1] == p for n, (b, p) in before[2].items())
    for a, b in zip(after[3], before[3], strict=True):
        assert a.pop("_attn_implementation_internal") == "rlcore_" + b.pop("_attn_implementation_internal")
        assert a == b
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert attach(model) is model


def test_the_probe_is_quick():
    model = build("Qwen3", hidden_size=128, intermediate_size=256, vocab_size=1000)
    start = time.process_time()
    attach(model)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attach_works_where_gradients_are_off(context):
    model = build("Qwen3")
    with context():
        attach(model)
    check_exact(model, 1e-5)


REFUSED = {
    "embedding dropout": (lambda: build("GPTNeoX", hidden_dropout=0.1), "active dropout"),
    "attention dropout": (lambda: build("Llama", attention_dropout=0.1), "active dropout"),
    "ALiBi": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)
        ),
        "ALiBi",
    ),
    "bidirectional": (lambda: build("Llama", is_causal=False), "bidirectional"),
    "recurrent": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=4)
        ),
        "recurrent",
    ),
    "attention in the model file": (lambda: build("Falcon"), "attend through transformers' attention interface"),
    "auxiliary loss": (lambda: build("Qwen3Moe", output_router_logits=True), "auxiliary loss"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_the_reason_and_leaves_the_model_as_it_was(case):
    make, reason = REFUSED[case]
    model = make().eval()
    twin = copy.deepcopy(model)
    names = [c._attn_implementation for c in probe.adapter.configs(model)]
    with pytest.raises(AttachError, match=reason):
        attach(model)
    assert [c._attn_implementation for c in probe.adapter.configs(model)] == names
    assert not any(m.training for m in model.modules())
    ids = torch.randint(3, 40, (1, 6))
    assert torch.equal(model(ids).logits, twin(ids).logits)
    with pytest.raises(ValueError, match="attach"):
        trunk(model, PrefixTree.from_paths([[1, 2]]))


def test_refuses_a_window_that_only_the_mask_knows(monkeypatch):
    """The probe narrows windows, so a wide one that never reaches the attention function shows all the same."""
    model = build("Mistral", sliding_window=100)
    original = probe.adapter._tree_attention

    def blind(*arguments, **keywords):
        return original(*arguments, **{**keywords, "sliding_window": None})

    monkeypatch.setattr(probe.adapter, "_tree_attention", blind)
    with pytest.raises(AttachError, match="differ from those of single sequences"):
        attach(model)
    assert model.config.sliding_window == 100


def test_refuses_wrong_gradients(monkeypatch):
    model = build("Qwen3")
    original = probe.adapter._tree_attention

    def half(module, query, key, value, tree, **keywords):
        return original(module, query, key.detach() + 0 * key, value, tree, **keywords)

    monkeypatch.setattr(probe.adapter, "_tree_attention", half)
    with pytest.raises(AttachError, match=r"the gradient of .* on a tree"):
        attach(model)


def test_refuses_a_head_that_is_not_linear():
    model = build("Qwen3")
    model.lm_head.register_forward_hook(lambda module, args, output: output.square())
    with pytest.raises(AttachError, match="linear function"):
        attach(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("name", "changes", "softcap", "scale"),
    [
        ("Qwen3", {}, None, 1.0),
        ("Gemma2", {"final_logit_softcapping": 3.0}, 3.0, 1.0),
        ("Gemma2", {"final_logit_softcapping": None}, None, 1.0),
        ("Granite", {"logits_scaling": 13.0}, None, 1 / 13.0),
        ("Cohere", {"logit_scale": 0.3}, None, 0.3),
    ],
)
def test_head_is_measured(name, changes, softcap, scale, dtype):
    model = attach(build(name, dtype=dtype, **changes))
    h = head(model)
    assert (h.softcap, h.logit_scale, h.bias) == (softcap, scale, None)
    assert h.weight is model.get_output_embeddings().weight


def test_head_with_bias_and_scale_from_nowhere():
    """A scale and a cap that no configuration names, and a bias."""
    model = build("Llama")
    model.lm_head = torch.nn.Linear(32, 40)
    model.lm_head.register_forward_hook(lambda module, args, output: 7.5 * torch.tanh(output * 0.37 / 7.5))
    h = head(attach(model))
    assert h.bias is model.lm_head.bias
    assert abs(h.softcap - 7.5) < 1e-4 and abs(h.logit_scale - 0.37) < 1e-4


def test_runs_under_autocast():
    model = attach(build("Qwen3"))
    tree, _ = flat_groups()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = trunk(model, tree)
    exact = trunk(model, tree)
    assert (hidden - exact).norm() <= 0.05 * exact.norm()
    hidden.float().sum().backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())


def widths_of(model, tree, **options):
    """Rows that every layer's MLP sees while the trunk runs."""
    seen = []
    handles = [layer.mlp.act_fn.register_forward_hook(lambda m, a, o: seen.append(o.shape[1]))
               for layer in unwrap(model).model.layers]  # fmt: skip
    trunk(model, tree, **options)
    for handle in handles:
        handle.remove()
    return seen


def test_the_last_layer_computes_the_rows_that_are_read():
    """And no fewer under rows="all", without a tree, or where next to all are read."""
    model = attach(build("Qwen3"))
    tree = PrefixTree.from_groups([[3] * 20, [4] * 5], [[[5] * 4, [6] * 3], [[7]]])
    n = len(tree.loss_rows.unique())
    assert tree.M == 33 and n == 1 + 3 + 2 + 1
    assert widths_of(model, tree) == [33, 33, n]
    assert widths_of(model, tree, rows="last") == [33, 33, 3]
    assert widths_of(model, tree, rows="all") == [33, 33, 33]
    assert widths_of(model, PrefixTree.from_groups([[3]], [[[4] * 20]])) == [21, 21, 21]
    seen = []
    model.model.layers[-1].mlp.act_fn.register_forward_hook(lambda m, a, o: seen.append(o.shape))
    model(torch.tensor([[3, 4, 5]]))
    assert seen == [(1, 3, 48)]


def test_a_last_layer_that_needs_all_rows_gets_them():
    """What the MLP gives is added to what only all rows have: with fewer it fails, so the probe leaves them all."""
    model = build("Qwen3")
    layer, kept = model.model.layers[-1], {}
    layer.post_attention_layernorm.register_forward_hook(lambda m, a, o: kept.update(x=o))
    layer.mlp.register_forward_hook(lambda m, a, o: o + 0.1 * kept["x"])
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    attach(model)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    tree, sequences = flat_groups()
    torch.testing.assert_close(tree_logits(model, tree), single_logits(model, tree, sequences), rtol=1e-4, atol=1e-4)


def test_frozen_and_partly_frozen_models():
    model = build("Qwen3").requires_grad_(False)
    tree, _ = flat_groups()
    assert not trunk(attach(model), tree).requires_grad
    model = build("Qwen3").requires_grad_(False)
    model.model.layers[1].self_attn.k_proj.weight.requires_grad_()
    trunk(attach(model), tree).sum().backward()
    assert model.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_copies_of_attached_models_are_attached():
    model = attach(build("Qwen3"))
    twin = copy.deepcopy(model)
    tree, _ = flat_groups()
    assert torch.equal(trunk(twin, tree), trunk(model, tree))
    assert head(twin).weight is twin.lm_head.weight


def test_rotary_scalings_that_depend_on_length_limit_the_depth():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = attach(build("Llama", rope_parameters=rope, max_position_embeddings=12))
    tree, _ = flat_groups()
    with pytest.raises(ValueError, match="at most 12 tokens, got 16"):
        trunk(model, tree)
    trunk(model, PrefixTree.from_groups([[3] * 6], [[[4] * 6, [5] * 2]]))


def test_wrappers_are_looked_through():
    model = build("Qwen3")
    wrapped = torch.nn.DataParallel(model) if torch.cuda.is_available() else torch.compile(model, backend="eager")
    assert unwrap(wrapped) is model
    with pytest.raises(TypeError, match="expected a transformers model"):
        attach(torch.nn.Linear(2, 2))


def test_trunk_wants_the_models_device():
    model = attach(build("Qwen3"))
    with pytest.raises(ValueError, match=r"use tree.to\(device\)"):
        trunk(model, flat_groups()[0].to("meta"))


def test_an_attached_model_compiles_whole_without_a_tree():
    torch._dynamo.reset()
    model = build("Qwen3", num_hidden_layers=1).eval()
    ids = torch.randint(3, 40, (2, 7))
    expected = model(ids).logits
    compiled = torch.compile(attach(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
def test_a_decoder_is_compiled_once_for_trees_of_all_lengths(dynamic, graphs):
    """Whole. Without dynamic=True the first graph is of one shape alone, and the second tree makes the general one."""
    model = attach(build("Mistral", num_hidden_layers=2))
    trees = [branching()[0], flat_groups()[0], random_trie()[0]]
    assert len({(tree.M, tree.N, tree.depth, len(tree.nodes.start)) for tree in trees}) == 3
    expected = []
    for tree in trees:
        hidden = trunk(model, tree)
        expected.append((hidden.detach(), loss_and_gradients(model, hidden.square().sum())))
    torch._dynamo.reset()
    model.model.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for i, (tree, (states, results)) in enumerate(zip(trees, expected, strict=True)):
        with torch._dynamo.config.patch(error_on_recompile=i >= graphs):
            hidden = trunk(model, tree)
            torch.testing.assert_close(hidden, states)
            assert_same(loss_and_gradients(model, hidden.square().sum()), results, 1e-5)
