"""Models by path: what is taken, what is refused and how, and that nothing of theirs is executed or guessed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from decoder_cases import build
from safetensors.torch import load_file, save_file

from rlcore.engine.config import RolloutConfig, TaskConfig
from rlcore.engine.errors import UserError
from rlcore.engine.model import check_causal, load, load_or_make
from rlcore.engine.rollout import roll_out


@pytest.fixture
def stored(small, tmp_path) -> Path:
    """The small model in Hugging Face format."""
    model, tokenizer, _ = small
    model.save_pretrained(tmp_path / "stored")
    tokenizer.save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    path.write_text(json.dumps(content))


def test_a_stored_model_is_the_model(small, stored):
    model, tokenizer = load(stored)
    for name, value in small[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert tokenizer("7 + 8 =")["input_ids"] == small[1]("7 + 8 =")["input_ids"]
    assert not model.training


def test_no_tokenizer(stored):
    for file in stored.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"model\.path: .*tokenizer.*stored"):
        load(stored)


def test_no_end_token(stored):
    edit(stored / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="has no end-of-text token"):
        load(stored)


def test_nothing_in_the_directory(tmp_path):
    with pytest.raises(UserError, match=r"model\.path: no model can be loaded"):
        load(tmp_path)


def test_damaged_weights(stored):
    file = stored / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.path: no causal LM can be loaded"):
        load(stored)


def test_missing_weights(stored):
    """transformers would go on with random numbers in their place."""
    tensors = load_file(stored / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack weights of Qwen3ForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(stored)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(stored, value):
    tensors = load_file(stored / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* holds 1 numbers"):
        load(stored)


def test_pickled_weights_are_not_read(stored):
    torch.save(load_file(stored / "model.safetensors"), stored / "pytorch_model.bin")
    (stored / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.path: no causal LM"):
        load(stored)


def test_code_of_a_model_is_never_run(stored, monkeypatch):
    """Neither at once nor after a question, which transformers asks where nothing is said about it."""
    (stored / "trap.py").write_text(f"open({str(stored / 'executed')!r}, 'w').close()\nclass Trap:\n    pass\n")

    def question(*args):
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", question)
    edit(stored / "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.Trap", None]}, tokenizer_class="Trap")
    load(stored)
    edit(stored / "config.json", auto_map={"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"})
    load(stored)
    edit(stored / "config.json", model_type="foreign")
    with pytest.raises(UserError, match=r"model\.path: no model can be loaded"):
        load(stored)
    assert not (stored / "executed").exists()


def test_an_encoder_decoder_model(small, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    shape = T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(shape).save_pretrained(tmp_path)
    small[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder-decoder"):
        load(tmp_path)


def test_an_encoder(tiny, small, tmp_path):
    """BERT loads as a causal LM and attends to what comes."""
    from transformers import BertConfig, BertLMHeadModel

    shape = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertLMHeadModel(shape).save_pretrained(tmp_path / "bert")
    small[1].save_pretrained(tmp_path / "bert")
    config = tiny(model__path=str(tmp_path / "bert"))
    with pytest.raises(UserError, match=r"BertLMHeadModel.*not causal"):
        load_or_make(config, small[2], torch.device("cpu"), print)
    check_causal(small[0], "small")


def test_another_kind_of_model(small, tmp_path):
    from transformers import ViTConfig, ViTModel

    shape = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(shape).save_pretrained(tmp_path)
    small[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no causal LM can be loaded"):
        load(tmp_path)


def test_padding_with_the_end_token_hides_no_end(small, stored):
    """A tokenizer without pad token: the same rollout, end tokens, lengths and losses as with one."""
    from rlcore.engine.packs import Pack
    from rlcore.engine.policy import Policy
    from rlcore.ops.policy_loss import Objective

    edit(stored / "tokenizer_config.json", pad_token=None)
    model, tokenizer = load(stored)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1 != small[1].pad_token_id
    with torch.no_grad():  # likely end tokens, at every place
        model.lm_head.weight[1] = 0.5 * model.lm_head.weight[1:40].sum(0)
    task, settings = small[2], RolloutConfig(samples=4, max_new_tokens=6)
    problems = task.train[:6]

    def one(words):
        return roll_out(model, words, task, problems, settings, torch.Generator().manual_seed(3))

    own, other = one(tokenizer), one(small[1])
    assert own.responses == other.responses and own.texts == other.texts
    assert torch.equal(own.finished, other.finished) and 0 < own.finished.sum() < 24
    ends = [answer.count(1) for group in own.responses for answer in group]
    assert ends == own.finished.int().tolist()
    for name in ("target", "offsets", "rollout_logp"):
        assert torch.equal(getattr(own.batch, name), getattr(other.batch, name))

    losses = []
    batch = dataclasses.replace(own.batch, advantage=torch.linspace(-1, 1, own.batch.N))
    pack = Pack(own.prompts, own.responses, batch.device)
    for pad in (tokenizer.pad_token_id, small[1].pad_token_id):
        policy = Policy(model, pad, "padded")
        model.zero_grad()
        loss, _ = policy.loss(pack, batch, Objective())
        loss.backward()
        losses.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
        torch.testing.assert_close(policy.logp(pack, batch), own.model_logp, rtol=0, atol=5e-5)
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


def test_more_tokens_than_embeddings(tiny, small, stored):
    from rlcore.engine.model import check_fit

    tokenizer = load(stored)[1]
    tokenizer.add_tokens(["<another>"])
    with pytest.raises(UserError, match=r"100 tokens.*99"):
        check_fit(small[0], tokenizer, small[2], 8)


def test_rotary_frequencies_that_depend_on_the_batch_end_the_context(small):
    """LongRoPE switches tables where the model was first trained to, dynamic scaling begins at the context."""
    from rlcore.engine.model import check_fit
    from rlcore.engine.tasks import Task

    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    lengths = {"max_position_embeddings": 256, "original_max_position_embeddings": 16}
    model = build("Phi3", vocab_size=99, rope_parameters=rope, **lengths)
    task = Task(TaskConfig(pool=2000, held_out=10))
    with pytest.raises(UserError, match="the model's context is 16;"):
        check_fit(model, small[1], task, 12)
    check_fit(build("Phi3", vocab_size=99, max_position_embeddings=256), small[1], task, 12)
