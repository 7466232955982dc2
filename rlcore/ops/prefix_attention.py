"""prefix_attention: exact attention over a packed prefix forest, every shared token once, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlcore.algorithms import prefix_attention as algorithm
from rlcore.algorithms import prefix_attention_varlen as varlen
from rlcore.ops import backend
from rlcore.ops import prefix_attention_native as native
from rlcore.ops import prefix_attention_triton as triton
from rlcore.prefix_tree import PrefixTree


@torch.library.custom_op("rlcore::prefix_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    position: Tensor,
    node_table: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    requested: str,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The raw forward pass. `requested` is the backend, "" for the fastest; the backward pass is told the same."""
    if triton.runs(q, requested):
        return triton.forward(q, k, v, end, position, node_table, scale, window, softcap, sink)
    if native.runs(q, requested):
        return native.forward(q, k, v, node_table, scale, window, softcap, sink, rows)
    if _composes_on_gpu(q, window, softcap):
        return backend.on_device(varlen.forward)(q, k, v, node_table, scale, sink)
    if _composes(q, window, softcap):
        return algorithm.composed_forward(q, k, v, node_table, scale, sink)
    return algorithm.blocked_forward(q, k, v, end, position, node_table, scale, window, softcap, sink)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    position: Tensor,
    node_table: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    requested: str,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("rlcore::prefix_attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    end: Tensor,
    position: Tensor,
    node_table: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    requested: str,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if triton.runs(q, requested):
        dq, dk, dv, dsink = triton.backward(
            do, q, k, v, o, lse, end, position, node_table, scale, window, softcap, sink
        )
    elif native.runs(q, requested):
        dq, dk, dv, dsink = native.backward(do, q, k, v, o, lse, node_table, scale, window, softcap, sink, rows)
    elif _composes_on_gpu(q, window, softcap):
        dq, dk, dv, dsink = backend.on_device(varlen.backward)(do, q, k, v, o, lse, node_table, scale, sink)
    elif _composes(q, window, softcap):
        dq, dk, dv, dsink = algorithm.composed_backward(do, q, k, v, o, lse, node_table, scale, sink)
    else:
        dq, dk, dv, dsink = algorithm.blocked_backward(
            do, q, k, v, o, lse, end, position, node_table, scale, window, softcap, sink
        )
    return dq, dk, dv, q.new_empty(0) if dsink is None else dsink


@_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    end: Tensor,
    position: Tensor,
    node_table: Tensor,
    sink: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    requested: str,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink = q.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _composes(q: Tensor, window: int | None, softcap: float | None) -> bool:
    return q.device.type == "cpu" and window is None and softcap is None


def _composes_on_gpu(q: Tensor, window: int | None, softcap: float | None) -> bool:
    """What flash attention takes: NVIDIA from sm_80 on, 16-bit numbers, head sizes up to 256."""
    return (
        q.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] <= 256
        and window is None
        and softcap is None
    )


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        end: Tensor,
        position: Tensor,
        node_table: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        requested: str,
        rows: Tensor | None,
    ) -> Tensor:
        o, lse = _forward(q, k, v, end, position, node_table, sink, scale, window, softcap, requested, rows)
        ctx.save_for_backward(q, k, v, o, lse, end, position, node_table, sink, rows)
        ctx.options = scale, window, softcap, requested
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        q, k, v, o, lse, end, position, node_table, sink, rows = ctx.saved_tensors
        arguments = do, q, k, v, o, lse, end, position, node_table, sink, *ctx.options, rows
        # Where a graph of the backward pass is asked for, its end has to say that there is no second derivative.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dq, dk, dv, dsink = _Once.apply(*arguments) if twice else _backward(*arguments)
        return dq, dk, dv, None if sink is None else dsink, *[None] * 8


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            'prefix_attention can be differentiated once; use `with rlcore.backend("reference")` for second derivatives'
        )


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Attention of a packed prefix forest: row i attends to row j iff j <= i < tree.end[j] (own).

    o_i = sum_j exp(z_ij - lse_i) v_j,  z_ij = scale * q_i . k_j (softcap c: c tanh(. / c)),  under a window only the
    keys with depth[i] - depth[j] < window;  lse_i includes exp(sink_h) where a sink is given.

    q [M, Hq, D], k [M, Hkv, D], v [M, Hkv, Dv], Hkv divides Hq; sink [Hq]; returns [M, Hq, Dv] in q's dtype. float32,
    float64, bfloat16 and float16, any strides; under autocast the inputs are cast as scaled_dot_product_attention does.
    scale defaults to D ** -0.5. On a GPU it runs in Triton, on a CPU in C++; where that is not there or does not take
    the dtype, composed of flash attention calls if there is no window and no softcap (on a GPU in 16 bits); otherwise
    dense in bounded blocks.
    rows [n]: the rows whose results are read, int64; None for all. The others have no meaning, and their gradient
    must be zero. In C++ tiles of queries without such a row are left out.
    `backend("reference")` runs the dense reference, which can be differentiated twice.
    Raises ValueError or TypeError naming the argument.
    """
    _check_types(q, k, v, tree, scale, window, softcap, sink)
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, tree, window, softcap, sink)
    if rows is not None:
        _check_rows(rows, tree)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend.requested() == "reference":
        return algorithm.reference(q, k, v, tree.end, tree.position, scale, window, softcap, sink)
    width, D = v.shape[-1], q.shape[-1]
    # Flash attention has one head size: the narrower side is padded with zeros, which change no score and no output.
    if width < D:
        v = F.pad(v, (0, D - width))
    elif width > D:
        q, k = F.pad(q, (0, width - D)), F.pad(k, (0, width - D))
    options = scale, window, softcap, backend.requested() or ""
    o = _PrefixAttention.apply(q, k, v, sink, tree.end, tree.position, tree.node_table, *options, rows)
    return o[..., :width] if width < D else o


def _check_types(q: Any, k: Any, v: Any, tree: Any, scale: Any, window: Any, softcap: Any, sink: Any) -> None:
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree: expected a PrefixTree, got {type(tree).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v), ("sink", sink)):
        if not isinstance(x, Tensor) and (x is not None or name != "sink"):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"window: expected an int or None, got {window!r}")
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise TypeError(f"{name}: expected a number or None, got {number!r}")
        if number is not None and not -math.inf < number < math.inf:
            raise ValueError(f"{name}: expected a finite number, got {number!r}")


def _check(
    q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, window: int | None, softcap: float | None, sink: Tensor | None
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name}: expected [rows, heads, head size], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q ({q.dtype}), got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q ({q.device}), got {x.device}")
        if x.shape[0] != tree.end.shape[0]:
            raise ValueError(f"{name}: expected the tree's {tree.end.shape[0]} rows, got {x.shape[0]}")
    if tree.end.device != q.device:
        raise ValueError(f"tree: expected the device of q ({q.device}), got {tree.end.device}; use tree.to(device)")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"v: expected the {k.shape[1]} heads of k, got {v.shape[1]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected the head size of q ({q.shape[2]}), got {k.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {q.shape[1]} of q, got {k.shape[1]}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {softcap}")
    if q.shape[2] == 0 or v.shape[2] == 0:
        raise ValueError(f"q: expected a head size of at least 1, got {tuple(q.shape)} and v {tuple(v.shape)}")
    if sink is not None and not sink.is_floating_point():
        raise TypeError(f"sink: expected a floating point tensor, got {sink.dtype}")
    if sink is not None and sink.device != q.device:
        raise ValueError(f"sink: expected the device of q ({q.device}), got {sink.device}")
    if sink is not None and sink.shape != (q.shape[1],):
        raise ValueError(f"sink: expected one value per query head [{q.shape[1]}], got shape {tuple(sink.shape)}")


def _check_rows(rows: Any, tree: PrefixTree) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows: expected a torch.Tensor, got {type(rows).__name__}")
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise TypeError(f"rows: expected one dimension of int64, got {rows.ndim} of {rows.dtype}")
    if rows.device != tree.end.device:
        raise ValueError(f"rows: expected the tree's device ({tree.end.device}), got {rows.device}")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and rows.numel():
        low, high = rows.aminmax()
        if low < 0 or high >= tree.M:
            raise ValueError(f"rows: expected 0 to {tree.M - 1}, got {int(low)} to {int(high)}")
