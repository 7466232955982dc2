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


FAMILIES = {"segments": segments()}
QUICK = {"segments": ["sum float32 masked"]}
