"""What happens to a model between `attach` and `trunk`, or inside one, can not make the last layer read other rows."""

from __future__ import annotations

import copy
from threading import Thread

import pytest
import torch

from rlcore.adapters.transformers import attach, trunk

pytest.importorskip("transformers")
from decoder_cases import branching, build, flat_groups, random_trie, single_logits, tree_logits

TREE, SEQUENCES = flat_groups()


def assert_exact(model):
    with torch.no_grad():
        expected = single_logits(model, TREE, SEQUENCES)
        torch.testing.assert_close(tree_logits(model, TREE), expected, rtol=1e-4, atol=1e-4)


def assert_idle(model):
    """Called outside a tree, the last MLP computes what it is given."""
    mlp, x = model.model.layers[-1].mlp, torch.randn(1, TREE.M, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_layers_cut_off_after_attach():
    """All rows come from the layers that are left, and those that are read are taken out of them."""
    model = attach(build("Qwen3"))
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers = 2
    assert_exact(model)


def test_layers_added_after_attach():
    model = attach(build("Qwen3"))
    model.model.layers.append(copy.deepcopy(model.model.layers[-1]))
    model.config.num_hidden_layers, model.config.layer_types = 4, ["full_attention"] * 4
    with pytest.raises(ValueError, match="expected the layers that attach saw; one more got 37 rows of 56"):
        trunk(model, TREE)


def test_two_models_share_a_decoder():
    """A critic on the policy's trunk: attaching it leaves the hooks as they are, and both leave rows out."""
    policy, critic = attach(build("Qwen3")), build("Qwen3", kind="ForTokenClassification", num_labels=1)
    critic.model = policy.model
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in policy.modules()]
    attach(critic)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in policy.modules()] == hooks
    seen = []
    policy.model.layers[-1].mlp.act_fn.register_forward_hook(lambda m, a, o: seen.append(o.shape[1]))
    assert torch.equal(trunk(policy, TREE), trunk(critic, TREE))
    assert seen == [len(TREE.loss_rows.unique())] * 2
    assert_exact(policy)


def test_layers_share_an_mlp():
    """It leaves rows out in the last layer alone, and when layers are recomputed too."""
    model = build("Qwen3")
    for layer in model.model.layers:
        layer.mlp = model.model.layers[0].mlp
    attach(model).train().gradient_checkpointing_enable({"use_reentrant": False})
    seen, results = [], []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, a, o: seen.append(o.shape[1]))
    trunk(model, TREE)
    n = len(TREE.loss_rows.unique())
    assert seen == [TREE.M, TREE.M, n]
    for logits in (lambda: tree_logits(model, TREE), lambda: single_logits(model, TREE, SEQUENCES)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits(), TREE.target).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_parts_replaced_after_attach(part):
    model = attach(build("Qwen3"))
    new = build("Qwen3", seed=5).model.layers[-1].get_submodule(part)
    model.model.layers[-1].set_submodule(part, new)
    if part == "self_attn":
        new.config = model.config
    assert_exact(model)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_put_on_and_taken_off_after_attach(dora):
    peft = pytest.importorskip("peft")
    parts = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=parts, init_lora_weights=False, use_dora=dora)
    model = peft.get_peft_model(attach(build("Qwen3")), config)
    assert_exact(model)
    with model.disable_adapter():
        assert_exact(model)
    assert_exact(model.merge_and_unload())


def test_a_copy_has_its_own_weights():
    model = attach(build("Qwen3"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert_exact(other)
    assert_exact(model)


def test_an_error_inside_the_last_layer_leaves_nothing_behind():
    model = attach(build("Qwen3"))
    for part in ("self_attn.k_norm", "self_attn.o_proj", "mlp.act_fn"):
        handle = model.model.layers[-1].get_submodule(part).register_forward_hook(lambda m, a, o: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trunk(model, TREE)
        handle.remove()
        assert_idle(model)
    assert_exact(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_leaves_nothing_behind(reentrant):
    model = attach(build("Qwen3")).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    trunk(model, TREE).sum().backward()
    assert_idle(model)


def test_threads_share_a_model():
    """One tree each, and one without a tree."""
    model = attach(build("Qwen3")).eval()
    ids = torch.arange(60)[None] % 40
    trees = [TREE, branching()[0], random_trie()[0]]
    work = [*(lambda tree=tree: trunk(model, tree) for tree in trees), lambda: model.model(ids).last_hidden_state]
    with torch.no_grad():
        expected = [run() for run in work]
    exact = [0] * len(work)

    def repeat(i):
        with torch.no_grad():
            for _ in range(30):
                exact[i] += torch.allclose(work[i](), expected[i], atol=1e-5)

    threads = [Thread(target=repeat, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exact == [30] * len(work)
