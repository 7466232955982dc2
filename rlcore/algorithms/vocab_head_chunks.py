"""The vocabulary head in bounded chunks: GEMM -> row pass over the chunk's logits -> (in place) d logits -> two GEMMs.

Raw logits are a = h W^T [n, V]; the logits are z = softcap * tanh(logit_scale * (a + b) / softcap) / temperature. With
p = softmax(z), logp = z_y - lse(z) and entropy H = -sum_v p_v log p_v:

    d logp / d z_v = 1[v = y] - p_v            d H / d z_v = -p_v (log p_v + H)

Everything here works on flat rows, without autograd, in the statistics' dtype: float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlcore.algorithms import vocab_head_products as products
from rlcore.algorithms.vocab_head_products import HeadGradients, Rows

# The fp32 logits of a chunk, unless the caller gives a budget. Few and large: every further chunk reads and writes d
# weight once more and makes the GEMMs thinner (`make bench` prints the ratio to bare GEMMs), so the bound is what a
# caller can spare. CPU: of the 64 MiB that a step may cost above its inputs, outputs and gradients the BLAS and the
# rest take some 10 (measured by `bench/memory.py`). GPU: of 2.5 GiB, what 4,096 rows of a vocabulary of 152K take.
CHUNK_BYTES = {"cpu": 51 * 2**20, "default": 19 * 2**27}
# Row passes run over blocks of a chunk that stay in the L2 cache of a core between their sweeps. A GPU takes the whole
# chunk at once: there a launch costs more than a sweep.
BLOCK_BYTES = {"cpu": 2**20, "default": 2**32}
# The CPU's BLAS works through a left operand by blocks of rows: a chunk of 410 is 10 % slower per row than one of
# 384. On a GPU a product's tiles have 128 rows.
ROW_BLOCK = {"cpu": 384, "default": 128}
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

    def nonzero(self) -> Tensor:
        return self.logp != 0 if self.entropy is None else (self.logp != 0) | (self.entropy != 0)


# ------------------------------------------------------------------------------------------------ rows and chunks


def compacts(device: torch.device) -> bool:
    """Whether dropped rows leave the GEMM. Only on CPU: elsewhere their count is not known without a device sync."""
    return device.type == "cpu"


def chunk_rows(V: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None = None) -> int:
    """How many rows of logits a chunk of at most `chunk_bytes` may hold."""
    bound = of_device(CHUNK_BYTES, device) if chunk_bytes is None else chunk_bytes
    rows = bound // (max(V, 1) * dtype.itemsize)
    block = of_device(ROW_BLOCK, device)
    return max(1, rows - rows % block if rows > block else rows)


def of_device(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["default"])


def blocks(n: int, V: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Cut n rows into blocks that stay in cache."""
    step = max(1, of_device(BLOCK_BYTES, device) // (max(V, 1) * dtype.itemsize))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def even_chunks(rows: Rows, bound: int) -> Iterator[Rows]:
    """Cut rows into as few chunks as the bound allows, of even size."""
    n = count(rows)
    parts = -(-n // max(bound, 1))  # a buffer for no rows has none
    for i in range(parts):
        start, stop = n * i // parts, n * (i + 1) // parts
        yield slice(rows.start + start, rows.start + stop) if isinstance(rows, slice) else rows[start:stop]


def count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]


def kept_rows(keep: Tensor | None, N: int) -> Rows:
    """The rows where `keep` holds: indices on CPU, every row elsewhere (there the dropped ones are zeroed)."""
    if keep is None or not compacts(keep.device):
        return slice(0, N)
    rows = keep.nonzero().squeeze(1)
    return slice(0, N) if rows.shape[0] == N else rows


def neutral(mask: Tensor | None, target: Tensor, scale: Scale) -> tuple[Tensor, Scale]:
    """Where masked rows stay in the GEMM (GPU), give them a valid label and temperature."""
    if mask is None or compacts(mask.device):
        return target, scale
    if scale.temperature.dim():
        scale = scale._replace(temperature=torch.where(mask, scale.temperature, 1.0))
    return torch.where(mask, target, 0), scale


def take_hidden(hidden: Tensor, rows: Rows, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of `hidden` in the products' dtype; masked rows that stay (GPU) become zero, whatever they hold."""
    h = hidden[rows]
    if mask is not None and not compacts(mask.device):
        h = torch.where(mask[rows, None], h, 0)
    return h.to(dtype)


def check_target(target: Tensor, V: int, rows: Rows) -> None:
    """On CPU an out-of-range label raises; elsewhere its log-prob is NaN (reading it would wait for the device)."""
    labels = target[rows]
    if target.device.type != "cpu" or labels.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(labels))
    if low < 0 or high >= V:
        bad = low if low < 0 else high
        raise ValueError(f"target: expected labels in [0, {V}) on unmasked rows; got {bad}")


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
    for rows in blocks(bent.shape[0], bent.shape[1], bent.dtype, bent.device):
        further.put(rows, block_further(logits_of(bent[rows], scale.of(rows)), stats.of(rows)))


def statistics_(
    a: Tensor, target: Tensor, scale: Scale, entropy: bool, further: Further | None = None
) -> RowStatistics:
    """Row pass 1 over a chunk of raw logits [n, V], which are bent in place; returns its statistics."""
    out = RowStatistics(*(a.new_empty(a.shape[0]) for _ in RowStatistics._fields))
    for rows in blocks(a.shape[0], a.shape[1], a.dtype, a.device):
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
    keep = kept_rows(d.nonzero(), n) if drop else slice(0, n)
    done = 0
    for block in blocks(count(keep), z.shape[1], z.dtype, z.device):
        rows: Rows = block if isinstance(keep, slice) else keep[block]
        part = z[rows]  # a view of a range, a copy of scattered rows
        if raw:
            bend_(part, scale.of(rows))
        block_gradient_(part, target[rows], stats.of(rows), d.of(rows), scale.of(rows))
        if not isinstance(rows, slice):
            z[block] = part  # never ahead of a row that is still to be read: block <= rows
        done = block.stop
    return z[:done] if dtype is None else z[:done].to(dtype), keep


class RowPasses(NamedTuple):
    """The row passes of one implementation, and its way to differentiate an objective (None: autograd)."""

    statistics: Callable[..., RowStatistics]
    gradient: Callable[..., tuple[Tensor, Rows]]
    objective: Callable[..., tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None] | None] | None = None


TORCH = RowPasses(statistics_, gradient_)


# ------------------------------------------------------------------------------------------------ chunk loops


def empty_statistics(N: int, dtype: torch.dtype, device: torch.device) -> RowStatistics:
    return RowStatistics(*(torch.zeros(N, dtype=dtype, device=device) for _ in RowStatistics._fields))


def empty_further(N: int, dtype: torch.dtype, device: torch.device) -> Further:
    return Further(torch.zeros(N, dtype=torch.int64, device=device), torch.zeros(N, dtype=dtype, device=device))


def logits_buffer(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """One buffer for all chunks of a call: fresh pages cost as much as a sweep over the logits.

    On a GPU every row begins at a multiple of 256 bytes, for wide loads and aligned operands whatever the vocabulary.
    """
    V = weight.shape[0]
    width = V if weight.device.type == "cpu" else -(-V // 64) * 64
    return weight.new_empty((rows, width), dtype=dtype)[:, :V]


def forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    scale: Scale,
    *,
    entropy: bool,
    gradient: bool = False,
    rows: Rows | None = None,
    buffer: Tensor | None = None,
    passes: RowPasses = TORCH,
    chunk_bytes: int | None = None,
    sharded: bool = False,
    further: Further | None = None,
) -> tuple[RowStatistics, Tensor]:
    """Statistics of every row [N], zero where masked: 2NHV. With `gradient` also d logp / d hidden [N, H]: 4NHV.

    `further`, of N zeros, is filled likewise.
    Where the weight is a shard of the vocabulary (`sharded`), a label outside it has the log-prob NaN and is no error.
    """
    N, V, dtype = hidden.shape[0], weight.shape[0], scale.logit_scale.dtype
    rows = kept_rows(mask, N) if rows is None else rows
    target, scale = neutral(mask, target, scale)
    if not sharded:
        check_target(target, V, rows)
    stats = empty_statistics(N, dtype, hidden.device)
    slope = HeadGradients(hidden, weight, (gradient, False, False), dtype)
    if buffer is None:
        bound = chunk_rows(V, dtype, hidden.device, chunk_bytes)
        buffer = logits_buffer(weight, min(bound, count(rows)), dtype)
    for part in even_chunks(rows, buffer.shape[0]):
        h = take_hidden(hidden, part, mask, products.product_dtype(weight, dtype))
        z = products.project(h, weight, buffer[: count(part)])
        found = row_statistics(passes, z, target, part, scale, entropy, further)
        for x, y in zip(stats, found, strict=True):
            x[part] = y
        if gradient:
            ones = Coefficients(torch.ones_like(found.logp), None)
            d_logits, _ = passes.gradient(
                z, target[part], found, ones, scale.of(part), raw=False, dtype=h.dtype
            )
            slope.add(part, h, weight, d_logits)
    if mask is not None and not compacts(mask.device):
        stats = RowStatistics(*(torch.where(mask, x, 0) for x in stats))
        if further is not None:
            clear(further, mask)
        if gradient:
            slope.hidden = torch.where(mask[:, None], slope.hidden, 0)
    return stats, slope.hidden


def row_statistics(
    passes: RowPasses, z: Tensor, target: Tensor, rows: Rows, scale: Scale, entropy: bool, further: Further | None
) -> RowStatistics:
    """Row pass 1 over the logits of `rows`; what `further` holds of them is filled."""
    if further is None:
        return passes.statistics(z, target[rows], scale.of(rows), entropy)
    part = empty_further(count(rows), z.dtype, z.device)
    found = passes.statistics(z, target[rows], scale.of(rows), entropy, part)
    further.put(rows, part)
    return found


def clear(further: Further, mask: Tensor) -> None:
    """Zeros where masked, whatever is there."""
    for x in further:
        x.masked_fill_(~mask, 0)


def backward_chunks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    mask: Tensor | None,
    scale: Scale,
    stats: RowStatistics,
    d: Coefficients,
    gradients: HeadGradients,
    *,
    rows: Rows | None = None,
    buffer: Tensor | None = None,
    passes: RowPasses = TORCH,
    chunk_bytes: int | None = None,
) -> None:
    """Recompute form: logits again, then d logits in place, then two GEMMs (6NHV), over rows with a coefficient."""
    N, V, dtype = hidden.shape[0], weight.shape[0], scale.logit_scale.dtype
    if mask is not None:
        d = Coefficients(*(None if x is None else torch.where(mask, x, 0) for x in d))  # type: ignore[arg-type]
    if rows is None:
        rows = kept_rows(d.nonzero(), N)
    else:
        keep = kept_rows(d.of(rows).nonzero(), count(rows))
        rows = keep_within(rows, keep)
    target, scale = neutral(mask, target, scale)
    if buffer is None:
        bound = chunk_rows(V, dtype, hidden.device, chunk_bytes)
        buffer = logits_buffer(weight, min(bound, count(rows)), dtype)
    for part in even_chunks(rows, buffer.shape[0]):
        h = take_hidden(hidden, part, mask, products.product_dtype(weight, dtype))
        z = products.project(h, weight, buffer[: count(part)])
        d_logits, _ = passes.gradient(
            z, target[part], stats.of(part), d.of(part), scale.of(part), raw=True, dtype=h.dtype
        )
        gradients.add(part, h, weight, d_logits)


def keep_within(rows: Rows, keep: Rows) -> Rows:
    """Rows of a chunk, then some of those: the composed selection."""
    if isinstance(keep, slice) and isinstance(rows, slice):
        return slice(rows.start + keep.start, rows.start + keep.stop)
    return keep + rows.start if isinstance(rows, slice) else rows[keep]  # type: ignore[operator]
