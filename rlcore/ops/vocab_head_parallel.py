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

from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_shards as merging
from rlcore.algorithms import vocab_head_tiles as tiles
from rlcore.algorithms.vocab_head import LogProbs
from rlcore.algorithms.vocab_head_inputs import (
    Number,
    autocast_dtype,
    cast,
    flat_head,
)
from rlcore.algorithms.vocab_head_passes import Coefficients, Further, RowStatistics, Scale
from rlcore.ops import backend
from rlcore.ops.vocab_head import shaped
from rlcore.ops.vocab_head_autograd import as_given, constants, refuse_double_backward
from rlcore.ops.vocab_head_passes import row_passes
from rlcore.ops.vocab_head_raw import empty_further, head_statistics, no_autocast


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
    statistics: bool = False,
) -> LogProbs:
    """`linear_logprob` where `weight` [v, H] and `bias` [v] are this rank's entries [first, first + v) of all.

    hidden, target (labels of the whole vocabulary), mask, the numbers and the incoming gradients are the same on every
    rank of `group` (None: the default group); so are the results and d hidden. Shards may differ in size; they follow
    one another in the order of the ranks. A collective call: every rank makes it, forward and backward. Backward is
    6NHV / ranks by recompute. `statistics` gathers 12 bytes more. Raises as `linear_logprob`; a label outside the
    vocabulary gives NaN. Inside `rl.batch_invariant()` a row has the same bits in any batch of these shards. Own.
    """
    head = flat_head(hidden, weight, target, bias, mask, temperature, softcap, logit_scale, chunk_bytes)
    if first < 0:
        raise ValueError(f"first: expected at least 0; got {first}")
    invariant, requested = backend.is_batch_invariant(hidden), backend.requested() or ""
    found = VocabParallelLogprob.apply(
        *head, first, autocast_dtype(hidden), chunk_bytes, group, statistics, invariant, requested
    )  # fmt: skip
    return shaped(found, target, entropy)


class VocabParallelLogprob(Function):
    """What `LinearLogprob` has, over all shards; gradients by recompute."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mask: Tensor | None,
        temperature: Tensor, softcap: Tensor | None, logit_scale: Tensor, first: int, dtype: torch.dtype | None,
        chunk_bytes: int | None, group: dist.ProcessGroup | None, statistics: bool, batch_invariant: bool,
        requested: str,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.first, ctx.chunk_bytes, ctx.group, ctx.requested = first, chunk_bytes, group, requested
        hidden, weight = cast(hidden, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
        own_further, further = empty_further(logit_scale, hidden.shape[0], statistics)
        target = target.long()
        own = head_statistics(
            hidden, weight, target - first, mask, Scale(temperature, softcap, logit_scale, bias), entropy=True,
            further=further, chunk_bytes=chunk_bytes, batch_invariant=batch_invariant, requested=requested,
            sharded=True,
        )  # fmt: skip
        stats, further = merged(own, further, target, first, weight.shape[0], group)
        if mask is not None:
            stats = stats.where(mask)
            if further is not None:
                reference.clear(further, mask)
        ctx.save_for_backward(hidden, weight, bias, target, mask, temperature, softcap, logit_scale, *stats)
        ctx.set_materialize_grads(False)
        more = own_further if further is None else further
        return stats.logp, stats.entropy, *constants(ctx, stats.log_sum, stats.entropy, more, True, statistics)

    @staticmethod
    def backward(
        ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        nothing = (None,) * 12
        if d_logp is None and d_entropy is None:
            return (None, None, None, *nothing)
        hidden, weight, bias, target, mask, temperature, softcap, logit_scale, *stats = ctx.saved_tensors
        d_logp = torch.zeros_like(stats[2]) if d_logp is None else d_logp
        needs = ctx.needs_input_grad[:3]
        with no_autocast(hidden):
            d_hidden, d_weight, d_bias = tiles.backward(
                hidden, weight, target - ctx.first, mask, Scale(temperature, softcap, logit_scale, bias),
                RowStatistics(*stats), Coefficients(d_logp, d_entropy), needs,
                passes=row_passes(hidden, ctx.requested), chunk_bytes=ctx.chunk_bytes,
            )  # fmt: skip
        if needs[0]:
            dist.all_reduce(d_hidden, group=ctx.group)
        return (*as_given(d_hidden, d_weight, d_bias, needs, ctx.dtypes), *nothing)


def merged(
    own: RowStatistics, further: Further | None, target: Tensor, first: int, size: int, group: dist.ProcessGroup | None
) -> tuple[RowStatistics, Further | None]:
    """The statistics of all ranks' shards as one; each rank says where its shard lies."""
    shards = RowStatistics(*gathered(torch.stack(own), group).unbind(1))
    place = torch.arange(first, first + size + 1, size, device=target.device)  # both ends, without a copy from the host
    places = gathered(place, group)
    stats = merging.merge_shards(shards, target, places[:, 0], places[:, 1])
    if further is None:
        return stats, None
    shards_further = Further(*(gathered(x, group) for x in further))
    return stats, merging.merge_further(shards_further, shards, stats, places[:, 0])


def gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x of every rank, [ranks, ...]."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(out.unbind()), x, group=group)
    return out
