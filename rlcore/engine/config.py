"""The configuration: dataclasses that are the command line, its help and the TOML file.

Precedence: the defaults below < those of the method < a TOML file (`--config FILE`, or `runs/NAME/config.toml` on
resume) < the command line.
The string under a field is its help text; `rlcore.engine.config_rules` checks the range beside its type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple


class Range(NamedTuple):
    """What a number may be."""

    holds: Callable[[Any], bool]
    expected: str


AT_LEAST_ONE = Range(lambda x: x >= 1, "at least 1")
NOT_NEGATIVE = Range(lambda x: x >= 0, "0 or more")
POSITIVE = Range(lambda x: x > 0, "greater than 0")
PROBABILITY = Range(lambda x: 0 < x <= 1, "greater than 0 and at most 1")
SHARE = Range(lambda x: 0 <= x <= 1, "in [0, 1]")
FRACTION = Range(lambda x: 0 < x < 1, "between 0 and 1")
DECAY = Range(lambda x: 0 <= x < 1, "in [0, 1)")
THREADS = Range(lambda x: 0 <= x <= 1024, "0 to 1024")


@dataclass
class TaskConfig:
    """What is practised."""

    name: str = "chain_sum"
    """Name of a reasoning-gym task."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Several tasks instead of one, as NAME WEIGHT pairs; "data" stands for the files of task.data."""
    options: dict[str, str] = field(default_factory=dict)
    """Options of the task, as KEY VALUE pairs; in a mixture NAME.KEY. chain_sum defaults to two operands of one or two
    digits, countdown to three small numbers."""
    template: str = ""
    """The prompt: {question} stands for the question's text, {name} for an entry of the task's metadata or a field of
    the data's rows. Empty: the question, for reasoning-gym with a line break; for chain_sum the bare "{expression} =",
    for countdown "{numbers} -> {target}:"."""
    data: list[str] = field(default_factory=list)
    """Files of problems in place of a reasoning-gym task: .jsonl or .parquet, or directories of them."""
    held_out_data: list[str] = field(default_factory=list)
    """Files of held-out problems. Empty: a share of task.data."""
    prompt_field: str = "prompt"
    """The field of a row that holds the prompt, a text or a list of chat messages; a.b is field b in field a."""
    answer_field: str = "answer"
    """The field of a row that holds the reference answer; empty where the rewards need none."""
    strict: bool = False
    """Stop at the first unusable row of a file. Otherwise such rows are left out and counted."""
    too_long: Literal["error", "skip", "cut"] = "error"
    """What is done about prompts that leave no room for an answer in the model's context: stop, leave them out, or
    drop the start of their question."""
    chat: bool = False
    """Render prompts by the chat template of the model's tokenizer, as the message of a user."""
    system: str = ""
    """The system message before every prompt; needs task.chat."""
    partial_credit: bool = False
    """Reward an answer that is not right with the verifier's score for it. Policies stop at such answers: "14" for "4"
    is half right to chain_sum's verifier, because it contains it."""
    pool: Annotated[int, AT_LEAST_ONE] = 80000
    """How many items are drawn from a reasoning-gym task; duplicates are dropped."""
    seed: int = 0
    """Seed of the pool: runs with different --seed share the same problems and the same held-out set."""
    held_out: Annotated[int, AT_LEAST_ONE] = 500
    """Number of held-out problems used by evaluations."""
    held_out_fraction: Annotated[float, FRACTION] = 0.1
    """Share of all questions, chosen by a hash of the text, that training never sees."""


@dataclass
class RewardConfig:
    """What an answer is worth: the weighted sum of named channels."""

    channels: dict[str, str] = field(default_factory=dict)
    """Channels, as NAME KIND pairs: verifier, exact, math, code or code:FIELD, regex:PATTERN, module:function or
    FILE.py:function. Empty: one channel, the task's verifier. docs/data.md describes them."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of the channels, as NAME WEIGHT pairs; 1 where absent."""
    correct: str = ""
    """The channel that decides whether an answer is right, by a score of 1 or more. Empty: the first."""
    on_error: Literal["stop", "zero"] = "stop"
    """What is done about a reward that raises, is not a finite number or takes too long: stop the run, or count it in
    the metric reward_errors and give 0."""
    seconds: Annotated[float, POSITIVE] = 600.0
    """Most time for all answers of a step, per channel."""
    code_seconds: Annotated[float, POSITIVE] = 5.0
    """CPU time for one program of a code channel; it is ended after three times as long by the clock."""
    code_memory: Annotated[int, AT_LEAST_ONE] = 1024
    """Most memory of one program of a code channel, in MiB."""


@dataclass
class ModelConfig:
    """The policy."""

    path: str = ""
    """Directory or id of a Hugging Face causal LM. Empty: a small Qwen3, made by a short supervised warm start."""
    hidden_size: Annotated[int, AT_LEAST_ONE] = 128
    """Width of the small model."""
    layers: Annotated[int, AT_LEAST_ONE] = 2
    """Layers of the small model."""
    heads: Annotated[int, AT_LEAST_ONE] = 4
    """Attention heads of the small model; it has half as many key and value heads."""
    warm_accuracy: Annotated[float, SHARE] = 0.4
    """The supervised warm start of the small model ends when its sampled answers would be right at this rate."""
    warm_steps: Annotated[int, NOT_NEGATIVE] = 500
    """Most steps of the warm start."""
    warm_batch: Annotated[int, AT_LEAST_ONE] = 256
    """Problems per step of the warm start."""
    warm_lr: Annotated[float, POSITIVE] = 6e-3
    """Learning rate of the warm start."""
    cache: str = "~/.cache/rlcore"
    """Where warm-started models are kept for the next run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What forward passes compute in, in rollout and update alike. bfloat16: autocast over float32 weights; with LoRA
    the frozen weights are held in bfloat16 as well. Log-probs and losses are float32."""
    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Train low-rank adapters of this rank (needs peft) and freeze the weights; 0: train all weights."""
    lora_alpha: Annotated[float, POSITIVE] = 32.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: str = "all-linear"
    """Modules with adapters, by the ends of their names with commas between; all-linear: all but the head."""
    lora_merge: bool = False
    """At the end of the run, write the model with its adapters merged in to runs/NAME/merged."""
    gradient_checkpointing: bool = False
    """Keep the inputs of layers alone and compute the rest again for the gradients: less memory, more time."""


@dataclass
class RolloutConfig:
    """How answers are sampled for training."""

    prompts: Annotated[int, AT_LEAST_ONE] = 128
    """Prompts per step."""
    samples: Annotated[int, AT_LEAST_ONE] = 8
    """Answers per prompt: the group over which advantages are compared."""
    max_new_tokens: Annotated[int, AT_LEAST_ONE] = 8
    """Longest answer, in tokens, the end token included."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Sampling temperature, also that of the log-probabilities in the loss."""
    top_k: Annotated[int, NOT_NEGATIVE] = 0
    """Sample from the k likeliest tokens only; 0 is off."""
    top_p: Annotated[float, PROBABILITY] = 1.0
    """Sample from the smallest set of tokens that holds this much probability; 1 is off."""
    dynamic_sampling: bool = False
    """Replace prompts whose answers all have the same reward, which teach nothing, by freshly sampled ones."""
    max_resample: Annotated[int, AT_LEAST_ONE] = 3
    """Most rounds of dynamic sampling in a step; groups that are still without a signal then stay."""
    overlong_buffer: Annotated[float, SHARE] = 0.0
    """Share of max_new_tokens, at its end, in which answers are penalized for their length; 0 is off."""
    overlong_penalty: Annotated[float, NOT_NEGATIVE] = 1.0
    """Penalty at max_new_tokens; it rises from 0 in a straight line over the buffer."""
    overlong_filter: bool = False
    """Leave answers that were cut off at max_new_tokens out of the loss."""


@dataclass
class UpdateConfig:
    """How the policy is updated."""

    lr: Annotated[float, POSITIVE] = 1.5e-3
    """Peak learning rate of AdamW."""
    warmup: Annotated[int, NOT_NEGATIVE] = 5
    """Steps over which the learning rate rises linearly from zero."""
    final_lr: Annotated[float, SHARE] = 0.05
    """Share of the learning rate that is left at the last step."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls to that share: in a straight line from the first step on, along a cosine after the
    warm-up, or not at all."""
    beta1: Annotated[float, DECAY] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, DECAY] = 0.99
    """AdamW's decay of the second moment."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """Gradients are scaled down to this global norm."""
    epochs: Annotated[int, AT_LEAST_ONE] = 1
    """Passes over the answers of a step."""
    minibatches: Annotated[int, AT_LEAST_ONE] = 2
    """Optimizer steps per pass."""
    micro_tokens: Annotated[int, AT_LEAST_ONE] = 8192
    """Most tokens that go through the model at a time: answers and prompts, a prompt once in trees, before every answer
    in padded batches. The answers to a prompt stay together where they fit."""
    clip_low: Annotated[float | None, NOT_NEGATIVE] = None
    """Lower clip width of the probability ratio; the method's own where absent."""
    clip_high: Annotated[float | None, NOT_NEGATIVE] = None
    """Upper clip width of the probability ratio; the method's own where absent."""
    ema: Annotated[float, DECAY] = 0.0
    """Decay per optimizer step of a moving average of the weights, which evaluations then use; 0 is off."""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """tree: packed prefix trees and the folded head; padded: plain batches; auto: trees where they are exact."""


@dataclass
class CriticConfig:
    """The value model of methods with a critic: a copy of the policy's trunk with a head of its own."""

    lr: Annotated[float, POSITIVE] = 1.5e-3
    """Peak learning rate of its own AdamW; it rises and falls with the policy's."""
    gamma: Annotated[float, SHARE] = 1.0
    """Discount per token."""
    lam: Annotated[float, SHARE] = 0.95
    """Lambda of the generalized advantage estimates."""
    clip: Annotated[float, NOT_NEGATIVE] = 0.2
    """How far a value may move from the old one before its loss is clipped; 0 is off."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """Its gradients are scaled down to this global norm."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """First steps in which the critic alone learns."""


@dataclass
class KLConfig:
    """The distance to the model that the run started from."""

    place: Literal["none", "loss", "reward"] = "none"
    """Where it is penalized: as a term of the loss, or in the reward of every token."""
    coef: Annotated[float, NOT_NEGATIVE] = 0.001
    """Coefficient, or the first one where it adapts."""
    kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator: with x = log pi - log ref, k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x."""
    adaptive_target: Annotated[float, NOT_NEGATIVE] = 0.0
    """KL per answer, in nats, that the coefficient is steered to; 0: the coefficient is fixed."""
    horizon: Annotated[int, AT_LEAST_ONE] = 10000
    """Answers over which the coefficient adapts; at least those of a step."""


@dataclass
class EvalConfig:
    """How the policy is measured on the held-out problems."""

    every: Annotated[int, NOT_NEGATIVE] = 25
    """Steps between evaluations; there is always one before and one after. 0: only these two."""
    samples: Annotated[int, AT_LEAST_ONE] = 8
    """Answers per held-out problem."""
    temperature: Annotated[float, NOT_NEGATIVE] = 1.0
    """Sampling temperature. 0: the likeliest token each time, and one answer per problem."""
    batch: Annotated[int, AT_LEAST_ONE] = 125
    """Problems that are sampled at a time."""


@dataclass
class LogConfig:
    """Where metrics go beside the run's own files and TensorBoard."""

    wandb: str = ""
    """Project at Weights & Biases, with the package wandb. Empty: off."""
    trackio: str = ""
    """Project of trackio, with the package trackio. Empty: off."""


@dataclass
class Config:
    """Reinforcement learning of a language model on a task with a verifier."""

    method: str = "grpo"
    """Algorithm, by key: grpo, rloo, reinforce_pp, ppo, dr_grpo, gspo, dapo, cispo, lite_ppo, loop."""
    steps: Annotated[int, AT_LEAST_ONE] = 400
    """Steps: rollout, reward, advantage, update."""
    seed: int = 0
    """Seeds everything random: the small model and its warm start, prompts, answers, order of updates."""
    name: str = ""
    """Name of the run; empty: task, method and seed, with a number where the name is taken."""
    dir: str = "runs"
    """Directory of the runs."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto: cuda where there is one, else cpu."""
    threads: Annotated[int, THREADS] = 0
    """CPU threads; 0: one for the small model, whose work is too fine to share, and torch's own number for others."""
    shuffle_rewards: bool = False
    """Control experiment: deal the rewards of a step out at random. Nothing can be learned."""
    checkpoint_every: Annotated[int, AT_LEAST_ONE] = 25
    """Steps between checkpoints."""
    keep: Annotated[int, AT_LEAST_ONE] = 2
    """Checkpoints that are kept."""
    log_samples: Annotated[int, NOT_NEGATIVE] = 8
    """Answers written to samples.jsonl per step."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    log: LogConfig = field(default_factory=LogConfig)
