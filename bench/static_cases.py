"""What is compiled without a GPU: per family, launches of its kernels as they ship, over dtypes and head sizes.

Nothing is computed, so tensors are empty ones on the CPU. `make test` compiles the cases of QUICK, which have every
kernel once; `make test-full` and `make static` compile all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Case = Callable[[], Any]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def segments() -> dict[str, Case]:
    from rlcore.kernels import segments as kernels

    cases: dict[str, Case] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for masked in (False, True):
            label = f"sum {str(dtype).removeprefix('torch.')}{' masked' if masked else ''}"
            mask = empty(4096, dtype=torch.bool) if masked else None
            x, offsets = empty(4096, dtype=dtype), torch.zeros(9, dtype=torch.int64)
            cases[label] = lambda x=x, offsets=offsets, mask=mask: kernels.segment_sum_count(x, offsets, mask)
    return cases


def prefix_attention() -> dict[str, Case]:
    def launch(dtype: torch.dtype, D: int, sink: Tensor | None, window: int | None, softcap: float | None) -> None:
        from rlcore.kernels import prefix_attention as forward
        from rlcore.kernels import prefix_attention_backward as backward

        q, do, o = (empty(256, 8, D, dtype=dtype) for _ in range(3))
        k, v = (empty(256, 2, D, dtype=dtype) for _ in range(2))
        end = position = torch.zeros(256, dtype=torch.int64)
        items, segments, splits = (torch.zeros(1, n, dtype=torch.int64) for n in (5, 2, 3))
        work, options = (items, segments), (0.1, window, softcap)
        _, lse = forward.prefix_attention_forward(
            q, k, v, end, position, *work, sink, *options, forward.forward_blocks(D, dtype)
        )
        rows = do, q, k, v, *backward.prefix_attention_delta(do, q, o, lse), end, position
        backward.prefix_attention_dq(*rows, *work, *options, backward.query_blocks(D, dtype))
        backward.prefix_attention_dkdv(*rows, *work, splits, 1, *options, backward.key_blocks(D, dtype))

    return {"bfloat16 head size 128": lambda: launch(torch.bfloat16, 128, None, None, None)}


FAMILIES = {"segments": segments(), "prefix_attention": prefix_attention()}
QUICK = {"segments": ["sum float32 masked"], "prefix_attention": ["bfloat16 head size 128"]}
