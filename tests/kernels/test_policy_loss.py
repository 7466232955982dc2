"""The policy loss in Triton, on a GPU or in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_loss_cases import agree, large, run, widened
from policy_loss_kernel_tests import *  # noqa: F403

pytest.importorskip("triton")


@pytest.fixture
def name() -> str:
    return "triton"


@pytest.fixture
def several_programs(monkeypatch) -> None:
    """6 programs, of which two are added at once, of 7 tiles each, the last of fewer; 4 for all units."""
    from rlcore.kernels import policy_loss, policy_loss_units

    for name, value in {"TILE": 64, "PROGRAMS": 6, "MERGED": 2}.items():
        monkeypatch.setattr(policy_loss, name, value)
    monkeypatch.setattr(policy_loss_units, "PROGRAMS", 4)


def test_launches_take_turns_with_counters_and_leave_them_at_zero(device, monkeypatch):
    from rlcore.kernels import policy_loss as kernels

    made = kernels.counter_of(torch.empty((), device=device).device)[0]
    logp, entropy, batch, objective = large("token", "token_mean")
    parts = [(0, 700), (0, 2500), (700, 1900), (0, 1), (0, 2500)]  # programs: 3, 10, 5, 1, 10
    losses = []
    for count in (1, 2):
        monkeypatch.setattr(kernels, "TURNS", count)
        for start, stop in parts:
            part = replace(batch, offsets=torch.tensor([0, stop - start]), totals=batch.totals,
                           **{k: getattr(batch, k)[start:stop] for k in
                              ("target", "mask", "advantage", "old_logp", "ref_logp", "rollout_logp", "weight",
                               "segment")})  # fmt: skip
            got = run("triton", logp[start:stop], part, objective, entropy[start:stop], device)
            agree(got, run("reference", logp[start:stop].double(), widened(part), objective,
                           entropy[start:stop].double()))  # fmt: skip
            losses.append(got[0])
            assert not made.any()
    assert losses[: len(parts)] == losses[len(parts) :]


def test_counters_that_can_not_be_made_are_reported(device, monkeypatch):
    from rlcore.kernels import policy_loss as kernels

    def fail(device):
        raise MemoryError("no room")

    monkeypatch.setattr(kernels, "counters", {})
    monkeypatch.setattr(kernels, "make_counters", fail)
    with pytest.raises(MemoryError, match="no room"):
        kernels.counter_of(torch.device(device))
