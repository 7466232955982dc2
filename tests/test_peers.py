"""Our losses beside those of other trainers, each in its own convention. Runs in `make test-peers` alone."""

from __future__ import annotations

from collections import defaultdict
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

import rlcore as rl

pytestmark = pytest.mark.peers

B, T, V = 6, 11, 37
BETA, MAX_LENGTH = 0.05, 16

# TRL's loss types and importance-sampling levels in the words of an objective.
CASES = {
    ("grpo", "token"): {"aggregate": "seq_mean_token_mean"},
    ("bnpo", "token"): {"aggregate": "token_mean"},
    ("dapo", "token"): {"aggregate": "token_mean"},
    ("dr_grpo", "token"): {"aggregate": "seq_mean_token_sum_norm", "length": MAX_LENGTH},
    ("cispo", "token"): {"aggregate": "token_mean", "surrogate": "cispo"},
    ("grpo", "sequence"): {"aggregate": "seq_mean_token_mean", "ratio": "sequence"},
    ("luspo", "sequence"): {"aggregate": "seq_mean_token_sum", "ratio": "sequence"},
}


def minibatch() -> dict[str, Tensor]:
    lengths = torch.tensor([11, 3, 1, 7, 11, 5])
    logp = -torch.rand(B, T, dtype=torch.float64)
    return {
        "mask": torch.arange(T) < lengths[:, None],
        "logp": logp,
        "old": logp + 0.3 * torch.randn(B, T, dtype=torch.float64),
        "ref": logp + 0.3 * torch.randn(B, T, dtype=torch.float64),
        "advantage": torch.randn(B, dtype=torch.float64),
    }


def trl_loss(x: dict[str, Tensor], logp: Tensor, loss_type: str, level: str) -> Tensor:
    """The loss method of TRL's trainer, with a trainer that holds its settings and no model."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer = MagicMock()
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    trainer.epsilon_low, trainer.epsilon_high, trainer.beta = 0.2, 1.28 if loss_type == "cispo" else 0.28, BETA
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold, trainer.use_vllm = 1.0, None, False
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.args.delta, trainer.args.use_bias_correction_kl, trainer.args.steps_per_generation = None, False, 1
    trainer.max_completion_length, trainer.current_gradient_accumulation_steps = MAX_LENGTH, 1
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = lambda tensor: tensor
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._get_per_token_logps_and_entropies.return_value = (logp, torch.zeros_like(logp), None)
    ids = torch.zeros(B, T, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": x["mask"].long(),
        "advantages": x["advantage"],
        "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"],
        "num_items_in_batch": x["mask"].sum(),
    }
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_policy_loss_equals_that_of_trl(loss_type: str, level: str) -> None:
    x = minibatch()
    theirs, ours = x["logp"].clone().requires_grad_(), x["logp"].clone().requires_grad_()
    expected = trl_loss(x, theirs, loss_type, level)
    expected.backward()

    # TRL bounds CISPO's weight from above alone.
    clip = (1.0, 0.28) if loss_type == "cispo" else (0.2, 0.28)
    objective = rl.Objective(clip=clip, kl=rl.KL("k3", BETA), **CASES[loss_type, level])
    target = torch.zeros(B, T, dtype=torch.int64)
    batch = rl.TokenBatch(target, mask=x["mask"], advantage=x["advantage"], old_logp=x["old"], ref_logp=x["ref"])
    loss, _ = rl.policy_loss(ours, batch, objective)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9, check_dtype=False)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


def test_log_probs_and_entropy_equal_those_of_trl() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    logits, target = 5 * torch.randn(B, T, V), torch.randint(V, (B, T))
    ours = rl.logprob(logits, target, entropy=True)
    torch.testing.assert_close(ours.logp, utils.selective_log_softmax(logits, target), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, utils.entropy_from_logits(logits), rtol=1e-5, atol=1e-5)
