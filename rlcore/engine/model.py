"""The policy model: any Hugging Face causal LM by path, or a small Qwen3 made on first use.

The small model has a character-level tokenizer; both are stored in Hugging Face format and load with `from_pretrained`.
It starts from random weights and gets a short supervised warm start on training questions of the task, so that some of
its sampled answers are right and reinforcement learning has something to amplify.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import string
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import rlcore as rl
from rlcore.engine.checkpoint import save_model, why_unusable, write_directory
from rlcore.engine.config import Config
from rlcore.engine.errors import SaveError, UserError
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


def load(path: Path | str) -> tuple[Any, Any]:
    """Model (float32, evaluation mode, dropout set to 0) and tokenizer from a directory or a Hugging Face id."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(path).expanduser() if str(path).startswith("~") else path
    check_place(str(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        shape = AutoConfig.from_pretrained(path)
        for part in (shape, shape.get_text_config()):
            for name, value in vars(part).items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(path, config=shape, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path: no causal LM and tokenizer can be loaded from {str(path)!r}: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer of {str(path)!r} has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def check_place(path: str) -> None:
    """Raises UserError at once where there is no such directory, and no such model to download.

    Loading itself would ask for every file again and again, a minute long, before it gave up.
    """
    if Path(path).is_dir():
        return
    if path.startswith(("/", ".")) or path.count("/") > 1:
        raise UserError(f"model.path: there is no directory {path!r}")
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if try_to_load_from_cache(path, "config.json") is None:
            HfApi().model_info(path, timeout=10)
    except Exception as error:  # the hub's, its HTTP client's and the operating system's have nothing in common
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path: no directory {path!r}, and no such model on the Hugging Face hub: {reason}"
        ) from None


def load_or_make(config: Config, task: Task, device: torch.device, say: Callable[[str], None]) -> tuple[Any, Any]:
    """The model that reinforcement learning starts from, on `device`, and its tokenizer.

    A warm-started model is kept under config.model.cache, by a hash of everything it depends on.
    """
    if config.model.path:
        model, tokenizer = load(config.model.path)
        return model.to(device), tokenizer
    directory = Path(config.model.cache).expanduser() / f"warm-start-{fingerprint(config, device, task.digest)}"
    if why_unusable(directory) is None:
        say(f"warm-started model from {directory}")
        model, tokenizer = load(directory)
        return model.to(device), tokenizer
    say("making a small model: supervised steps on training questions until some of its answers are right")
    tokenizer = character_tokenizer()
    model = small_model(config, len(tokenizer)).to(device).eval()
    check_fit(model, tokenizer, task, config.rollout.max_new_tokens)
    warm_start(model, tokenizer, task, config, say)
    try:
        write_directory(directory, lambda temporary: save_model(temporary, model, tokenizer))
    except SaveError as error:
        say(f"the warm-started model is not kept for the next run: {error}")
        return model, tokenizer
    # Read back, so that the first run has what later ones have, down to the bytes of the tokenizer's files.
    model, tokenizer = load(directory)
    return model.to(device), tokenizer


def check_fit(model: Any, tokenizer: Any, task: Task, answer_length: int) -> None:
    """Makes the task's prompts fit the model; raises UserError where they can not, or tokens have no embedding."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"model.path: the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    task.fit(tokenizer, context, answer_length)


def fingerprint(config: Config, device: torch.device, digest: str = "") -> str:
    """A name for the warm start of a config: equal where all that it depends on is equal; `digest` is the task's."""
    model = {k: v for k, v in asdict(config.model).items() if k not in ("path", "cache")}
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
        prompts, answers, batch = supervised(tokenizer, task, step, config, policy.device)
        if step % CHECK_EVERY == 0 or last:
            logp = policy.logp(prompts, answers, batch)
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
        loss, _ = policy.loss(prompts, answers, batch, likelihood)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def supervised(
    tokenizer: Any, task: Task, step: int, config: Config, device: torch.device
) -> tuple[list[list[int]], list[list[list[int]]], rl.TokenBatch]:
    """The prompts and reference answers of a supervised step, and their batch: every token has advantage 1."""
    problems = task.prompts(step, config.model.warm_batch, seed_of(config.seed, "warm"))
    prompts = encode(tokenizer, [problem.prompt for problem in problems])
    answers = [[ids + [tokenizer.eos_token_id]] for ids in encode(tokenizer, [problem.answer for problem in problems])]
    target = torch.tensor([token for group in answers for token in group[0]], device=device)
    lengths = torch.tensor([0, *(len(group[0]) for group in answers)], device=device)
    batch = rl.TokenBatch(target, lengths.cumsum(0), advantage=torch.ones(len(target), device=device))
    return prompts, answers, batch
