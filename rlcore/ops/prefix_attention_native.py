"""prefix_attention in C++ on the CPU: one pass over the paths, without a plan, padding, gathers of blocks or merges.

float32 throughout; bfloat16 and float16 are widened first, which on a CPU is faster than flash attention in them.
float64 and machines without the extension take the composition and the blocks of `algorithms.prefix_attention`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlcore.algorithms.prefix_attention import sink_gradient
from rlcore.ops import backend

# A (tree, key head) belongs to one thread in the backward pass. With few of them its queries are dealt out to several,
# each with its own sums of dk and dv: two sums instead of one cost 5 % at 2 threads, four 13 %. The number must not
# depend on the threads, or the result would.
_TASKS = 8

View = tuple[int, int, int]


def runs(q: Tensor, requested: str) -> bool:
    """Whether the C++ code takes these queries, keys and values."""
    return (
        requested in ("", "native")
        and backend.native() is not None
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    node_table: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Tensor | None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [M, Hq, D] in q's dtype, lse [M, Hq] float32); shapes as in `algorithms.prefix_attention.blocked_forward`.

    rows [n]: those that are read. Where a tile of queries holds none of them, o is 0, and dq below; lse is inf, so
    that a sink gets no gradient from there.
    """
    module = backend.native()
    assert module is not None
    dtype = q.dtype
    q, k, v = _wide(q), _wide(k), _wide(v)
    s = None if sink is None else sink.float().contiguous()
    read = _mask(rows, q)
    if read is None:
        o, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    else:
        o, lse = torch.zeros(q.shape), torch.full(q.shape[:2], math.inf)
    table = node_table.contiguous()
    module.prefix_attention_forward(
        *_problem(table, q, k, v), scale, window or 0, softcap or 0.0, _address(s), _address(read),
        o.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return o.to(dtype), lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    node_table: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Tensor | None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsink) in the dtypes of q, k, v and the sink."""
    module = backend.native()
    assert module is not None
    dtype = q.dtype
    do, q, k, v, o, lse = _wide(do), _wide(q), _wide(k), _wide(v), _wide(o), lse.contiguous()
    table = node_table.contiguous()
    trees = int((table[:, 3] < 0).sum())
    slices = -(-_TASKS // (trees * k.shape[1]))
    read = _mask(rows, q)
    dq = (torch.empty if read is None else torch.zeros)(q.shape)
    dk, dv = torch.zeros(slices, *k.shape), torch.zeros(slices, *v.shape)
    module.prefix_attention_backward(
        *_problem(table, q, k, v), scale, window or 0, softcap or 0.0, _address(read), _view(do), _view(o),
        lse.data_ptr(), slices, dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    dk, dv = (x.sum(0) if slices > 1 else x[0] for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), sink_gradient(do, o, lse, sink)


def _wide(x: Tensor) -> Tensor:
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _problem(table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, View, View, View, int, int, int]:
    """The tensors as both passes of the extension want them; the caller keeps them alive."""
    M, Hq, D = q.shape
    return table.data_ptr(), table.shape[0], M, _view(q), _view(k), _view(v), Hq, k.shape[1], D


def _mask(rows: Tensor | None, q: Tensor) -> Tensor | None:
    """1 where a row is read; None where all are."""
    return None if rows is None else torch.zeros(q.shape[0], dtype=torch.uint8).index_fill_(0, rows, 1)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _view(x: Tensor) -> View:
    return x.data_ptr(), x.stride(0), x.stride(1)
