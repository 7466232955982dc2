"""Grids stay within what CUDA takes, 2^31 - 1 programs along x and 65,535 along y and z, for the largest of inputs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import rlcore as rl
from interpreter import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("counts launches of the compiler", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))  # after tests, which have names in common

import compile_kernels as static
from triton.runtime.jit import JITFunction


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int64)


def prefix_attention():
    """16M rows of 128 heads of 128."""
    from rlcore.kernels import prefix_attention as forward
    from rlcore.kernels import prefix_attention_backward as backward
    from rlcore.kernels import prefix_attention_keys as keys

    M, dtype = 1 << 24, torch.bfloat16
    q, k = empty(M, 128, 128, dtype=dtype), empty(M, 8, 128, dtype=dtype)
    blocks = [choose(128, dtype) for choose in (forward.forward_blocks, backward.query_blocks, keys.key_blocks)]
    tiles, options = [M * 16 // b.lanes for b in blocks[:2]], (0.1, None, None)
    forward.prefix_attention_forward(q, k, k, ids(M), ids(M), ids(tiles[0], 5), ids(9, 2), None, *options, blocks[0])
    statistics = backward.prefix_attention_delta(q, q, q, empty(M, 128))
    rows = q, q, k, k, *statistics, ids(M), ids(M)
    backward.prefix_attention_dq(*rows, ids(tiles[1], 5), ids(9, 2), *options, blocks[1])
    key_tiles = M // blocks[2].keys
    keys.prefix_attention_dkdv(*rows, ids(key_tiles, 5), ids(9, 2), ids(key_tiles, 3), 9, *options, blocks[2])


def vocab_head():
    """16M rows of a vocabulary of 2^18: logits that nobody could hold, and none at all."""
    from rlcore.kernels import vocab_head as kernels
    from rlcore.kernels import vocab_head_fused as fused

    n, V = 1 << 24, 1 << 18
    logits, head, one = empty(n, V), (None, empty(), None, empty()), empty()
    stats = kernels.statistics(logits, ids(n), *head, True)
    kernels.gradient(logits, logits, ids(n), *head, stats, empty(n), None)
    hidden, weight = empty(n, 64, dtype=torch.bfloat16), empty(V, 64, dtype=torch.bfloat16)
    fused.statistics(hidden, weight, ids(n), None, None, one, None, one, True)


def segments():
    """A thousand million rows in ten million segments, and in one."""
    from rlcore.kernels.segments import segment_reduce
    from rlcore.kernels.segments_linear import linear_scan
    from rlcore.kernels.segments_rank import segment_rank
    from rlcore.kernels.segments_scan import reverse_scan

    n = 10**9
    for count in (10**7, 1):
        segment_reduce("std", empty(n), ids(count + 1))
        segment_rank(empty(n), ids(count + 1))
        reverse_scan("gae", (empty(n), empty(n)), count, ids(count + 1), None, None, 0.9, 0.9)
    linear_scan(empty(n), empty(n), empty(n, dtype=torch.bool))


def policy_loss():
    """A thousand million tokens in ten million sequences."""
    from rlcore.ops.policy_loss_triton import evaluate

    n = 10**9
    batch = rl.TokenBatch(ids(n), ids(10**7 + 1), advantage=empty(n), old_logp=empty(n))
    evaluate(empty(n), None, batch, rl.Objective("sequence"), (True, False))


FAMILIES = {prefix_attention: 6, vocab_head: 4, segments: 7, policy_loss: 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_are_within_limits(monkeypatch, family):
    grids = {}

    def record(self, *args, grid, warmup, **options):
        grids.setdefault(self.__name__, []).append(grid)

    with static.compiling("sm_90"):
        monkeypatch.setattr(JITFunction, "run", record)
        family()
        monkeypatch.undo()
    assert len(grids) == FAMILIES[family], list(grids)
    for name, launched in grids.items():
        for grid in launched:
            assert all(1 <= n <= most for n, most in zip(grid, (2**31 - 1, 65535, 65535))), (name, grid)
