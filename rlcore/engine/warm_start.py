"""The small model made on first use: a Qwen3 with a character-level tokenizer and a short supervised warm start.

It starts from random weights; the warm start on training questions makes some of its sampled answers right, so that
reinforcement learning has something to amplify.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import string
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import rlcore as rl
from rlcore.engine.config import Config
from rlcore.engine.packs import Pack
from rlcore.engine.policy import Policy
from rlcore.engine.rollout import encode
from rlcore.engine.seeding import seed_of
from rlcore.engine.tasks import Task

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHECK_EVERY = 10
# Part of the cache's key: to be raised with any change of the warm start that changes its weights.
RECIPE = 1


def character_tokenizer() -> Any:
    """A tokenizer with one token per printable ASCII character, for texts without a vocabulary of their own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *string.printable[:95], "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def small_model(config: Config, vocabulary: int) -> Any:
    """A Qwen3 of the configured size with random weights that depend on the seed alone."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = config.model.hidden_size
    shape = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=config.model.layers,
        num_attention_heads=config.model.heads,
        num_key_value_heads=config.model.heads // 2,
        head_dim=size // config.model.heads,
        max_position_embeddings=1024,
        # The customary 0.02 is meant for widths in the thousands and learns slowly at this one.
        initializer_range=0.7 * size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "init"))
        return Qwen3ForCausalLM(shape)


def fingerprint(config: Config, device: torch.device, digest: str = "") -> str:
    """A name for the warm start of a config: equal where all that it depends on is equal; `digest` is the task's."""
    # Dtype, adapters and checkpointing come after the warm start, which is always made in float32 with all weights.
    shape = ("hidden_size", "layers", "heads", "warm_accuracy", "warm_steps", "warm_batch", "warm_lr")
    model = {key: value for key, value in asdict(config.model).items() if key in shape}
    task = {k: v for k, v in asdict(config.task).items() if k not in ("held_out", "partial_credit", "strict")}
    versions = [rl.__version__, torch.__version__, *map(importlib.metadata.version, ("reasoning-gym", "transformers"))]
    parts = [
        versions,
        RECIPE,
        config.seed,
        model,
        task,
        digest,
        config.update.layout,
        device.type,
        torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def warm_start(model: Any, tokenizer: Any, task: Task, config: Config, say: Callable[[str], None]) -> None:
    """Supervised steps on training questions until sampled answers would be right at the rate of `warm_accuracy`.

    Minimizes the negative log-likelihood of the reference answers, the library's policy loss with ratio "none" and
    advantage 1. The probability of a whole reference answer, exp(sum of its log-probs), is the expected accuracy at
    temperature 1; it is measured every ten steps, and after the last, on the problems that come next.
    """
    settings = config.model
    policy = Policy(model, tokenizer.pad_token_id, config.update.layout)
    likelihood = rl.Objective(ratio="none", surrogate="reinforce", aggregate="token_mean")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warm_lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(settings.warm_steps + 1):
        last = step == settings.warm_steps
        pack, batch = supervised(tokenizer, task, step, config, policy.device)
        if step % CHECK_EVERY == 0 or last:
            logp = policy.logp(pack, batch)
            accuracy = rl.segment_sum(logp, offsets=batch.offsets).exp().mean().item()
            if step % (5 * CHECK_EVERY) == 0 or accuracy >= settings.warm_accuracy:
                say(f"warm start: step {step}, expected accuracy {accuracy:.1%} of {settings.warm_accuracy:.0%}")
            if accuracy >= settings.warm_accuracy:
                return
            if last:
                say(
                    f"warm start: stopped at {step} steps with {accuracy:.1%}, target {settings.warm_accuracy:.0%}; "
                    "model.warm_steps allows no more"
                )
                return
        optimizer.param_groups[0]["lr"] = settings.warm_lr * min(1.0, (step + 1) / 20)
        loss, _ = policy.loss(pack, batch, likelihood)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def supervised(
    tokenizer: Any, task: Task, step: int, config: Config, device: torch.device
) -> tuple[Pack, rl.TokenBatch]:
    """The prompts and reference answers of a supervised step, and their batch: every token has advantage 1."""
    problems = task.prompts(step, config.model.warm_batch, seed_of(config.seed, "warm"))
    prompts = encode(tokenizer, [problem.prompt for problem in problems])
    # An answer goes on where its prompt ends: what a tokenizer puts around a whole text does not belong into it.
    bare = tokenizer([problem.answer for problem in problems], add_special_tokens=False)["input_ids"]
    answers = [[ids + [tokenizer.eos_token_id]] for ids in bare]
    target = torch.tensor([token for group in answers for token in group[0]], device=device)
    lengths = torch.tensor([0, *(len(group[0]) for group in answers)], device=device)
    batch = rl.TokenBatch(target, lengths.cumsum(0), advantage=torch.ones(len(target), device=device))
    return Pack(prompts, answers, device), batch
