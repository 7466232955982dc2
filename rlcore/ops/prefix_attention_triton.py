"""prefix_attention in Triton: the tiles of a tree, kept on its device, and the launches.

float32, bfloat16 and float16; float64 takes the dense blocks of `algorithms.prefix_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlcore.algorithms import prefix_attention_tiles as tiles
from rlcore.algorithms.prefix_attention import sink_gradient_of_delta
from rlcore.algorithms.prefix_attention_tables import kept, moved
from rlcore.ops import backend


class _Tables(NamedTuple):
    """A `tiles.Work` on the device."""

    items: Tensor
    segments: Tensor
    splits: Tensor
    slots: int


def runs(q: Tensor, requested: str) -> bool:
    """Whether Triton takes these queries, keys and values."""
    return backend.runs_triton(q, requested) and q.dtype in (torch.float32, torch.bfloat16, torch.float16)


@backend.on_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    position: Tensor,
    node_table: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(o [M, Hq, D] in q's dtype, lse [M, Hq] float32); shapes as in `algorithms.prefix_attention.blocked_forward`."""
    from rlcore.kernels import prefix_attention as kernels

    q, k, v = _unit(q), _unit(k), _unit(v)
    end, position = end.contiguous(), position.contiguous()
    blocks = kernels.forward_blocks(q.shape[2], q.dtype)
    group = q.shape[1] // k.shape[1]
    work = kept(_query_tables, node_table, q.device, group, blocks.lanes, blocks.keys, window)
    return kernels.prefix_attention_forward(
        q, k, v, end, position, work.items, work.segments, sink, scale, window, softcap, blocks
    )


@backend.on_device
def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    end: Tensor,
    position: Tensor,
    node_table: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsink) in the dtypes of q, k, v and the sink."""
    from rlcore.kernels import prefix_attention_backward as kernels
    from rlcore.kernels import prefix_attention_keys as keys

    do, q, k, v, o, lse = _unit(do), _unit(q), _unit(k), _unit(v), _unit(o), lse.contiguous()
    end, position = end.contiguous(), position.contiguous()
    D, heads = q.shape[2], k.shape[1]
    group = q.shape[1] // heads
    delta, lse2 = kernels.prefix_attention_delta(do, q, o, lse)
    rows = do, q, k, v, delta, lse2, end, position
    blocks = kernels.query_blocks(D, q.dtype)
    work = kept(_query_tables, node_table, q.device, group, blocks.lanes, blocks.keys, window)
    dq = kernels.prefix_attention_dq(*rows, work.items, work.segments, scale, window, softcap, blocks)
    blocks = keys.key_blocks(D, q.dtype)
    work = kept(_key_tables, node_table, q.device, group, blocks.lanes, blocks.keys, window, heads)
    dk, dv = keys.prefix_attention_dkdv(*rows, *work, scale, window, softcap, blocks)
    return dq, dk, dv, None if sink is None else sink_gradient_of_delta(delta, lse, sink)


def _query_tables(
    nodes: np.ndarray, device: torch.device, group: int, lanes: int, keys: int, window: int | None
) -> _Tables:
    return _moved(tiles.query_work(nodes, group, lanes, keys, window), device)


def _key_tables(
    nodes: np.ndarray, device: torch.device, group: int, lanes: int, keys: int, window: int | None, heads: int
) -> _Tables:
    return _moved(tiles.key_work(nodes, group, lanes, keys, window, heads), device)


def _moved(work: tiles.Work, device: torch.device) -> _Tables:
    items, segments, splits = (moved(x, device) for x in (work.items, work.segments, work.splits))
    return _Tables(items, segments, splits, work.slots)


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
