"""What learns: critic, KL to the reference, length rules, moving average, and that all of it survives a resume."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlcore as rl
from rlcore.engine.checkpoint import found
from rlcore.engine.config import Config, CriticConfig, UpdateConfig
from rlcore.engine.critic import Critic, explained_variance
from rlcore.engine.errors import Interrupted, UserError
from rlcore.engine.logging import RunLog
from rlcore.engine.packs import Pack, minibatch_of
from rlcore.engine.policy import Policy
from rlcore.engine.reference import Reference
from rlcore.engine.resolve import with_keys
from rlcore.engine.rollout import roll_out, take
from rlcore.engine.seeding import generator
from rlcore.engine.timing import Stopwatch, own_share
from rlcore.engine.trainer import train
from rlcore.engine.update import Learner, over_steps
from rlcore.layout import TokenBatch, per_token
from rlcore.methods import methods

PROMPTS = [[5, 6, 7, 8], [5, 6, 9]]
RESPONSES = [[[11, 12, 1], [13, 1]], [[20, 21, 22, 1]]]
PACK = Pack(PROMPTS, RESPONSES, torch.device("cpu"))


def run_of(config: Config) -> Path:
    return Path(config.dir) / config.name


def metrics_of(config: Config) -> list[dict]:
    lines = (run_of(config) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def last_files(config: Config) -> dict[str, bytes]:
    last = found(run_of(config) / "checkpoints")[-1]
    return {str(f.relative_to(last)): f.read_bytes() for f in sorted(last.rglob("*")) if f.is_file()}


def stopped_and_resumed(config: Config, after: int) -> None:
    write = RunLog.step

    def step_and_stop(log, step, record):
        write(log, step, record)
        if step == after:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "step", step_and_stop)
        with pytest.raises(Interrupted):
            train(config)
    train(config, resume=True)


@pytest.fixture
def started(small):
    """A learner of a method with changed config, and a rollout of six groups of three."""
    model, tokenizer, task = small

    def start(method: str = "grpo", reference=None, **keys):
        config = with_keys(Config(method=method), {"rollout.samples": 3, "rollout.max_new_tokens": 5, **keys})
        import copy

        policy = Policy(copy.deepcopy(model), tokenizer.pad_token_id)
        frozen = None if reference is None else Reference(policy, reference)
        learner = Learner(config, methods()[method], policy, frozen)
        rollout = roll_out(policy.model, tokenizer, task, task.train[:6], config.rollout, generator("rollout"))
        reward = torch.rand(18, generator=torch.Generator().manual_seed(0))
        return learner, rollout, reward

    return start


def other_model(small):
    import copy

    model = copy.deepcopy(small[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


# ---- critic


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_critic_learns_a_known_value(small, layout):
    """The value of a token is what its answer will bring; six rows with six targets are told apart."""
    policy = Policy(small[0], 0, layout)
    critic = Critic(policy, CriticConfig(lr=3e-3, clip=0.0), UpdateConfig())
    returns = torch.tensor([0.5, 0.5, 0.5, -1.0, -1.0, 2.0, 2.0, 2.0, 2.0])
    target = torch.tensor([t for group in RESPONSES for answer in group for t in answer])
    batch = TokenBatch(target, torch.tensor([0, 3, 5, 9]), returns=returns)
    before = [p.detach().clone() for p in policy.model.parameters()]
    assert not critic(PACK).any()
    for _ in range(80):
        loss, _ = critic.loss(PACK, batch)
        loss.backward()
        assert critic.step(3e-3) > 0
    value = critic(PACK).detach()
    # The first rows of answers 0 and 1 are one state, whose value can only be the mean of both returns.
    torch.testing.assert_close(value[[0, 3]], torch.tensor([-0.25, -0.25]), atol=0.1, rtol=0)
    assert abs(value[0] - value[3]) < 1e-4
    rest = [1, 2, 4, 5, 6, 7, 8]
    torch.testing.assert_close(value[rest], returns[rest], atol=0.15, rtol=0)
    assert explained_variance(value[rest], returns[rest]) > 0.98
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_values_of_both_layouts(small):
    values = []
    for layout in ("tree", "padded"):
        critic = Critic(Policy(small[0], 0, layout), CriticConfig(), UpdateConfig())
        torch.nn.init.constant_(critic.head.weight, 0.1)
        values.append(critic(PACK).detach())
    assert values[0].std() > 0.01
    torch.testing.assert_close(*values, rtol=0, atol=1e-5)


def test_a_critic_has_no_head_of_words(small):
    """Its checkpoint and its optimizer's names hold the trunk and the value alone; the policy keeps its head."""
    import copy

    model = copy.deepcopy(small[0])
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for layout in ("tree", "padded"):
        critic = Critic(Policy(model, 0, layout), CriticConfig(), UpdateConfig())
        words = [name for name, p in critic.named_parameters() if p.shape == model.lm_head.weight.shape]
        assert words == ["model.model.embed_tokens.weight"]
        assert critic(PACK).shape == (9,)
    assert model.get_output_embeddings().weight.shape[0] == len(small[1])


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.zeros(4), returns) == 0
    assert explained_variance(returns, torch.ones(4)) == 0


def test_explained_variance_is_that_of_the_tokens_that_count(started):
    """gae gives masked tokens the return 0, whatever their value."""
    learner, rollout, reward = started("ppo", **{"rollout.overlong_filter": True})
    rollout = dataclasses.replace(rollout, finished=torch.arange(18) % 2 == 0)
    torch.nn.init.normal_(learner.critic.head.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch, metrics = learner.with_advantage(learner.with_scores(rollout, learner.deal(rollout, 1, 0))[0], reward)
    value, returns = batch.value[batch.mask].double(), batch.returns[batch.mask].double()
    expected = 1 - ((returns - value).var() / returns.var()).item()
    assert not batch.mask.all() and metrics["critic/explained_variance"] == pytest.approx(expected, rel=1e-4)


def test_only_the_critic_learns_in_its_warm_up(started):
    learner, rollout, reward = started("ppo", **{"critic.warmup_steps": 1, "update.warmup": 0})
    before = [p.detach().clone() for p in learner.policy.model.parameters()]
    _, metrics = learner.learn(rollout, reward, 1, Stopwatch())
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.model.parameters(), strict=True))
    assert metrics["critic/grad_norm"] > 0 and learner.critic.head.weight.any()
    _, metrics = learner.learn(rollout, reward, 2, Stopwatch())
    assert not all(torch.equal(a, b) for a, b in zip(before, learner.policy.model.parameters(), strict=True))
    assert metrics["policy/grad_norm"] > 0


# ---- settings and passes


def test_optimizers_and_objective_take_their_settings(started):
    keys = {"update.lr": 2e-3, "update.beta1": 0.7, "update.beta2": 0.8, "update.weight_decay": 0.1, "update.warmup": 4}
    learner, rollout, reward = started("ppo", **keys, **{"critic.lr": 1e-3, "update.clip_high": 0.3})
    learner.learn(rollout, reward, 1, Stopwatch())
    for optimizer, lr in ((learner.optimizer, 5e-4), (learner.critic.optimizer, 2.5e-4)):
        group = optimizer.param_groups[0]
        assert (group["betas"], group["weight_decay"]) == ((0.7, 0.8), 0.1) and group["lr"] == pytest.approx(lr)
    for keys, bounds in (({"update.clip_high": 0.3}, (0.2, 0.3)), ({"update.clip_low": 0.1}, (0.1, 0.28))):
        numbers = started("ppo" if bounds[0] == 0.2 else "dapo", **keys)[0].objective().numbers
        assert (numbers.clip_low.item(), numbers.clip_high.item()) == pytest.approx(bounds)


def test_every_pass_deals_the_prompts_anew(started, monkeypatch):
    dealt: list = []

    def noted(batch, sequences):
        dealt.append((sequences[::3] // 3).tolist())
        return take(batch, sequences)

    monkeypatch.setattr("rlcore.engine.update.take", noted)
    learner, rollout, reward = started("grpo", **{"update.epochs": 2, "update.minibatches": 2})
    for step in (1, 2):
        learner.learn(rollout, reward, step, Stopwatch())
    passes = [dealt[i] + dealt[i + 1] for i in range(0, 8, 2)]
    assert all(sorted(order) == list(range(6)) for order in passes) and len({*map(tuple, passes)}) == 4


def test_metrics_over_several_steps():
    steps = [
        {"loss": torch.tensor(a), "tokens": torch.tensor(b), "ratio_max": torch.tensor(c), "ratio_min": torch.tensor(c)}
        for a, b, c in ((1.0, 3.0, 2.0), (2.0, 5.0, 1.5))
    ]
    assert over_steps(steps) == {"loss": 1.5, "tokens": 8.0, "ratio_max": 2.0, "ratio_min": 1.5}


# ---- KL to the reference


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_in_the_reward(started, small, kind):
    """Every token pays coef * KL by its own log-probs; GRPO compares the sums, REINFORCE++ the returns."""
    keys = {"kl.place": "reward", "kl.coef": 0.3, "kl.kind": kind}
    for method in ("rloo", "reinforce_pp"):
        learner, rollout, reward = started(method, other_model(small), **keys)
        scored, _ = learner.with_scores(rollout, learner.deal(rollout, 1, 0))
        batch, metrics = learner.with_advantage(scored, reward)
        x = batch.old_logp - batch.ref_logp
        assert x.abs().max() > 0.1
        kl = {"k1": x, "k2": x**2 / 2, "k3": (-x).exp() - 1 + x}[kind]
        paid, offsets = -0.3 * kl, batch.offsets.tolist()
        for s, r in enumerate(reward.tolist()):
            paid[offsets[s + 1] - 1] += r
        if method == "rloo":
            total = torch.stack([paid[a:b].sum() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]).reshape(6, 3)
            expected = per_token((total - (total.sum(1, keepdim=True) - total) / 2).reshape(-1), batch)
        else:
            returns = torch.cat(
                [paid[a:b].flip(0).cumsum(0).flip(0) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
            )
            expected = (returns - returns.mean()) / returns.std()
        torch.testing.assert_close(batch.advantage, expected, rtol=1e-4, atol=1e-5)
        assert metrics["kl/answer"] == pytest.approx(x.sum().item() / 18, rel=1e-4)
        assert metrics["kl/coef"] == 0.3


def test_kl_in_the_loss(started, small):
    """Without rewards the KL term alone moves the policy: towards the reference."""
    keys = {"kl.place": "loss", "kl.coef": 1.0, "update.warmup": 0, "update.minibatches": 1, "update.lr": 1e-3}
    learner, rollout, reward = started("grpo", other_model(small), **keys)
    history = []
    for step in range(1, 6):
        _, metrics = learner.learn(rollout, torch.zeros_like(reward), step, Stopwatch())
        history.append(metrics["policy/ref_kl_k3"])
        assert metrics["policy/kl_loss"] == pytest.approx(history[-1], rel=1e-4)
    assert history == sorted(history, reverse=True) and history[-1] < 0.8 * history[0]
    assert all(p.grad is None for p in learner.reference.policy.model.parameters())


def test_the_coefficient_adapts(started, small):
    keys = {"kl.place": "reward", "kl.coef": 0.1, "kl.adaptive_target": 1e-6, "kl.horizon": 90}
    learner, rollout, reward = started("grpo", other_model(small), **keys)
    _, first = learner.learn(rollout, reward, 1, Stopwatch())
    assert first["kl/coef"] == 0.1 and learner.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 18 / 90))
    _, second = learner.learn(rollout, reward, 2, Stopwatch())
    assert second["kl/coef"] == pytest.approx(0.104)
    learner = started("grpo", other_model(small), **{**keys, "kl.place": "loss"})[0]
    learner.kl_coef = 0.3
    assert learner.objective().kl.coef == 0.3


def test_a_bfloat16_policy_starts_at_its_reference(tiny):
    """Both compute in bfloat16: in float32 the reference would be some rounding away."""
    config = tiny(steps=1, model__dtype="bfloat16", kl__place="loss", update__layout="padded")
    train(config)
    assert metrics_of(config)[1]["kl/answer"] == 0


def test_a_reference_at_the_start_is_at_distance_zero(tiny):
    config = tiny(steps=3, kl__place="loss", kl__coef=0.1, checkpoint_every=9)
    train(config)
    records = metrics_of(config)[1:]
    assert records[0]["kl/answer"] == pytest.approx(0, abs=1e-5)
    assert records[2]["policy/ref_kl_k3"] > 1e-6
    start, reference = (
        load_file(path / "model.safetensors")
        for path in (found(run_of(config) / "checkpoints")[0] / "model", run_of(config) / "reference")
    )
    assert all(torch.equal(start[name], reference[name]) for name in reference)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"kl.adaptive_target": 1.0}, "kl.place"),
        ({"kl.place": "loss", "kl.kind": "k1"}, "kl.kind"),
        # A step that multiplies by less than 0 would turn the penalty into a reward.
        ({"kl.place": "loss", "kl.adaptive_target": 1.0, "kl.horizon": 1023}, "kl.horizon must be at least"),
        ({"rollout.dynamic_sampling": True, "rollout.samples": 1, "method": "reinforce_pp"}, "rollout.samples"),
    ],
)
def test_what_does_not_go_together_is_named(keys, named):
    from rlcore.engine.config_rules import validate

    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        validate(with_keys(Config(), keys))


# ---- length, time, moving average


def test_overlong_penalty_and_filter(started):
    keys = {"rollout.overlong_buffer": 0.4, "rollout.overlong_penalty": 2.0, "rollout.overlong_filter": True}
    learner, rollout, reward = started("rloo", **keys)
    batch, metrics = learner.with_advantage(learner.with_scores(rollout, learner.deal(rollout, 1, 0))[0], reward)
    lengths = batch.lengths()
    penalty = torch.tensor([{4: -1.0, 5: -2.0}.get(n, 0.0) for n in lengths.tolist()])
    assert metrics["overlong_penalty"] == pytest.approx(penalty.mean().item()) and penalty.any()
    total = (reward + penalty).reshape(6, 3)
    expected = per_token((total - (total.sum(1, keepdim=True) - total) / 2).reshape(-1), batch)
    torch.testing.assert_close(batch.advantage, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.mask, per_token(rollout.finished, batch))
    assert batch.totals.tokens == lengths[rollout.finished].sum()


def test_all_answers_cut_off_is_no_error(started):
    learner, rollout, reward = started("grpo", **{"rollout.overlong_filter": True})
    rollout = dataclasses.replace(rollout, finished=torch.zeros(18, dtype=torch.bool))
    _, metrics = learner.learn(rollout, reward, 1, Stopwatch())
    assert metrics["policy/loss"] == 0 and metrics["policy/grad_norm"] == 0


@pytest.mark.parametrize("method", ["ppo", "dr_grpo", "gspo"])
def test_micro_batches_change_nothing(started, method, monkeypatch):
    """Micro-batches of one answer against one of all: the gradients of every optimizer step, and the weights after.

    The weights' tolerance is wider: Adam moves an entry by the whole rate, also where its gradient is mostly rounding.
    """
    gradients: list[torch.Tensor] = []
    clip = torch.nn.utils.clip_grad_norm_

    def noted(parameters, most):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.reshape(-1) for p in parameters]))
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    weights = []
    for tokens in (1, 10_000):
        learner, rollout, reward = started(method, **{"update.micro_tokens": tokens, "update.warmup": 0})
        learner.learn(rollout, reward, 1, Stopwatch())
        weights.append(torch.cat([p.detach().reshape(-1) for p in learner.policy.model.parameters()]))
    start = torch.cat([p.detach().reshape(-1) for p in started(method)[0].policy.model.parameters()])
    moved = (weights[0] - start).norm()
    assert moved > 0 and (weights[0] - weights[1]).norm() < 1e-4 * moved
    steps = len(gradients) // 2
    assert steps == learner.config.update.minibatches * (2 if method == "ppo" else 1)
    for one, other in zip(gradients[:steps], gradients[steps:], strict=True):
        assert one.norm() > 0 and (one - other).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_packs_of_a_minibatch(started, layout):
    """Every answer once, with its own prompt, in packs under the budget; prompts count as the layout holds them."""
    rollout, most = started()[1], 60
    sequences, packs = minibatch_of(rollout, [1, 2, 4, 5], UpdateConfig(micro_tokens=most), layout, False)
    assert sequences.tolist() == [3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17]
    answers = [answer for group in rollout.responses for answer in group]
    seen = []
    for chosen, pack in packs:
        own = sequences[chosen].tolist()
        assert pack.pairs == [(rollout.prompts[s // 3], answers[s]) for s in own]
        once = pack.prompts if layout == "tree" else [prompt for prompt, _ in pack.pairs]
        assert sum(map(len, once)) + sum(len(answers[s]) for s in own) <= most
        assert pack.tree is pack.tree and torch.equal(pack.tree.target, rollout.batch.take(own).target)
        seen += own
    lengths = [[len(answer) for answer in rollout.responses[g]] for g in (1, 2, 4, 5)]
    prompts = [len(rollout.prompts[g]) for g in (1, 2, 4, 5)]
    if layout == "padded":
        lengths = [[prompt + n for n in own] for prompt, own in zip(prompts, lengths, strict=True)]
        prompts = [0] * 4
    assert [chosen for chosen, _ in packs] == rl.pack_groups(prompts, lengths, most)
    assert sorted(seen) == sequences.tolist() and len(packs) > 1


def test_packs_of_whole_groups(started):
    """Where an objective compares the answers to a prompt, they stay together, also above the budget."""
    rollout = started()[1]
    for whole in (True, False):
        packs = minibatch_of(rollout, [1, 2, 4, 5], UpdateConfig(micro_tokens=1), "tree", whole).packs
        assert [len(chosen) for chosen, _ in packs] == ([3] * 4 if whole else [1] * 12)


def test_scores_come_back_in_the_order_of_the_rollout(started, small):
    """However the answers were dealt and packed, every token has the log-prob and the value of its own answer."""
    found = []
    for keys in ({"update.micro_tokens": 45, "update.minibatches": 3}, {"update.minibatches": 1}):
        learner, rollout, _ = started("ppo", other_model(small), **{"kl.place": "loss", **keys})
        torch.nn.init.normal_(learner.critic.head.weight, generator=torch.Generator().manual_seed(0))
        dealt = learner.deal(rollout, 1, 0)
        batch, entropy = learner.with_scores(rollout, dealt)
        assert torch.equal(batch.target, rollout.batch.target)
        found.append(torch.stack([batch.old_logp, batch.ref_logp, batch.value, entropy]))
        packs = [pack for _, own in dealt for _, pack in own]
    assert len(packs) == 1 and found[0].std(dim=1).min() > 1e-3
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1][0], rollout.model_logp, rtol=0, atol=1e-4)


def test_the_first_pass_learns_on_the_trees_that_were_scored(started, small, monkeypatch):
    """Old and reference log-probs, values and losses of the first pass share one tree per pack."""
    from rlcore.prefix_tree import PrefixTree

    made: list = []
    build = PrefixTree.from_paths

    def counted(*arguments, **options):
        made.append(1)
        return build(*arguments, **options)

    monkeypatch.setattr(PrefixTree, "from_paths", counted)
    keys = {"kl.place": "loss", "update.minibatches": 2, "update.epochs": 2, "update.micro_tokens": 45}
    learner, rollout, reward = started("ppo", other_model(small), **keys)
    packs = [len(own) for epoch in (0, 1) for _, own in learner.deal(rollout, 1, epoch)]
    made.clear()
    learner.learn(rollout, reward, 1, Stopwatch())
    assert len(made) == sum(packs) > 4


def test_stopwatch_accounts_for_the_whole():
    clock = Stopwatch()
    with clock("a"):
        sum(range(10_000))
    with clock("b"):
        sum(range(10_000))
    clock.move("a", "c", 1e-6)
    times = clock.metrics()
    parts = [times[f"time/{name}"] for name in ("a", "b", "c", "other")]
    assert all(x > 0 for x in parts) and sum(parts) == pytest.approx(times["time/step"])


def test_what_was_before_the_stopwatch_counts():
    clock = Stopwatch(log=2.0)
    with clock("log"):
        sum(range(10_000))
    times = clock.metrics()
    assert 2 < times["time/log"] < times["time/step"] < 2.5 and times["time/other"] < 0.5


def test_the_loops_own_share_of_a_step():
    """Median over steps of all that is neither rollout nor reward, forward, backward or optimizer."""
    work = {"time/rollout": 4.0, "time/reward": 1.0, "time/forward_backward": 3.0, "time/optimizer": 1.0}
    steps = [{"step": k, **work, "time/log": own, "time/step": 9 + own} for k, own in enumerate((0.5, 1.0, 91.0), 1)]
    assert own_share([{"step": 0, "eval/accuracy": 0.5}, *steps]) == pytest.approx(0.1)


def test_evaluations_use_the_moving_average(tiny):
    """With a decay near one the average stays at the start: evaluations do not move, the policy does."""
    outcomes = []
    for name, decay in (("average", 0.9999999), ("plain", 0.0)):
        config = tiny(name=name, update__ema=decay, update__lr=0.05, update__warmup=0, update__final_lr=1.0)
        train(config)
        records = [r for r in metrics_of(config) if "eval/reward" in r]
        outcomes.append({(r["eval/reward"], r["eval/length"]) for r in records})
    assert len(outcomes[0]) == 1 and len(outcomes[1]) > 1
    config = tiny(name="average")
    last = found(run_of(config) / "checkpoints")[-1]
    average, weights = load_file(last / "ema" / "model.safetensors"), load_file(last / "model" / "model.safetensors")
    assert average.keys() == weights.keys() and not all(torch.equal(average[k], weights[k]) for k in weights)


# ---- whole runs


@pytest.mark.parametrize("method", methods())
def test_every_method_trains(tiny, method):
    config = with_keys(tiny(method=method, steps=5, checkpoint_every=9), methods()[method].defaults)
    train(config)
    records = metrics_of(config)
    assert len(records) == 6 and any(record["policy/grad_norm"] > 0 for record in records[1:])
    assert ("critic/value_loss" in records[-1]) == (method == "ppo")
    assert ("resample/replaced" in records[-1]) == (method == "dapo")


EVERYTHING = {
    "kl.place": "reward", "kl.coef": 0.05, "kl.adaptive_target": 0.01, "kl.horizon": 100, "update.ema": 0.5,
    "update.epochs": 2, "critic.warmup_steps": 1, "rollout.overlong_buffer": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("method", ["ppo", "dapo"])
def test_resume_with_everything_on(tiny, method):
    """Critic, adaptive coefficient, reference, moving average, dynamic sampling: stopped and resumed at every step."""
    keys = {**methods()[method].defaults, **EVERYTHING}
    whole = with_keys(tiny(method=method, name="whole"), keys)
    train(whole)
    expected, records = last_files(whole), metrics_of(whole)
    assert records[-1]["kl/coef"] != records[1]["kl/coef"]
    needed = {"ema.safetensors", "learner.json"} | ({"critic.safetensors"} if method == "ppo" else set())
    assert needed <= expected.keys()
    for after in (1, 2, 3):
        config = dataclasses.replace(whole, name=f"stopped-{after}")
        stopped_and_resumed(config, after)
        files = last_files(config)
        assert not {name for name in files.keys() | expected.keys() if files.get(name) != expected.get(name)}
        assert metrics_of(config) == records
