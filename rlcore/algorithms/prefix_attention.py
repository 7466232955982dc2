"""Attention over a packed prefix forest: the dense reference, and the exact composition over any flash attention.

Rows are packed depth first, so one integer per key is the whole mask (own):

    query i sees key j   iff   j <= i < end[j]   and, under a window,   depth[i] - depth[j] < window
    o_i = sum_j p_ij v_j,   p_ij = exp(z_ij - lse_i),   lse_i = log(exp(sink) + sum_j exp(z_ij))
    z_ij = s_ij, or softcap * tanh(s_ij / softcap);   s_ij = scale * (q_i . k_j)

Composition: an unbranched run [a, b) whose descendants end at e sees itself causally, and the rows [b, e) see all of
it. So the forest is one causal block per run plus one dense rectangle per run with descendants (a small subtree is one
masked block, which saves calls); each row's parts are merged by log-sum-exp. In the backward pass every part gets the
merged output and the global log-sum-exp: the part's probabilities are then the global ones and delta_i = do_i . o_i is
the global one, so the gradients simply add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms.prefix_attention_plan import Part, plan

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Older CPU flash attention takes fewer key heads than query heads without complaint and reads past their end.
_SHARES_KEY_HEADS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 11)
_BLOCK_ELEMENTS = 1 << 24


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    position: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Dense-mask attention in plain differentiable torch: q [M, Hq, D], k [M, Hkv, D], v [M, Hkv, Dv] -> [M, Hq, Dv].

    Query head h reads key head h // (Hq / Hkv). The softmax runs in float32 (float64 for float64) and holds M^2 Hq
    scores in memory.
    """
    M, Hq, _ = q.shape
    Hkv = k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(work).reshape(M, Hkv, Hq // Hkv, -1)
    z = torch.einsum("ihgd,jhd->hgij", grouped, k.to(work)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    rows = torch.arange(M, device=q.device)
    z = z.masked_fill(~visible(rows, rows, end, position, position, window), float("-inf"))
    if sink is not None:
        column = sink.to(work).reshape(Hkv, Hq // Hkv, 1, 1).expand(-1, -1, M, 1)
        p = torch.softmax(torch.cat([z, column], dim=-1), dim=-1)[..., :-1]
    else:
        p = torch.softmax(z, dim=-1)
    return torch.einsum("hgij,jhd->ihgd", p, v.to(work)).reshape(M, Hq, -1).to(q.dtype)


def visible(
    query: Tensor, key: Tensor, end: Tensor, query_depth: Tensor, key_depth: Tensor, window: int | None
) -> Tensor:
    """[queries, keys] bool: j <= i < end[j], and depth[i] - depth[j] < window. `end` is that of the keys."""
    query = query[:, None]
    mask = (key <= query) & (query < end)
    if window is not None:
        mask = mask & (query_depth[:, None] - key_depth < window)
    return mask


def blocks(x: Tensor, rows: Tensor, run: slice | None) -> Tensor:
    """x [M, H, D] -> [B, H, L, D] of the rows [B, L]: a view for one run, a copy otherwise."""
    taken = x[run][None] if run is not None else x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return taken.transpose(1, 2)


def _rows(x: Tensor, part: Part) -> Tensor:
    """[B, H, L, ...] -> [n, H, ...]: the real query rows of a part."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if part.kept is None else flat.index_select(0, part.kept)


def _flash_ready(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch's CPU flash attention reads the last dimension as contiguous, whatever its stride is."""
    q, k, v = _unit(q), _unit(k), _unit(v)
    if not _SHARES_KEY_HEADS and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return q, k, v


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def composed_forward(
    q: Tensor, k: Tensor, v: Tensor, node_table: Tensor, scale: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Composition over torch's CPU flash attention: (o [M, Hq, D], lse [M, Hq]), without autograd.

    Shapes as in `reference`, Dv = D. lse and the merge are float32 (float64 for float64); the sink enters once, after
    the merge.
    """
    q, k, v = _flash_ready(q, k, v)
    M, Hq, D = q.shape
    work = torch.promote_types(q.dtype, torch.float32)
    o = torch.empty(M, Hq, D, dtype=work)
    lse = torch.empty(M, Hq, dtype=work)
    for part in plan(node_table):
        part_o, part_lse = flash(
            blocks(q, part.queries, part.query_slice),
            blocks(k, part.keys, part.key_slice),
            blocks(v, part.keys, part.key_slice),
            0.0,
            part.own and part.mask is None,
            attn_mask=part.bias(q.dtype),
            scale=scale,
        )
        new_o, new_lse = _rows(part_o, part).to(work), _rows(part_lse, part)
        if not part.own:
            rows = part.rows
            new_o, new_lse = merge(o.index_select(0, rows), lse.index_select(0, rows), new_o, new_lse)
        o.index_copy_(0, part.rows, new_o)
        lse.index_copy_(0, part.rows, new_lse)
    o, lse = with_sink(o, lse, sink)
    return o.to(q.dtype), lse


def with_sink(o: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """A merged softmax and its sink; o is changed in place."""
    if sink is None:
        return o, lse
    both = torch.logaddexp(lse, sink.to(lse.dtype))
    return o.mul_(torch.exp(lse - both).unsqueeze(-1)), both


def merge(o: Tensor, lse: Tensor, new_o: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over disjoint keys as one. Both log-sum-exps are finite: every part holds a visible key."""
    merged = torch.logaddexp(lse, new_lse)
    o = o * torch.exp(lse - merged).unsqueeze(-1) + new_o * torch.exp(new_lse - merged).unsqueeze(-1)
    return o, merged


def composed_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    node_table: Tensor,
    scale: float,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsink) of the composition; parts accumulate in float32 (float64 for float64)."""
    heads = k.shape[1]
    do, (q, k, v) = _unit(do), _flash_ready(q, k, v)
    work = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=work) for x in (q, k, v))
    for part in plan(node_table):
        part_do = blocks(do, part.queries, part.query_slice)
        if part.padding is not None:
            part_do = part_do.masked_fill(part.padding, 0)
        grads = flash_backward(
            part_do,
            blocks(q, part.queries, part.query_slice),
            blocks(k, part.keys, part.key_slice),
            blocks(v, part.keys, part.key_slice),
            blocks(o, part.queries, part.query_slice),
            blocks(lse.unsqueeze(-1), part.queries, part.query_slice).squeeze(-1),
            0.0,
            part.own and part.mask is None,
            attn_mask=part.bias(q.dtype),
            scale=scale,
        )
        _accumulate(dq, part.queries, part.query_slice, grads[0], part.kept)
        kept_keys = part.kept if part.own else None
        _accumulate(dk, part.keys, part.key_slice, grads[1], kept_keys)
        _accumulate(dv, part.keys, part.key_slice, grads[2], kept_keys)
    if heads != k.shape[1]:
        dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), sink_gradient(do, o, lse, sink)


def _accumulate(total: Tensor, rows: Tensor, run: slice | None, grad: Tensor, kept: Tensor | None) -> None:
    """total[rows] += grad [B, H, L, D]; the real rows of a part are distinct, so no row is written twice."""
    grad = grad.transpose(1, 2).flatten(0, 1)
    if run is not None:
        total[run] += grad
        return
    index = rows.flatten()
    if kept is not None:
        index, grad = index.index_select(0, kept), grad.index_select(0, kept)
    total.index_copy_(0, index, total.index_select(0, index) + grad)


def sink_gradient(do: Tensor, o: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor | None:
    """The sink is a key with value 0: d sink = - sum_i p_sink_i (do_i . o_i)."""
    if sink is None:
        return None
    return sink_gradient_of_delta((do.to(lse.dtype) * o.to(lse.dtype)).sum(-1), lse, sink)


def sink_gradient_of_delta(delta: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """`sink_gradient` where delta [M, Hq] = do . o is known."""
    return -(torch.exp(sink.to(lse.dtype) - lse) * delta).sum(0).to(sink.dtype)


def _query_blocks(node_table: Tensor, Hq: int) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) row ranges: bounded blocks of one tree's rows, and that tree's rows up to the block's end."""
    for start, _, end, parent in node_table.tolist():
        if parent >= 0:
            continue
        size = max(1, _BLOCK_ELEMENTS // (Hq * (end - start)))
        for first in range(start, end, size):
            last = min(first + size, end)
            yield slice(first, last), slice(start, last)


class _Scores(NamedTuple):
    z: Tensor
    """[Hkv, G, queries, keys] after the softcap, -inf where not visible"""
    slope: Tensor | None
    """d z / d s of the softcap"""


def _scores(
    q: Tensor,
    k: Tensor,
    end: Tensor,
    position: Tensor,
    queries: slice,
    keys: slice,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> _Scores:
    s = torch.einsum("ihgd,jhd->hgij", q, k) * scale
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    rows = torch.arange(keys.start, keys.stop, device=q.device)
    seen = visible(rows[queries.start - keys.start :], rows, end[keys], position[queries], position[keys], window)
    return _Scores(s.masked_fill(~seen, float("-inf")), slope)


def blocked_forward(
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
    """The dense rule in bounded blocks of queries: (o [M, Hq, D], lse [M, Hq]), any device, no autograd."""
    M, Hq, D = q.shape
    Hkv = k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    o = torch.empty(M, Hq, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(M, Hq, dtype=work, device=q.device)
    for queries, keys in _query_blocks(node_table, Hq):
        grouped = q[queries].to(work).unflatten(1, (Hkv, -1))
        z, _ = _scores(grouped, k[keys].to(work), end, position, queries, keys, scale, window, softcap)
        block_lse = torch.logsumexp(z, dim=-1)
        if sink is not None:
            block_lse = torch.logaddexp(block_lse, sink.to(work).view(Hkv, -1, 1))
        p = torch.exp(z - block_lse.unsqueeze(-1))
        o[queries] = torch.einsum("hgij,jhd->ihgd", p, v[keys].to(work)).flatten(1, 2).to(q.dtype)
        lse[queries] = block_lse.flatten(0, 1).T
    return o, lse


def blocked_backward(
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
    """(dq, dk, dv, dsink) of `blocked_forward`, recomputing the probabilities block by block."""
    Hq, Hkv = q.shape[1], k.shape[1]
    work = lse.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=q.device) for x in (q, k, v))
    for queries, keys in _query_blocks(node_table, Hq):
        grouped, block_k, block_v = (x.to(work) for x in (q[queries].unflatten(1, (Hkv, -1)), k[keys], v[keys]))
        block_do = do[queries].to(work).unflatten(1, (Hkv, -1))
        z, slope = _scores(grouped, block_k, end, position, queries, keys, scale, window, softcap)
        p = torch.exp(z - lse[queries].T.unflatten(0, (Hkv, -1)).unsqueeze(-1))
        delta = (block_do * o[queries].to(work).unflatten(1, (Hkv, -1))).sum(-1).permute(1, 2, 0)
        dz = p * (torch.einsum("ihgd,jhd->hgij", block_do, block_v) - delta.unsqueeze(-1))
        ds = (dz if slope is None else dz * slope) * scale
        dq[queries] = torch.einsum("hgij,jhd->ihgd", ds, block_k).flatten(1, 2)
        dk[keys] += torch.einsum("hgij,ihgd->jhd", ds, grouped)
        dv[keys] += torch.einsum("hgij,ihgd->jhd", p, block_do)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), sink_gradient(do, o, lse, sink)
