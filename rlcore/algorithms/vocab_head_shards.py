"""Statistics over the whole vocabulary from those of its shards, merged in their order."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rlcore.algorithms.vocab_head_passes import LOG_ZERO, Further, RowStatistics


def merge_shards(shards: RowStatistics, target: Tensor, first: Tensor, last: Tensor) -> RowStatistics:
    """Statistics over the whole vocabulary from those of its shards, each field [shards, n], merged in their order.

    Shard s holds the entries [first[s], last[s]); target [n] counts through all of them. With M the highest maximum
    and S = sum_s exp(m_s - M + log_sum_s):

        logp = (z_y - m_s) + (m_s - M) - log S        H = log S - sum_s exp(m_s - M + log_sum_s) / S * mean_s(z - M)
    """
    # A shard of forbidden entries alone (padding) has no statistics: its part of S is exp(LOG_ZERO), which is 0.
    empty = shards.maximum <= torch.finfo(shards.maximum.dtype).min
    shards = shards._replace(
        log_sum=shards.log_sum.masked_fill(empty, 0),
        logp=shards.logp.masked_fill(empty, -torch.inf),
        entropy=shards.entropy.masked_fill(empty, 0),
    )
    maximum = shards.maximum.amax(0)
    down = (shards.maximum - maximum).clamp_(min=LOG_ZERO)
    part = (down + shards.log_sum).exp()
    total = in_order(part)
    log_sum = total.log()
    here = (target >= first[:, None]) & (target < last[:, None])
    at_label = torch.where(here, shards.logp + shards.log_sum + (shards.maximum - maximum), 0).sum(0)
    logp = torch.where(here.any(0), at_label - log_sum, torch.nan)
    mean = in_order((shards.log_sum - shards.entropy + down).mul_(part))
    return RowStatistics(maximum, log_sum, logp, log_sum - mean / total)


def in_order(x: Tensor) -> Tensor:
    """x[0] + x[1] + ...: a reduction over the shards may take another order for another number of rows."""
    return functools.reduce(torch.add, x.unbind(0))


def merge_further(further: Further, shards: RowStatistics, stats: RowStatistics, first: Tensor) -> Further:
    """`merge_shards` for the rest, from its result `stats`; top1 [shards, n] counts from each shard's first entry."""
    best = shards.maximum.argmax(0, keepdim=True)
    empty = shards.maximum <= torch.finfo(shards.maximum.dtype).min
    part = ((shards.maximum - stats.maximum).clamp(min=LOG_ZERO) + shards.log_sum - stats.log_sum).exp()
    sum_sq = in_order((part.square() * further.sum_sq).masked_fill(empty, 0))
    return Further((further.top1 + first[:, None]).gather(0, best).squeeze(0), sum_sq)
