"""What prefix attention's kernels may not compile to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from interpreter import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))  # after tests, which have names in common

import compile_kernels as static

from rlcore.kernels import prefix_attention as forward
from rlcore.kernels import prefix_attention_backward as backward
from rlcore.kernels import prefix_attention_keys as keys


def launch(D: int, window: int | None, softcap: float | None, sink: torch.Tensor | None) -> None:
    """Every kernel once, in float32."""
    q, k = torch.empty(256, 8, D), torch.empty(256, 2, D)
    end = torch.zeros(256, dtype=torch.int64)
    items, segments, splits = (torch.zeros(1, n, dtype=torch.int64) for n in (5, 2, 3))
    options = (0.1, window, softcap)
    blocks = [choose(D, q.dtype) for choose in (forward.forward_blocks, backward.query_blocks, keys.key_blocks)]
    _, lse = forward.prefix_attention_forward(q, k, k, end, end, items, segments, sink, *options, blocks[0])
    rows = q, q, k, k, *backward.prefix_attention_delta(q, q, q, lse), end, end
    backward.prefix_attention_dq(*rows, items, segments, *options, blocks[1])
    keys.prefix_attention_dkdv(*rows, items, segments, splits, 1, *options, blocks[2])


@pytest.mark.parametrize(("D", "options"), [
    (64, (16, 30.0, torch.empty(8))), pytest.param(128, (None, None, None), marks=pytest.mark.slow),
    pytest.param(80, (16, None, None), marks=pytest.mark.slow),
    pytest.param(256, (None, None, None), marks=pytest.mark.slow),
])  # fmt: skip
def test_float32_is_not_multiplied_in_tf32(D, options):
    """NVIDIA's tensor cores have no float32; behind a mask of 8 bits Triton 3.7 has taken operands for upcast ones."""
    with static.compiling("sm_100") as found:
        launch(D, *options)
    assert {f.kernel: f.tensor_core for f in found} == dict.fromkeys((f.kernel for f in found), 0)
