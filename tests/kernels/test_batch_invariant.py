"""batch_invariant(): whatever chunks the logits are made in, a log-prob and what follows from it keep their bits."""

from __future__ import annotations

import pytest
import torch

import rlcore as rl

pytest.importorskip("triton")


def test_chunks_change_no_bit_of_the_forward_pass(device):
    n, V = 9, 40
    hidden, weight = torch.randn(n, 16, device=device), torch.randn(V, 16, device=device)
    target = torch.arange(n, device=device)
    batch = rl.TokenBatch(target, torch.tensor([0, 4, n], device=device), advantage=torch.randn(n, device=device))
    found = []
    for chunk_bytes in (4 * V, 3 * 4 * V, 2**20):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with rl.backend("triton"), rl.batch_invariant():
            out = rl.linear_logprob(*leaves, target, entropy=True, chunk_bytes=chunk_bytes)
            loss, metrics = rl.linear_policy_loss(*leaves, batch, rl.Objective(entropy=0.1), chunk_bytes=chunk_bytes)
        found.append([out.logp, out.entropy, loss, metrics["entropy"]])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
