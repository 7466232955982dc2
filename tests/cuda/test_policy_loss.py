"""The policy loss in CUDA C++, on a GPU or emulated."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from policy_loss_cases import agree, make_batch, make_case, make_objective, rich, run, widened
from policy_loss_kernel_tests import *  # noqa: F403

import rlcore as rl
from rlcore.algorithms.policy_loss_metrics import metric_names
from rlcore.ops import policy_loss_cuda as cuda
from rlcore.ops import policy_loss_raw as raw


@pytest.fixture
def name() -> str:
    return "cuda"


@pytest.fixture
def several_programs() -> None:
    """10 blocks of 256 rows, as it is."""


@pytest.mark.parametrize("options", [*itertools.product((None, 1.5), (None, 1.2), (None, ("k1", 0.3)), (0.0, 0.05))])
def test_every_choice_of_metrics(device, options):
    """The kernel chooses by bits, in an order that is written down twice."""
    dual_clip, cap, kl, bonus = options
    case = rich("token", "ppo", "token_mean", dual_clip=dual_clip, cap=cap, kl=kl, entropy=bonus)
    logp, entropy, batch = make_batch(case, torch.float32)
    objective = make_objective(case)
    for left_out in ({}, {"ref_logp": None}, {"rollout_logp": None}):
        if ("ref_logp" in left_out and kl) or ("rollout_logp" in left_out and cap):
            continue
        rows, h = replace(batch, **left_out), entropy if bonus or left_out else None
        names = metric_names(rows, objective, h is not None)
        assert names == tuple(name for name in cuda.METRICS if name in names)
        want = run("reference", logp.double(), widened(rows), objective, None if h is None else h.double())
        agree(run("cuda", logp, rows, objective, h, device), want)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_several_rows_of_a_thread_and_units_of_a_block(device, ratio):
    n = 256 * 512 + 300  # two each, but for the last blocks; 8211 sequences for 4096 blocks
    logp, mask = -torch.rand(n), torch.rand(n) < 0.8
    batch = rl.TokenBatch(torch.zeros(n, dtype=torch.int64), torch.cat([torch.arange(0, n, 16), torch.tensor([n])]),
                          mask=mask, advantage=torch.randn(n), old_logp=logp + 0.3 * torch.randn(n))  # fmt: skip
    objective = rl.Objective(ratio)
    agree(run("cuda", logp, batch, objective, None, device),
          run("reference", logp.double(), widened(batch), objective, None))  # fmt: skip


def test_only_where_it_is_asked_for(device):
    x = make_batch(make_case(), torch.float32)[0].detach().to(device)
    assert raw.implementation(x, None, rl.Objective()) is not cuda
    with rl.backend("cuda"):
        assert raw.implementation(x, None, rl.Objective()) is cuda
        assert raw.implementation(x.double(), None, rl.Objective()) is None
