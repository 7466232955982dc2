"""The row passes of the vocabulary head in torch: a chunk of logits -> its statistics, and in place its gradient.

Raw logits are a = h W^T [n, V]; the logits are z = softcap * tanh(logit_scale * (a + b) / softcap) / temperature. With
p = softmax(z), logp = z_y - lse(z) and entropy H = -sum_v p_v log p_v:

    d logp / d z_v = 1[v = y] - p_v            d H / d z_v = -p_v (log p_v + H)

All in the statistics' dtype: float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_rows as selection
from rlcore.algorithms.vocab_head_products import Rows

# exp(-1e4) is exactly 0 in float32 and float64. Log-probabilities below it (-inf from a bias that forbids a token) are
# lifted to it, so that 0 * log 0 is 0 and not NaN.
LOG_ZERO = -1e4


class Scale(NamedTuple):
    """What turns a product into logits: z = softcap * tanh(logit_scale * (a + bias) / softcap) / temperature.

    The numbers are in the statistics' dtype, the bias is as it was given.
    """

    temperature: Tensor  # 0-d, or one per row [n]
    softcap: Tensor | None  # 0-d
    logit_scale: Tensor  # 0-d
    bias: Tensor | None = None  # [V]

    def of(self, rows: Rows) -> Scale:
        return self if self.temperature.dim() == 0 else self._replace(temperature=self.temperature[rows])

    def column(self) -> Tensor:
        return self.temperature if self.temperature.dim() == 0 else self.temperature[:, None]


class RowStatistics(NamedTuple):
    """Per row [n]: the maximum of the logits, log sum exp(z - maximum), the target's log-prob, the entropy.

    The log-sum-exp is kept as two terms: (z - maximum) - log_sum is exact where p -> 1, z - lse loses eps * |lse|.
    """

    maximum: Tensor
    log_sum: Tensor
    logp: Tensor
    entropy: Tensor  # zeros unless asked for

    def of(self, rows: Rows) -> RowStatistics:
        return RowStatistics(*(x[rows] for x in self))

    def contiguous(self) -> RowStatistics:
        return RowStatistics(*(x.contiguous() for x in self))

    def where(self, keep: Tensor) -> RowStatistics:
        """0 elsewhere, whatever is there."""
        return RowStatistics(*(torch.where(keep, x, 0) for x in self))


class Further(NamedTuple):
    """Per row [n], where asked for: the likeliest entry (of several the lowest), int64, and sum_v p_v^2.

    The likeliest entry's z is the maximum, so its log-prob is -log_sum.
    """

    top1: Tensor
    sum_sq: Tensor

    def of(self, rows: Rows) -> Further:
        return Further(self.top1[rows], self.sum_sq[rows])

    def put(self, rows: Rows, found: Further) -> None:
        self.top1[rows], self.sum_sq[rows] = found


class Coefficients(NamedTuple):
    """Per row [n]: d loss / d logp and d loss / d entropy (None: no entropy gradient)."""

    logp: Tensor
    entropy: Tensor | None

    def of(self, rows: Rows) -> Coefficients:
        return Coefficients(self.logp[rows], None if self.entropy is None else self.entropy[rows])

    def contiguous(self) -> Coefficients:
        return Coefficients(self.logp.contiguous(), None if self.entropy is None else self.entropy.contiguous())

    def where(self, keep: Tensor | None) -> Coefficients:
        """0 elsewhere, whatever is there; None keeps all."""
        if keep is None:
            return self
        entropy = None if self.entropy is None else torch.where(keep, self.entropy, 0)
        return Coefficients(torch.where(keep, self.logp, 0), entropy)

    def nonzero(self) -> Tensor:
        return self.logp != 0 if self.entropy is None else (self.logp != 0) | (self.entropy != 0)


def empty_statistics(N: int, dtype: torch.dtype, device: torch.device) -> RowStatistics:
    return RowStatistics(*(torch.zeros(N, dtype=dtype, device=device) for _ in RowStatistics._fields))


def empty_further(N: int, dtype: torch.dtype, device: torch.device) -> Further:
    return Further(torch.zeros(N, dtype=torch.int64, device=device), torch.zeros(N, dtype=dtype, device=device))


def clear(further: Further, mask: Tensor) -> None:
    """Zeros where masked, whatever is there."""
    for x in further:
        x.masked_fill_(~mask, 0)


# ------------------------------------------------------------------------------------------------ row passes


def is_one(x: Tensor) -> bool:
    return x.dim() == 0 and x.device.type == "cpu" and x.item() == 1.0


def bend_(a: Tensor, scale: Scale) -> Tensor:
    """Raw logits -> what stays in a chunk's buffer, in place: z, or tanh(logit_scale * a / softcap) with a softcap.

    The slope 1 - tanh^2 needs the tanh itself: made again from z it has lost its last digits where the cap saturates.
    """
    if scale.bias is not None:
        a.add_(scale.bias)
    if not is_one(scale.logit_scale):
        a.mul_(scale.logit_scale)
    if scale.softcap is not None:
        a.div_(scale.softcap).tanh_()
    elif not is_one(scale.temperature):
        a.div_(scale.column())
    return a


def logits_of(bent: Tensor, scale: Scale) -> Tensor:
    """The logits z of a buffer: itself, or a new tensor with a softcap."""
    return bent if scale.softcap is None else (bent * scale.softcap).div_(scale.column())


def valid_labels(target: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """(labels that can be gathered, whether they are the true ones)."""
    return target.clamp(0, V - 1), (target >= 0) & (target < V)


def block_statistics(z: Tensor, target: Tensor, entropy: bool) -> RowStatistics:
    """Statistics of a block of logits [n, V]; z is left as it is."""
    label, valid = valid_labels(target, z.shape[1])
    maximum = z.amax(1)
    shifted = (z - maximum[:, None]).clamp_(min=LOG_ZERO)
    e = shifted.exp()
    total = e.sum(1)
    log_sum = total.log()
    logp = z.gather(1, label[:, None]).squeeze(1) - maximum - log_sum
    # H = log_sum - sum_v p_v (z_v - maximum)
    H = log_sum - e.mul_(shifted).sum(1).div_(total) if entropy else torch.zeros_like(log_sum)
    return RowStatistics(maximum, log_sum, torch.where(valid, logp, torch.nan), H)


def block_further(z: Tensor, stats: RowStatistics) -> Further:
    """What else a block of logits [n, V] has, beside its statistics; z is left as it is."""
    # Not exp(2 (z - maximum - log_sum)): the rounding of log_sum would be that of every p.
    e = (z - stats.maximum[:, None]).exp_()
    total = e.sum(1)
    return Further(z.argmax(1), e.square_().sum(1).div_(total).div_(total))


def bent_further(further: Further, bent: Tensor, stats: RowStatistics, scale: Scale) -> None:
    """Fills `further` from a chunk that `bend_`, or another implementation of the row pass, has bent."""
    for rows in selection.blocks(bent.shape[0], bent.shape[1], bent.dtype, bent.device):
        further.put(rows, block_further(logits_of(bent[rows], scale.of(rows)), stats.of(rows)))


def statistics_(
    a: Tensor, target: Tensor, scale: Scale, entropy: bool, further: Further | None = None
) -> RowStatistics:
    """Row pass 1 over a chunk of raw logits [n, V], which are bent in place; returns its statistics."""
    out = RowStatistics(*(a.new_empty(a.shape[0]) for _ in RowStatistics._fields))
    for rows in selection.blocks(a.shape[0], a.shape[1], a.dtype, a.device):
        z = logits_of(bend_(a[rows], scale.of(rows)), scale.of(rows))
        for x, y in zip(out, block_statistics(z, target[rows], entropy), strict=True):
            x[rows] = y
        if further is not None:
            further.put(rows, block_further(z, out.of(rows)))
    return out


def block_gradient_(bent: Tensor, target: Tensor, stats: RowStatistics, d: Coefficients, scale: Scale) -> Tensor:
    """What `bend_` left of a block -> d loss / d raw logits, in place.

    d loss / d z_v = d_logp (1[v = y] - p_v) - d_entropy p_v (log p_v + H); times dz/da = logit_scale (1 - tanh^2) / T.
    """
    z = logits_of(bent, scale)
    label, here = valid_labels(target, z.shape[1])
    d_logp = torch.where(stats.logp.isnan(), torch.nan, d.logp)
    z.sub_(stats.maximum[:, None]).sub_(stats.log_sum[:, None]).clamp_(min=LOG_ZERO)
    p = z.exp()
    if d.entropy is None:
        torch.mul(p, -d_logp[:, None], out=z)
    else:
        z.add_(stats.entropy[:, None]).mul_(d.entropy[:, None]).add_(d_logp[:, None]).mul_(p).neg_()
    # Not scatter_add_: each row has one label, so nothing collides, and this form is deterministic on every device.
    # A label that is not here may be another shard's.
    z[torch.arange(z.shape[0], device=z.device), label] += torch.where(here, d_logp, 0)
    if not is_one(scale.logit_scale):
        z.mul_(scale.logit_scale)
    if not is_one(scale.temperature):
        z.div_(scale.column())
    return z if scale.softcap is None else bent.square_().neg_().add_(1).mul_(z)


def gradient_(
    z: Tensor,
    target: Tensor,
    stats: RowStatistics,
    d: Coefficients,
    scale: Scale,
    *,
    raw: bool,
    drop: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Rows]:
    """Row pass 2 over a chunk, in place: raw logits (`raw`, recompute) or bent ones -> d loss / d raw logits.

    With `drop`, rows whose coefficients are zero leave: the others move to the front of the same buffer. Returns the
    gradient of the rows that are left, rounded to `dtype` if one is given, and which ones they are.
    """
    n = z.shape[0]
    keep = selection.kept_rows(d.nonzero(), n) if drop else slice(0, n)
    done = 0
    for block in selection.blocks(selection.count(keep), z.shape[1], z.dtype, z.device):
        rows: Rows = block if isinstance(keep, slice) else keep[block]
        part = z[rows]  # a view of a range, a copy of scattered rows
        if raw:
            bend_(part, scale.of(rows))
        block_gradient_(part, target[rows], stats.of(rows), d.of(rows), scale.of(rows))
        if not isinstance(rows, slice):
            z[block] = part  # never ahead of a row that is still to be read: block <= rows
        done = block.stop
    return z[:done] if dtype is None else z[:done].to(dtype), keep


def to_fit(
    d: Coefficients, stats: RowStatistics, scale: Scale, dtype: torch.dtype
) -> tuple[Coefficients, Tensor | None]:
    """Coefficients whose d logits fill the range of `dtype`, and the factor that takes their gradients back (None: 1).

    A power of two on the device. As p |log p + H| < 1 + H, for every entry v of a row
    |d loss / d a_v| < (|d_logp| + |d_entropy| (1 + H)) |logit_scale| / T: the largest of these becomes half of fp16's.
    """
    if dtype != torch.float16 or not d.logp.numel():
        return d, None
    bound = d.logp.abs()
    if d.entropy is not None:
        bound = bound + d.entropy.abs() * (1 + stats.entropy)
    bound = (bound * (scale.logit_scale.abs() / scale.temperature)).nan_to_num(0.0, posinf=0.0).amax()
    exponent = (15 - torch.frexp(bound).exponent).clamp(max=100)
    up = torch.ldexp(torch.ones_like(bound), exponent)
    return Coefficients(d.logp * up, None if d.entropy is None else d.entropy * up), 1 / up


class RowPasses(NamedTuple):
    """The row passes of one implementation, and its way to differentiate an objective (None: autograd)."""

    statistics: Callable[..., RowStatistics]
    gradient: Callable[..., tuple[Tensor, Rows]]
    objective: Callable[..., tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None] | None] | None = None


TORCH = RowPasses(statistics_, gradient_)


def row_statistics(
    passes: RowPasses, z: Tensor, target: Tensor, rows: Rows, scale: Scale, entropy: bool, further: Further | None
) -> RowStatistics:
    """Row pass 1 over the logits of `rows`; what `further` holds of them is filled."""
    if further is None:
        return passes.statistics(z, target[rows], scale.of(rows), entropy)
    part = empty_further(selection.count(rows), z.dtype, z.device)
    found = passes.statistics(z, target[rows], scale.of(rows), entropy, part)
    further.put(rows, part)
    return found
