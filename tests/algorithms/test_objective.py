"""Objectives: bad arguments, objectives of the user's own, batch scope, and the value loss."""

from __future__ import annotations

import functools
import pickle
from dataclasses import replace

import pytest
import torch

import rlcore as rl
from rlcore.algorithms.objective import lookup, register

BAD = [
    ({"ratio": "tokens"}, ValueError, "ratio: expected one of none, token, segment, sequence; got 'tokens'"),
    ({"surrogate": "trpo"}, ValueError, "surrogate: expected one of"),
    ({"aggregate": "mean"}, ValueError, "aggregate: expected one of"),
    ({"clip": 0.2}, TypeError, "clip: expected a pair"),
    ({"clip": (-0.1, 0.2)}, ValueError, r"clip\[0\]: expected a number at least 0; got -0.1"),
    ({"clip": (0.1, "0.2")}, TypeError, r"clip\[1\]: expected a number"),
    ({"clip": (float("nan"), 0.2)}, ValueError, r"clip\[0\]"),
    ({"dual_clip": 1.0}, ValueError, "dual_clip: expected a number above 1"),
    ({"kl": 0.1}, TypeError, r"kl: expected None or rl.KL"),
    ({"correction": 2.0}, TypeError, "correction: expected None or rl.TIS"),
    ({"aggregate": "seq_mean_token_sum_norm"}, ValueError, "length: needed"),
    ({"entropy": float("nan")}, ValueError, "entropy"),
    ({"entropy": float("inf")}, ValueError, "entropy"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_objectives(options, error, message):
    with pytest.raises(error, match=message):
        rl.Objective(**options)


def test_bad_terms():
    with pytest.raises(ValueError, match="estimator: expected one of k1, k2, k3"):
        rl.KL("k4", 0.1)
    with pytest.raises(TypeError, match="coef: expected a number"):
        rl.KL("k3", None)
    with pytest.raises(ValueError, match="cap"):
        rl.TIS(-1.0)


def batch_of(lengths=(3, 2, 4), **fields) -> rl.TokenBatch:
    n = sum(lengths)
    fields = {"advantage": torch.linspace(-1, 1, n)} | fields
    return rl.TokenBatch(torch.zeros(n, dtype=torch.int64), torch.tensor([0, *lengths]).cumsum(0), **fields)


def test_missing_fields_are_named():
    logp, batch = torch.zeros(9), batch_of()
    for options, field in (
        ({"kl": rl.KL()}, "ref_logp"), ({"correction": rl.TIS()}, "rollout_logp"), ({"ratio": "segment"}, "segment"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"batch\.{field}: the objective reads it"):
            rl.policy_loss(logp, batch, rl.Objective(**options))
    with pytest.raises(ValueError, match=r"batch\.advantage"):
        rl.policy_loss(logp, batch_of(advantage=None), rl.Objective())
    with pytest.raises(ValueError, match="entropy: the objective has an entropy term"):
        rl.policy_loss(logp, batch, rl.Objective(entropy=0.1))
    with pytest.raises(ValueError, match=r"logp: expected shape \(9,\) like batch.target; got \(8,\)"):
        rl.policy_loss(torch.zeros(8), batch, rl.Objective())
    with pytest.raises(TypeError, match=r"batch: expected an rl.TokenBatch; got NoneType"):
        rl.policy_loss(logp, None, rl.Objective())
    with pytest.raises(TypeError, match=r"objective: expected an rl.Objective; got str"):
        rl.policy_loss(logp, batch, "grpo")
    with pytest.raises(TypeError, match=r"logp: expected a torch.Tensor; got NoneType"):
        rl.policy_loss(None, batch, rl.Objective())
    with pytest.raises(TypeError, match="logp: expected a floating dtype"):
        rl.policy_loss(torch.zeros(9, dtype=torch.int64), batch, rl.Objective())


def ppo_by_hand(logp, entropy, batch):
    ratio = (logp - batch.old_logp).exp()
    loss = -torch.minimum(ratio * batch.advantage, ratio.clamp(0.8, 1.2) * batch.advantage)
    return loss, {"ratio": ratio}


def test_custom_equals_built_in():
    logp = torch.randn(9, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1])
    batch = batch_of(old_logp=torch.randn(9, dtype=torch.float64), mask=mask)
    for aggregate in ("token_mean", "seq_mean_token_mean"):
        custom = rl.Objective.custom(ppo_by_hand, aggregate=aggregate)
        loss, metrics = rl.policy_loss(logp, batch, custom)
        expected, expected_metrics = rl.policy_loss(logp, batch, rl.Objective(aggregate=aggregate))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(metrics["ratio"], expected_metrics["ratio_mean"])
        got, want = torch.autograd.grad(loss, logp)[0], torch.autograd.grad(expected, logp)[0]
        torch.testing.assert_close(got, want)


def test_custom_objective_never_sees_masked_values():
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1])
    batch = batch_of(old_logp=torch.where(mask == 1, torch.zeros(9), torch.nan), mask=mask)
    logp = torch.where(mask == 1, -torch.ones(9), torch.nan).requires_grad_()
    loss, _ = rl.policy_loss(logp, batch, rl.Objective.custom(ppo_by_hand))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()


def test_custom_metrics_merge_by_their_names():
    def extremes(logp, entropy, batch):
        return -logp, {"logp_min": logp, "logp_max": logp, "logp_of_all": logp}

    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0])
    logp, batch = -torch.rand(9), batch_of(mask=mask)
    objective = rl.Objective.custom(extremes)
    parts = [rl.policy_loss(logp[p.rows], p, objective)[1] for p in batch.split(4)]
    merged, live = rl.merge_metrics(parts), logp[mask == 1]
    assert float(merged["logp_min"]) == float(live.min())
    assert float(merged["logp_max"]) == float(live.max())
    assert float(merged["logp_of_all"]) == pytest.approx(float(live.mean()))


outside = torch.nn.Parameter(torch.ones(()))


def test_gradients_that_would_be_lost_are_refused():
    scale = torch.ones((), requires_grad=True)
    module = torch.nn.Linear(1, 1, bias=False)
    held = {"scale": [scale]}

    class Callable:
        def __init__(self):
            self.factor = scale

        def __call__(self, logp, entropy, batch):
            return -logp * self.factor, {}

    def with_default(logp, entropy, batch, factor=scale):
        return -logp * factor, {}

    cases = [
        lambda logp, entropy, batch: (-logp * scale, {}),
        lambda logp, entropy, batch: (-logp * outside, {}),
        lambda logp, entropy, batch: (-module(logp[:, None])[:, 0], {}),
        lambda logp, entropy, batch: (-logp * held["scale"][0], {}),
        functools.partial(lambda factor, logp, entropy, batch: (-logp * factor, {}), scale),
        with_default,
        Callable(),
    ]
    for fn in cases:
        with pytest.raises(ValueError, match="outside it requires grad"):
            rl.Objective.custom(fn)
    rl.Objective.custom(lambda logp, entropy, batch: (-logp * scale.detach() + 0 * entropy, {}))


def test_a_custom_objective_leaves_built_in_ones_alone():
    """Both begin as Objective(); the folded head looks objectives up by key."""
    hidden, weight = torch.randn(9, 4), torch.randn(11, 4)
    batch, objective = batch_of(), rl.Objective()
    before = rl.linear_policy_loss(hidden, weight, batch, objective)
    rl.Objective.custom(lambda logp, entropy, batch: (logp * 0 + 1000, {"ratio_mean": logp}))
    after = rl.linear_policy_loss(hidden, weight, batch, objective)
    assert torch.equal(before[0], after[0]) and before[1].keys() == after[1].keys()


def test_many_custom_objectives_evict_no_built_in_one():
    objective = rl.Objective(ratio="none", surrogate="cispo")
    for _ in range(3):
        rl.Objective.custom(ppo_by_hand)
    for serial in range(1100):
        register(renamed(rl.Objective.custom, serial))
    assert lookup(objective.key, objective.numbers).surrogate == "cispo"


def renamed(make, serial):
    copy = make(ppo_by_hand) if serial == 0 else object.__new__(rl.Objective)
    if serial:
        copy.custom_loss, copy.key = ppo_by_hand, f"custom-test-{serial}"
    return copy


def test_objectives_compare_by_value_and_survive_pickling():
    objective = rl.Objective(clip=(0.1, 0.3), kl=rl.KL("k2", 0.5), dual_clip=4.0)
    assert objective == rl.Objective(clip=(0.1, 0.3), kl=rl.KL("k2", 0.5), dual_clip=4.0)
    assert objective != rl.Objective(clip=(0.1, 0.31), kl=rl.KL("k2", 0.5), dual_clip=4.0)
    assert "dual_clip=4.0" in repr(objective) and "length" not in repr(objective)
    again = pickle.loads(pickle.dumps(objective))
    assert again == objective
    custom = pickle.loads(pickle.dumps(rl.Objective.custom(ppo_by_hand)))
    batch = batch_of(old_logp=torch.zeros(9))
    loss, _ = rl.linear_policy_loss(torch.randn(9, 4), torch.randn(11, 4), batch, custom)
    assert torch.isfinite(loss)


def test_custom_results_are_checked_at_once():
    with pytest.raises(TypeError, match=r"expected \(loss per token, dict of metrics\)"):
        rl.Objective.custom(lambda logp, entropy, batch: -logp)
    with pytest.raises(ValueError, match="expected a loss of shape"):
        rl.Objective.custom(lambda logp, entropy, batch: (-logp.sum(), {}))
    with pytest.raises(ValueError, match="metric 'm' needs a value per token"):
        rl.Objective.custom(lambda logp, entropy, batch: (-logp, {"m": 1.0}))
    with pytest.raises(ValueError, match="may not be called 'ess'"):
        rl.Objective.custom(lambda logp, entropy, batch: (-logp, {"ess": logp}))
    constant = torch.ones(4, device="meta")
    with pytest.raises(ValueError, match=r"fails on a probe of four tokens on cpu .* device="):
        rl.Objective.custom(lambda logp, entropy, batch: (-logp * constant, {}))


def centred(logp, entropy, batch):
    return -(batch.advantage - batch.advantage.mean()) * logp, {}


def test_debug_mode_finds_a_loss_that_depends_on_chunks():
    logp, batch = -torch.rand(9), batch_of()
    rl.policy_loss(logp, batch, rl.Objective.custom(centred))
    with pytest.raises(ValueError, match="depends on where a batch is cut"):
        rl.policy_loss(logp, batch, rl.Objective.custom(centred, debug=True))
    old = batch_of(old_logp=torch.zeros(9))
    rl.policy_loss(logp, old, rl.Objective.custom(ppo_by_hand, debug=True))


def test_batch_scope_is_prepared_on_the_whole_minibatch():
    def prepare(logp, entropy, batch):
        return replace(batch, weight=(logp > logp.mean()).to(logp.dtype))

    def weighted(logp, entropy, batch):
        return -batch.weight * batch.advantage * logp, {}

    objective = rl.Objective.custom(weighted, scope="batch", prepare=prepare)
    logp, batch = torch.randn(9, dtype=torch.float64), batch_of()
    loss, _ = rl.policy_loss(logp, batch, objective)
    chosen = logp > logp.mean()
    assert loss.item() == pytest.approx(float(-(batch.advantage * logp)[chosen].sum() / 9))
    with pytest.raises(ValueError, match="whole minibatch"):
        rl.policy_loss(logp[:3], batch.split(3)[0], objective)
    torch.testing.assert_close(rl.policy_loss(logp, batch.split(100)[0], objective)[0], loss)
    with pytest.raises(TypeError, match="prepare: expected it to return a TokenBatch"):
        rl.policy_loss(logp, batch, rl.Objective.custom(weighted, scope="batch", prepare=lambda *args: None))
    masking = rl.Objective.custom(
        weighted, scope="batch", prepare=lambda logp, entropy, batch: replace(batch, mask=chosen, weight=logp * 0 + 1)
    )
    kept = -(batch.advantage * logp)[chosen].sum() / chosen.sum()
    torch.testing.assert_close(rl.policy_loss(logp, batch, masking)[0], kept)
    parts = objective.prepare(logp, None, batch).split(4)
    total = sum(rl.policy_loss(logp[p.rows], p, objective)[0] for p in parts)
    torch.testing.assert_close(total, loss)
    with pytest.raises(ValueError, match="prepare: needed"):
        rl.Objective.custom(weighted, scope="batch")


def test_lookup_keeps_structure_and_takes_numbers():
    objective = rl.Objective(clip=(0.1, 0.3), dual_clip=3.0)
    other = rl.Objective(clip=(0.2, 0.4), dual_clip=2.0)
    assert objective.key == other.key
    found = lookup(objective.key, list(objective.numbers))
    assert float(found.numbers.clip_high) == pytest.approx(0.3) and found.has_dual_clip
    with pytest.raises(RuntimeError, match="left the registry"):
        lookup("custom-unknown", list(objective.numbers))


def test_values_within_the_range_do_not_count_as_clipped():
    generator = torch.Generator().manual_seed(0)
    value, old_value, returns = torch.randn(3, 1000, generator=generator)
    batch = rl.TokenBatch(torch.zeros(1000, dtype=torch.int64), torch.tensor([0, 1000]),
                          returns=returns, old_value=old_value)  # fmt: skip
    loss, metrics = rl.value_loss(value, batch, clip=10.0)
    assert metrics["value_clip_fraction"] == 0 and torch.equal(loss, rl.value_loss(value, batch)[0])


def test_value_loss():
    value = torch.tensor([1.0, 2.0, torch.nan, 4.0], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([0.0, 2.5, torch.nan, 1.0], dtype=torch.float64, requires_grad=True)
    old_value = torch.tensor([0.5, 2.0, torch.nan, 5.0], dtype=torch.float64, requires_grad=True)
    batch = rl.TokenBatch(
        torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4]), mask=torch.tensor([1, 1, 0, 1]),
        returns=returns, old_value=old_value,
    )  # fmt: skip
    loss, metrics = rl.value_loss(value, batch)
    assert loss.item() == pytest.approx(0.5 * (1 + 0.25 + 9) / 3)
    loss, metrics = rl.value_loss(value, batch, clip=0.2)
    # row 0: v 1.0 clips to 0.7 (0.49 < 1); row 1: unmoved; row 3: v 4 clips to 4.8 (14.44 > 9, no gradient)
    assert loss.item() == pytest.approx(0.5 * (1 + 0.25 + 14.44) / 3)
    assert float(metrics["value_clip_fraction"]) == pytest.approx(1 / 3)
    assert float(metrics["return_mean"]) == pytest.approx(3.5 / 3)
    assert float(metrics["value_mean"]) == pytest.approx(7 / 3)
    loss.backward()
    assert value.grad.tolist() == pytest.approx([1 / 3, -0.5 / 3, 0, 0])
    assert returns.grad is None and old_value.grad is None
    parts = [rl.value_loss(value[p.rows], p, clip=0.2)[0] for p in batch.split(2)]
    torch.testing.assert_close(sum(parts), loss)
    with pytest.raises(ValueError, match=r"batch\.returns"):
        rl.value_loss(torch.zeros(9), batch_of())
    with pytest.raises(ValueError, match=r"batch\.old_value"):
        rl.value_loss(torch.zeros(9), batch_of(returns=torch.zeros(9)), clip=0.2)
    with pytest.raises(TypeError, match=r"value: expected a floating tensor; got torch.int64"):
        rl.value_loss(torch.zeros(9, dtype=torch.int64), batch_of(returns=torch.zeros(9)))
    with pytest.raises(TypeError, match="clip: expected a number; got 'a'"):
        rl.value_loss(torch.zeros(9), batch_of(returns=torch.zeros(9), old_value=torch.zeros(9)), clip="a")
    with pytest.raises(ValueError, match="value: expected shape"):
        rl.value_loss(torch.zeros(8), batch_of())
