"""Composition of a packed prefix forest on a GPU over variable-length flash attention, forward and backward.

The calls are those of the package flash-attn where it is installed, else of the one that torch brings along.

All unbranched runs are one causal call, since they lie one behind the other. What the rows below a run see of it is a
rectangle; those of one level of the tree share neither rows nor keys, so a level is one call: its queries and keys are
gathered (each key once, whatever the number of branches), the result is merged by log-sum-exp. Backward as in
prefix_attention.py: every part gets the merged output and the global log-sum-exp.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlcore.algorithms.prefix_attention import merge, sink_gradient, with_sink
from rlcore.algorithms.prefix_attention_tables import kept, moved


class Part(NamedTuple):
    """Sequences of one call: queries and keys are packed rows, the rest is as flash attention takes it."""

    causal: bool
    queries: Tensor
    keys: Tensor
    q_offsets: Tensor
    k_offsets: Tensor
    q_longest: int
    k_longest: int


@lru_cache(maxsize=1)
def package() -> ModuleType | None:
    """flash-attn, from 2.7 on; None where it is not installed, or built for another torch."""
    try:
        module = importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError:
        return None
    # Older ones have functions of the same names with other parameters, and no ops of torch's around them.
    return module if hasattr(module, "_wrapped_flash_attn_varlen_backward") else None


def attend(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """(o [n, Hq, D], lse [n, Hq]) of the sequences of a part."""
    sequences = part.q_offsets, part.k_offsets, part.q_longest, part.k_longest
    if (flash := package()) is not None:
        o, lse, *_ = flash._flash_attn_varlen_forward(q, k, v, *sequences, 0.0, scale, part.causal)
    else:
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *sequences, 0.0, part.causal, False, scale=scale
        )  # fmt: skip
    return o, lse.T


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    given = do, q, k, v, o, lse.T.contiguous()
    sequences = part.q_offsets, part.k_offsets, part.q_longest, part.k_longest
    if (flash := package()) is not None:
        gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        no_window, no_softcap, no_slopes, deterministic = (-1, -1), 0.0, None, True
        flash._flash_attn_varlen_backward(
            *given, *gradients, *sequences, 0.0, scale, part.causal, *no_window, no_softcap, no_slopes, deterministic
        )
        return gradients
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout that there is not
    return torch.ops.aten._flash_attention_backward(
        *given, *sequences, 0.0, part.causal, random_state, q.new_empty(0), scale=scale
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, node_table: Tensor, scale: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(o [M, Hq, D], lse [M, Hq] float32), without autograd; shapes as in `prefix_attention.reference`, Dv = D."""
    D = q.shape[-1]
    q, k, v = _padded(q), _padded(k), _padded(v)
    own, *levels = plan(node_table, q.device)
    o, lse = attend(q, k, v, own, scale)
    o, lse = o.float(), lse.contiguous()
    for part in levels:
        rows, keys = part.queries, part.keys
        new_o, new_lse = attend(q[rows], k[keys], v[keys], part, scale)
        new_o, new_lse = merge(o[rows], lse[rows], new_o.float(), new_lse)
        o.index_copy_(0, rows, new_o)
        lse.index_copy_(0, rows, new_lse)
    o, lse = with_sink(o, lse, sink)
    return o[..., :D].to(q.dtype).contiguous(), lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, node_table: Tensor, scale: float,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dsink); parts accumulate in float32."""
    D = q.shape[-1]
    dsink = sink_gradient(do, o, lse, sink)
    do, q, k, v, o = _padded(do), _padded(q), _padded(k), _padded(v), _padded(o)
    own, *levels = plan(node_table, q.device)
    dq, dk, dv = (x.float() for x in attend_backward(do, q, k, v, o, lse, own, scale))
    for part in levels:
        rows, keys = part.queries, part.keys
        grads = attend_backward(do[rows], q[rows], k[keys], v[keys], o[rows], lse[rows], part, scale)
        # Rows and keys of a part are distinct, so nothing is added twice at one place.
        for total, index, grad in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
            total.index_copy_(0, index, total[index] + grad)
    dq, dk, dv = (x[..., :D].to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, dsink


def _padded(x: Tensor) -> Tensor:
    """Flash attention takes head sizes that are multiples of 8; zeros change nothing."""
    x = F.pad(x, (0, -x.shape[-1] % 8))
    return x if x.stride(-1) == 1 else x.contiguous()


def plan(node_table: Tensor, device: torch.device) -> tuple[Part, ...]:
    """The runs, then the rectangles of each level that has some, from the host-side node table [K, 4]."""
    return kept(_plan, node_table, device)


def _plan(nodes: np.ndarray, device: torch.device) -> tuple[Part, ...]:
    nodes_level: list[int] = []
    for parent in nodes[:, 3].tolist():
        nodes_level.append(nodes_level[parent] + 1 if parent >= 0 else 0)
    level = np.asarray(nodes_level)
    start, stop, end, _ = nodes.T
    runs = stop > start
    parts = [_part(True, start[runs], stop[runs], start[runs], stop[runs], device)]
    for n in range(int(level.max()) + 1):
        here = (level == n) & runs & (end > stop)
        if here.any():
            parts.append(_part(False, stop[here], end[here], start[here], stop[here], device))
    return tuple(parts)


def _part(
    causal: bool, q_start: np.ndarray, q_stop: np.ndarray, k_start: np.ndarray, k_stop: np.ndarray, device: torch.device
) -> Part:
    def rows(first: np.ndarray, last: np.ndarray) -> Tensor:
        return moved(np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)]), device)

    def offsets(lengths: np.ndarray) -> Tensor:
        return moved(np.r_[0, np.cumsum(lengths)].astype(np.int32), device)

    q_lengths, k_lengths = q_stop - q_start, k_stop - k_start
    return Part(
        causal, rows(q_start, q_stop), rows(k_start, k_stop), offsets(q_lengths), offsets(k_lengths),
        int(q_lengths.max()), int(k_lengths.max()),
    )  # fmt: skip
