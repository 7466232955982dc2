"""What learns, and how: the advantages of a rollout, then the optimizer steps on it.

A step's answers are gone through `epochs` times; each pass deals the prompts, with all their answers, into minibatches,
one optimizer step each; a minibatch goes through the model in micro-batches whose losses sum to the minibatch's loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlcore as rl
from rlcore.algorithms.policy_loss_terms import kl_divergence
from rlcore.engine import checkpoint
from rlcore.engine.config import Config
from rlcore.engine.critic import Critic, explained_variance
from rlcore.engine.packs import Minibatch, Pack, minibatch_of
from rlcore.engine.policy import Policy
from rlcore.engine.reference import Reference
from rlcore.engine.rollout import Rollout, take
from rlcore.engine.samples import Seen
from rlcore.engine.schedule import MovingAverage, learning_rate
from rlcore.engine.seeding import permutation
from rlcore.engine.shaping import at_last_token, length_penalty, next_coefficient
from rlcore.engine.timing import Stopwatch
from rlcore.layout import rows_of


class Learner:
    """The policy and its optimizer, with what the config adds: critic, reference, KL coefficient, moving average."""

    def __init__(self, config: Config, method: rl.Method, policy: Policy, reference: Reference | None) -> None:
        self.config, self.method, self.policy, self.reference = config, method, policy, reference
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in policy.model.parameters() if parameter.requires_grad],
            lr=config.update.lr,
            betas=(config.update.beta1, config.update.beta2),
            weight_decay=config.update.weight_decay,
        )
        self.critic = Critic(policy, config.critic, config.update) if "critic" in method.needs else None
        self.average = MovingAverage(policy.model, config.update.ema) if config.update.ema else None
        self.kl_coef = config.kl.coef
        self.whole_groups = self.objective().scope == "group"

    def objective(self) -> rl.Objective:
        """The method's objective with the configured clip bounds and the KL term as it stands at this step."""
        changes: dict[str, Any] = clip_bounds(self.config, self.method.structure)
        if self.config.kl.place == "loss":
            changes["kl"] = rl.KL(self.config.kl.kind, self.kl_coef)
        if "length" in self.method.structure:
            changes["length"] = self.config.rollout.max_new_tokens
        return self.method.objective(**changes)

    def learn(self, rollout: Rollout, reward: Tensor, step: int, clock: Stopwatch) -> tuple[Seen, dict[str, float]]:
        """The optimizer steps on one rollout with rewards [S]; returns how they saw its tokens, and metrics."""
        objective = self.objective()
        with clock("forward_backward"):
            dealt = self.deal(rollout, step, 0)
            batch, entropy = self.with_scores(rollout, dealt)
        batch, metrics = self.with_advantage(batch, reward)
        metrics |= self.optimize(rollout, batch, dealt, objective, step, clock)
        old_logp = required(batch.old_logp)
        mismatch = (old_logp - rollout.model_logp).abs()
        return Seen(old_logp, entropy, required(batch.advantage)), {
            **metrics,
            "mismatch_max": mismatch.max().item(),
            "mismatch_mean": mismatch.mean().item(),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def deal(self, rollout: Rollout, step: int, epoch: int) -> list[Minibatch]:
        """The minibatches of a pass: the prompts with all their answers, dealt anew in every one."""
        config = self.config
        order = torch.tensor(permutation(len(rollout.prompts), config.seed, "minibatches", step, epoch))
        deal = partial(minibatch_of, rollout, layout=self.policy.layout, whole_groups=self.whole_groups)
        parts = order.tensor_split(config.update.minibatches)
        return [deal(groups=chosen.sort().values.tolist(), config=config.update) for chosen in parts]

    @torch.no_grad()
    def with_scores(self, rollout: Rollout, dealt: list[Minibatch]) -> tuple[rl.TokenBatch, Tensor]:
        """The rollout's tokens with what the models say of them before the update: old_logp, ref_logp and value, [N].

        Beside it the policy's entropies [N], which are logged. All of it goes through the models in the packs of the
        first pass of the update, whose trees are made once.

        The sampler's own log-probs differ from old_logp in the last digits (a KV cache, other shapes): ratios to these
        start at exactly 1, and the difference is logged.
        """
        config, batch = self.config, rollout.batch
        places, parts = [], []
        for sequences, packs in dealt:
            for chosen, pack in packs:
                own = sequences[chosen]
                places.append(rows_of(required(batch.offsets), own)[0])
                parts.append((pack, batch.take(own)))
        place = torch.cat(places)

        def in_order(found: list[Tensor]) -> Tensor:
            x = torch.cat(found)
            return torch.empty_like(x).index_copy_(0, place, x)

        seen = [self.policy.scores(*part, entropy=True) for part in parts]
        scores: dict[str, Any] = {"old_logp": in_order([one.logp for one in seen])}
        if self.reference is not None:
            scores["ref_logp"] = in_order([self.reference.logp(*part) for part in parts])
        if self.critic is not None:
            value = in_order([self.critic(pack) for pack, _ in parts])
            scores |= {"value": value, "old_value": value}
        mask = rl.per_token(rollout.finished, batch) if config.rollout.overlong_filter else batch.mask
        return replace(batch, **scores, mask=mask), in_order([required(one.entropy) for one in seen])

    def with_advantage(self, batch: rl.TokenBatch, reward: Tensor) -> tuple[rl.TokenBatch, dict[str, float]]:
        """The batch with `advantage` [N], and `returns` [N] where there is a critic; the metrics of what was paid."""
        config, metrics = self.config, {}
        if config.rollout.overlong_buffer:
            penalty = length_penalty(batch.lengths(), config.rollout)
            reward = reward + penalty
            metrics["overlong_penalty"] = penalty.mean().item()
        paid = at_last_token(reward, batch)
        if self.reference is not None:
            old_logp, ref_logp = required(batch.old_logp), required(batch.ref_logp)
            answers = batch.S
            metrics["kl/answer"] = (old_logp - ref_logp).sum().item() / answers
            metrics["kl/coef"] = self.kl_coef
            if config.kl.place == "reward":
                paid = paid - self.kl_coef * kl_divergence(old_logp, ref_logp, config.kl.kind)
            if target := config.kl.adaptive_target:
                kl = metrics["kl/answer"]
                self.kl_coef = next_coefficient(self.kl_coef, kl, target, config.kl.horizon, answers)
        if self.critic is None or self.method.returns is None:
            return replace(batch, advantage=self.method.advantage(paid, batch)), metrics
        horizon = {"gamma": config.critic.gamma, "lam": config.critic.lam}
        returns = self.method.returns(paid, batch, **horizon)
        metrics["critic/explained_variance"] = explained_variance(required(batch.value), returns, batch.mask)
        return replace(batch, advantage=self.method.advantage(paid, batch, **horizon), returns=returns), metrics

    def optimize(
        self,
        rollout: Rollout,
        batch: rl.TokenBatch,
        dealt: list[Minibatch],
        objective: rl.Objective,
        step: int,
        clock: Stopwatch,
    ) -> dict[str, float]:
        """All optimizer steps of a step, `dealt` the first pass; returns the metrics of the losses over all of them."""
        config = self.config
        self.optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        critic_lr = learning_rate(config, step, config.critic.lr)
        policy_learns = self.critic is None or step > config.critic.warmup_steps
        steps: dict[str, list[dict[str, Tensor]]] = {"policy": [], "critic": []}
        for epoch in range(config.update.epochs):
            with clock("forward_backward"):
                minibatches = dealt if epoch == 0 else self.deal(rollout, step, epoch)
            for sequences, packs in minibatches:
                with clock("forward_backward"):
                    minibatch = take(batch, sequences)
                    micros = [(pack, minibatch.take(chosen)) for chosen, pack in packs]
                if policy_learns:
                    loss_of = partial(self.policy.loss, objective=objective)
                    steps["policy"].append(one_step(micros, loss_of, self.policy_step, clock))
                if self.critic is not None:
                    step_of = partial(self.critic.step, critic_lr)
                    steps["critic"].append(one_step(micros, self.critic.loss, step_of, clock))
        return {f"{who}/{key}": x for who, taken in steps.items() for key, x in over_steps(taken).items()}

    def policy_step(self) -> Tensor:
        """One optimizer step of the policy; returns the norm of the gradient before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), self.config.update.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        return norm

    def evaluated(self) -> AbstractContextManager[None]:
        """Inside the block the policy has the weights that evaluations use: the moving average where there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def save(self, directory: Path, tokenizer: Any) -> None:
        """What a step carries to the next beyond the policy and its optimizer, into a checkpoint's directory."""
        from safetensors.torch import save as to_bytes

        (directory / "learner.json").write_text(json.dumps({"kl_coef": self.kl_coef}) + "\n")
        if self.critic is not None:
            # What is frozen is the policy's, and comes with it.
            trained = {name: p for name, p in self.critic.named_parameters() if p.requires_grad}
            weights = {name: p.detach().cpu().contiguous() for name, p in trained.items()}
            (directory / "critic.safetensors").write_bytes(to_bytes(weights))
            checkpoint.save_optimizer(directory / "critic_optimizer.safetensors", self.critic, self.critic.optimizer)
        if self.average is not None:
            (directory / "ema.safetensors").write_bytes(to_bytes({k: x.cpu() for k, x in self.average.weights.items()}))
            with self.average.applied():
                checkpoint.save_model(directory / "ema", self.policy.model, tokenizer)

    @torch.no_grad()
    def restore(self, directory: Path) -> None:
        """Takes up what `save` wrote; what a checkpoint does not have, because the config changed, starts afresh."""
        from safetensors.torch import load_file

        checkpoint.restore_optimizer(directory / "optimizer.safetensors", self.policy.model, self.optimizer)
        if (state := directory / "learner.json").exists() and self.config.kl.adaptive_target:
            self.kl_coef = json.loads(state.read_text())["kl_coef"]
        if self.critic is not None and (weights := directory / "critic.safetensors").exists():
            own = dict(self.critic.named_parameters())
            for name, x in load_file(weights).items():
                own[name].copy_(x)
            checkpoint.restore_optimizer(directory / "critic_optimizer.safetensors", self.critic, self.critic.optimizer)
        if self.average is not None and (weights := directory / "ema.safetensors").exists():
            for name, x in load_file(weights).items():
                self.average.weights[name].copy_(x)


def one_step(
    micros: list[tuple[Pack, rl.TokenBatch]], loss_of: Callable[..., Any], step: Callable[[], Tensor], clock: Stopwatch
) -> dict[str, Tensor]:
    """The gradients of a minibatch's micro-batches, then an optimizer step; returns the metrics of the losses.

    loss_of gives loss and metrics of a micro-batch; step gives the norm of the gradient."""
    parts: list[dict[str, Tensor]] = []
    with clock("forward_backward"):
        for micro in micros:
            loss, metrics = loss_of(*micro)
            loss.backward()
            parts.append(metrics)
    with clock("optimizer"):
        norm = step()
    return {**rl.merge_metrics(parts), "grad_norm": norm}


def over_steps(steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """The metrics of several optimizer steps: counts and extremes merged as everywhere, of all others the mean."""
    merged = rl.merge_metrics(steps)
    if not {"kl_loss", "entropy_loss"} & merged.keys():
        merged.pop("policy_loss", None)  # the loss itself
    for internal in ("weight_sum", "weight_sq_sum"):
        merged.pop(internal, None)
    whole = ("tokens", "ess", "_min", "_max")
    return {key: (x if key.endswith(whole) else x / len(steps)).item() for key, x in merged.items()}


def clip_bounds(config: Config, structure: dict[str, Any]) -> dict[str, Any]:
    """The method's clip range with the configured ends replaced."""
    low, high = structure.get("clip", (0.2, 0.2))
    given_low, given_high = config.update.clip_low, config.update.clip_high
    return {"clip": (low if given_low is None else given_low, high if given_high is None else given_high)}


def required(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
