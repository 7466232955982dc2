"""The vocabulary head where each process holds a shard of the vocabulary: tensor parallelism for the lm_head.

Forward: every rank takes the statistics of its shard, 2NHV / ranks FLOPs, and they are gathered, 16 bytes per row and
rank, and merged in the order of the ranks: all get the same bits. Backward: every rank makes d weight and d bias of its
shard from the merged statistics, and its part of d hidden; one sum over the ranks, [N, H] in float32, makes it whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from rlcore.algorithms import vocab_head_chunks as chunks
from rlcore.algorithms import vocab_head_tiles as tiles
from rlcore.algorithms.vocab_head import LogProbs
from rlcore.algorithms.vocab_head_chunks import Coefficients, RowStatistics, Scale
from rlcore.algorithms.vocab_head_inputs import (
    Number,
    autocast_dtype,
    cast,
    check_chunk_bytes,
    check_head,
    scale_of,
)
from rlcore.ops.vocab_head_autograd import as_given, refuse_double_backward
from rlcore.ops.vocab_head_passes import row_passes
from rlcore.ops.vocab_head_raw import no_autocast


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    first: int,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    entropy: bool = False,
    mask: Tensor | None = None,
    chunk_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> LogProbs:
    """`linear_logprob` where `weight` [v, H] and `bias` [v] are this rank's entries [first, first + v) of all.

    hidden, target (labels of the whole vocabulary), mask, the numbers and the incoming gradients are the same on every
    rank of `group` (None: the default group); so are the results and d hidden. Shards may differ in size; they follow
    one another in the order of the ranks. A collective call: every rank makes it, forward and backward. Backward is
    6NHV / ranks by recompute. Raises as `linear_logprob`; a label outside the vocabulary gives NaN. Own.
    """
    check_head(hidden, weight, target, bias, mask, temperature, softcap, logit_scale)
    check_chunk_bytes(chunk_bytes)
    if first < 0:
        raise ValueError(f"first: expected at least 0; got {first}")
    scale = scale_of(hidden, temperature, softcap, logit_scale)
    keep = None if mask is None else (mask != 0).reshape(-1)
    logp, H = VocabParallelLogprob.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, target.reshape(-1).long(), keep, *scale[:3], first,
        autocast_dtype(hidden), chunk_bytes, group,
    )  # fmt: skip
    return LogProbs(logp.reshape(target.shape), H.reshape(target.shape) if entropy else None)


class VocabParallelLogprob(Function):
    """logp and entropy [N] over all shards, gradients by recompute."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None,
        temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor, first: int, dtype: torch.dtype | None,
        chunk_bytes: int | None, group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.first, ctx.chunk_bytes, ctx.group = first, chunk_bytes, group
        hidden, weight = cast(hidden, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
        with no_autocast(hidden):
            own, _ = chunks.forward_chunks(
                hidden, weight, target - first, mask, Scale(temperature, softcap, logit_scale, bias), entropy=True,
                passes=row_passes(hidden), chunk_bytes=chunk_bytes, sharded=True,
            )  # fmt: skip
        stats = merged(own, target, first, weight.shape[0], group)
        if mask is not None:
            stats = RowStatistics(*(torch.where(mask, x, 0) for x in stats))
        ctx.save_for_backward(hidden, weight, bias, target, mask, temperature, softcap, logit_scale, *stats)
        ctx.set_materialize_grads(False)
        return stats.logp, stats.entropy

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        nothing = (None,) * 9
        if d_logp is None and d_entropy is None:
            return (None, None, None, *nothing)
        hidden, weight, bias, target, mask, temperature, softcap, logit_scale, *stats = ctx.saved_tensors
        d_logp = torch.zeros_like(stats[2]) if d_logp is None else d_logp
        needs = ctx.needs_input_grad[:3]
        with no_autocast(hidden):
            d_hidden, d_weight, d_bias = tiles.backward(
                hidden, weight, target - ctx.first, mask, Scale(temperature, softcap, logit_scale, bias),
                RowStatistics(*stats), Coefficients(d_logp, d_entropy), needs, passes=row_passes(hidden),
                chunk_bytes=ctx.chunk_bytes,
            )  # fmt: skip
        d_hidden = d_hidden.to(logit_scale.dtype)
        if needs[0]:
            dist.all_reduce(d_hidden, group=ctx.group)
        return (*as_given(d_hidden, d_weight, d_bias, needs, ctx.dtypes), *nothing)


def merged(own: RowStatistics, target: Tensor, first: int, size: int, group: dist.ProcessGroup | None) -> RowStatistics:
    """The statistics of all ranks' shards as one; each rank says where its shard lies."""
    ranks = dist.get_world_size(group)
    fields = torch.stack(own)
    shards = fields.new_empty((ranks, *fields.shape))
    dist.all_gather(list(shards.unbind()), fields, group=group)
    place = torch.arange(first, first + size + 1, size, device=target.device)  # both ends, without a copy from the host
    places = place.new_empty((ranks, 2))
    dist.all_gather(list(places.unbind()), place, group=group)
    return chunks.merge_shards(RowStatistics(*shards.unbind(1)), target, places[:, 0], places[:, 1])
