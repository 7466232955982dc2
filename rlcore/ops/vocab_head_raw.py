"""The raw passes of the vocabulary head as torch custom ops: forward and backward, without an autograd formula.

Rows are flat: hidden [N, H], target and mask [N], temperature 0-d or [N]. Numbers are tensors, so that no value is a
constant of a compiled graph. Gradients come back in the statistics' dtype (float32 or float64; on a GPU d weight by
recompute in the weight's), empty where not needed. `chunk_bytes` bounds the logits held at once. `requested` is the
backend, "" for the fastest: a backward pass is given what forward ran on.
An autograd formula on an op that returns d weight copies it; differentiation is in `vocab_head_autograd`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head as algorithm
from rlcore.algorithms import vocab_head_chunks as chunks
from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_products as products
from rlcore.algorithms import vocab_head_tiles as tiles
from rlcore.algorithms.objective import lookup
from rlcore.algorithms.policy_loss_metrics import metric_names
from rlcore.algorithms.vocab_head_passes import Coefficients, Further, RowStatistics, Scale
from rlcore.layout import TokenBatch
from rlcore.ops.vocab_head_passes import row_passes, score_passes
from rlcore.ops.vocab_head_triton import fused_statistics

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, list[Tensor], Tensor]


def no_autocast(x: Tensor) -> torch.autocast:
    """The passes have chosen their dtypes; an autocast region around a call must not round their products."""
    return torch.autocast(x.device.type, enabled=False)


def empty_statistics(like: Tensor, N: int, statistics: bool) -> Six:
    """Four of the passes' own, and those that are asked for."""
    n = N if statistics else 0
    own = like.new_empty(N), like.new_empty(N), like.new_empty(N), like.new_empty(N)
    return *own, like.new_empty(n, dtype=torch.int64), like.new_empty(n)


def empty_further(like: Tensor, N: int, statistics: bool) -> tuple[Further, Further | None]:
    """(what an op returns, what its passes fill): nothing to fill where it is not asked for."""
    further = reference.empty_further(N if statistics else 0, like.dtype, like.device)
    return further, further if statistics else None


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    scale: Scale,
    *,
    entropy: bool,
    further: Further | None,
    chunk_bytes: int | None,
    batch_invariant: bool,
    requested: str,
    sharded: bool = False,
) -> RowStatistics:
    """2NHV: the statistics of all rows; no logits in memory where they must be batch-invariant."""
    head = (hidden, weight, target.long(), mask, scale)
    with no_autocast(hidden):
        if batch_invariant:
            return fused_statistics(*head, entropy=entropy, further=further, sharded=sharded)
        stats, _ = chunks.forward_chunks(
            *head, entropy=entropy, passes=row_passes(hidden, requested), chunk_bytes=chunk_bytes, sharded=sharded,
            further=further,
        )  # fmt: skip
    return stats


@torch.library.custom_op("rlcore::linear_logprob_forward", mutates_args=())
def linear_logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    entropy: bool,
    chunk_bytes: int | None = None,
    batch_invariant: bool = False,
    statistics: bool = False,
    requested: str = "",
) -> Six:
    """2NHV: (maximum, log_sum, logp, entropy, top1, sum_sq), each [N], the last two empty unless asked for."""
    found, further = empty_further(logit_scale, hidden.shape[0], statistics)
    stats = head_statistics(
        hidden, weight, target, mask, Scale(temperature, softcap, logit_scale, bias), entropy=entropy, further=further,
        chunk_bytes=chunk_bytes, batch_invariant=batch_invariant, requested=requested,
    )  # fmt: skip
    return *stats, *found


@linear_logprob_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    entropy: bool,
    chunk_bytes: int | None = None,
    batch_invariant: bool = False,
    statistics: bool = False,
    requested: str = "",
) -> Six:
    return empty_statistics(logit_scale, hidden.shape[0], statistics)


@torch.library.custom_op("rlcore::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    statistics: Sequence[Tensor],
    d_logp: Tensor,
    d_entropy: Tensor | None,
    needs: Sequence[bool],
    chunk_bytes: int | None = None,
    requested: str = "",
) -> Gradients:
    """6NHV over the rows that have a coefficient: (d_hidden [N, H], the slices of d_weight [V, H], d_bias [V])."""
    with no_autocast(hidden):
        scale = Scale(temperature, softcap, logit_scale, bias)
        return tiles.backward(
            hidden, weight, target.long(), mask, scale, RowStatistics(*statistics),
            Coefficients(d_logp, d_entropy), needs, passes=row_passes(hidden, requested), chunk_bytes=chunk_bytes,
        )  # fmt: skip


def empty_gradients(
    hidden: Tensor, weight: Tensor, like: Tensor, needs: Sequence[bool], dtype: torch.dtype
) -> Gradients:
    """d weight of a given dtype."""
    V, H = weight.shape
    slices = products.gradient_slices(weight, like.dtype) if needs[1] else []
    return (
        like.new_empty((hidden.shape[0] if needs[0] else 0, H)),
        [like.new_empty((s.stop - s.start, H), dtype=dtype) for s in slices],
        like.new_empty((V if needs[2] else 0,)),
    )


@linear_logprob_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    statistics: Sequence[Tensor],
    d_logp: Tensor,
    d_entropy: Tensor | None,
    needs: Sequence[bool],
    chunk_bytes: int | None = None,
    requested: str = "",
) -> Gradients:
    dtype = tiles.weight_gradient_dtype(weight, logit_scale.dtype)
    return empty_gradients(hidden, weight, logit_scale, needs, dtype)


@torch.library.custom_op("rlcore::linear_logprob_frozen", mutates_args=())
def linear_logprob_frozen(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    chunk_bytes: int | None = None,
    requested: str = "",
) -> tuple[Tensor, Tensor]:
    """4NHV: (logp [N], d logp / d hidden [N, H])."""
    with no_autocast(hidden):
        scale = Scale(temperature, softcap, logit_scale, bias)
        stats, slope = chunks.forward_chunks(
            hidden, weight, target.long(), mask, scale, entropy=False, gradient=True,
            passes=row_passes(hidden, requested), chunk_bytes=chunk_bytes,
        )  # fmt: skip
    return stats.logp, slope


@linear_logprob_frozen.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    chunk_bytes: int | None = None,
    requested: str = "",
) -> tuple[Tensor, Tensor]:
    return logit_scale.new_empty(hidden.shape[0]), logit_scale.new_empty(hidden.shape)


@torch.library.custom_op("rlcore::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    objective: str,
    numbers: Sequence[Tensor],
    batch: Sequence[Tensor | None],
    prepared: bool,
    needs: Sequence[bool],
    chunk_bytes: int | None = None,
    requested: str = "",
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """6NHV, or 2NHV where no gradient is: (loss, metrics [K], d_hidden [N, H], d_weight [V, H] in slices, d_bias [V]).

    `objective` is the key under which the objective's structure is registered, `numbers` are its numbers, `batch` is
    `TokenBatch.tensors()`; the metrics are in the order of `metric_names`.
    """
    rows = TokenBatch.from_tensors(list(batch), prepared=prepared)
    structure = lookup(objective, numbers)
    wanted = (needs[0], needs[1], needs[2])
    with no_autocast(hidden):
        out = algorithm.folded(
            hidden, weight, rows, structure, bias, temperature, softcap, logit_scale, wanted,
            row_passes(hidden, requested), chunk_bytes,
        )  # fmt: skip
    names = metric_names(rows, structure, entropy=True)
    metrics = torch.stack([out.metrics[name].to(logit_scale.dtype) for name in names])
    return out.loss, metrics, out.d_hidden, out.d_weight, out.d_bias


@linear_policy_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    logit_scale: Tensor,
    objective: str,
    numbers: Sequence[Tensor],
    batch: Sequence[Tensor | None],
    prepared: bool,
    needs: Sequence[bool],
    chunk_bytes: int | None = None,
    requested: str = "",
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    rows = TokenBatch.from_tensors(list(batch), prepared=prepared)
    names = metric_names(rows, lookup(objective, numbers), entropy=True)
    gradients = empty_gradients(hidden, weight, logit_scale, needs, logit_scale.dtype)
    return logit_scale.new_empty(()), logit_scale.new_empty(len(names)), *gradients


@torch.library.custom_op("rlcore::logprob_forward", mutates_args=())
def logprob_forward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    entropy: bool,
    statistics: bool = False,
    requested: str = "",
) -> Six:
    """(maximum, log_sum, logp, entropy, top1, sum_sq), each [N], of logits [N, V] or [B, T, V]."""
    scale = Scale(temperature, None, temperature.new_ones(()))
    found, further = empty_further(temperature, target.shape[0], statistics)
    passes = score_passes(logits, requested)
    stats = passes.statistics(logits, target.long(), mask, scale, entropy=entropy, further=further)
    return *stats, *found


@logprob_forward.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    entropy: bool,
    statistics: bool = False,
    requested: str = "",
) -> Six:
    return empty_statistics(temperature, target.shape[0], statistics)


@torch.library.custom_op("rlcore::logprob_backward", mutates_args=())
def logprob_backward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    statistics: Sequence[Tensor],
    d_logp: Tensor,
    d_entropy: Tensor | None,
    requested: str = "",
) -> Tensor:
    """d_logits in the logits' shape and dtype."""
    scale = Scale(temperature, None, temperature.new_ones(()))
    d, stats = Coefficients(d_logp, d_entropy), RowStatistics(*statistics)
    return score_passes(logits, requested).gradient(logits, target.long(), mask, scale, stats, d)


@logprob_backward.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    statistics: Sequence[Tensor],
    d_logp: Tensor,
    d_entropy: Tensor | None,
    requested: str = "",
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("rlcore::logprob_backward_", mutates_args=("logits",))
def logprob_backward_(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    statistics: Sequence[Tensor],
    d_logp: Tensor,
    d_entropy: Tensor | None,
    requested: str = "",
) -> None:
    """`logprob_backward` in the logits' memory; their version counter goes up."""
    scale = Scale(temperature, None, temperature.new_ones(()))
    d, stats = Coefficients(d_logp, d_entropy), RowStatistics(*statistics)
    score_passes(logits, requested).gradient(logits, target.long(), mask, scale, stats, d, in_place=True)


@logprob_backward_.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    statistics: Sequence[Tensor],
    d_logp: Tensor,
    d_entropy: Tensor | None,
    requested: str = "",
) -> None:
    return None
