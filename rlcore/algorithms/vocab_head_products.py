"""The head's three matrix products, 2nHV FLOPs each, on bounded chunks of rows, summed in float32 (or float64).

    logits = h W^T [n, V]        d hidden = d logits W [n, H]        d weight += d logits^T h [V, H]

On a GPU 16-bit operands stay what they are and the product comes out in float32: the tensor cores add in float32
anyway. Before a loss scale has met them d logits would vanish in fp16: they are held at a scale of their own
(`vocab_head_passes.to_fit`), and `factor` takes their products back. The CPU has no such product: there low-precision
operands are upcast, the weight by slices of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# The forward GEMM takes the vocabulary by slices of this size: with the whole weight as its right operand the CPU's
# BLAS is 5 to 10 % slower at chunks of 340 to 384 rows, and takes half as long again at 88 rows of a vocabulary of 152K
# (measured at hidden sizes 256 to 4,096; 4 MiB is within 5 % of the best size at each). By the same slices a
# low-precision weight is upcast, so that no fp32 copy of it exists.
WEIGHT_TILE_BYTES = 4 * 2**20
# d weight of a low-precision weight is summed in fp32 by slices too, so that rounding it to the weight's dtype gives
# them back one by one; above 32 MiB glibc's malloc returns what is freed to the system.
GRADIENT_SLICE_BYTES = 40 * 2**20
# Before torch 2.10 a low-precision product could not be added to float32 memory; there it goes through slices.
ADDS_TO_FLOAT32 = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)
# So large are the slices that a GPU upcasts, too.
PRODUCT_BYTES = 256 * 2**20

Rows = slice | Tensor  # a range of rows, or the int64 indices of the rows that are left after dropping


# ------------------------------------------------------------------------------------------------ dtypes


def keeps_float32(x: Tensor) -> bool:
    """Whether products of x's dtype come out in float32 on its device."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def product_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the operands: the weight's own where the result is kept in float32, otherwise the statistics'."""
    return weight.dtype if keeps_float32(weight) else dtype


# ------------------------------------------------------------------------------------------------ products


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b in the dtype of `out`: the operands' own, or float32."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def addmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out += a b."""
    return out.addmm_(a, b) if a.dtype == out.dtype else torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def multiply(a: Tensor, b: Tensor, out: Tensor, factor: Tensor | None = None) -> Tensor:
    """out = factor * a b (None: 1), rounded once."""
    if factor is None:
        return mm(a, b, out)
    if out.dtype == torch.float32:
        return mm(a, b, out).mul_(factor)
    for rows, part in sliced_products(a, b):
        out[rows] = part.mul_(factor)
    return out


def multiply_add(a: Tensor, b: Tensor, out: Tensor, factor: Tensor | None = None) -> Tensor:
    """out += factor * a b (None: 1); `out` is float32, or float64."""
    if factor is None and (a.dtype == out.dtype or ADDS_TO_FLOAT32):
        return addmm(a, b, out)
    for rows, part in sliced_products(a, b):
        out[rows] += part if factor is None else part.mul_(factor)
    return out


def sliced_products(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """a b in float32 by slices of its rows."""
    for rows in vocabulary_slices(a.shape[0], b.shape[1], torch.float32, PRODUCT_BYTES):
        yield rows, mm(a[rows], b, a.new_empty((rows.stop - rows.start, b.shape[1]), dtype=torch.float32))


def vocabulary_slices(V: int, H: int, dtype: torch.dtype, bound: int) -> list[slice]:
    """The vocabulary in slices whose weight rows in `dtype` fill at most `bound` bytes (at least one row each)."""
    step = max(1, bound // (max(H, 1) * dtype.itemsize))
    return [slice(start, min(start + step, V)) for start in range(0, V, step)]


def gradient_slices(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """The slices in which d weight is summed in `dtype`; one on a GPU, and where it needs no rounding afterwards."""
    V, H = weight.shape
    whole = weight.dtype == dtype or weight.device.type != "cpu"
    return [slice(0, V)] if whole else vocabulary_slices(V, H, dtype, GRADIENT_SLICE_BYTES)


def weight_tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary with their weight rows in `dtype`, valid until the next one: upcasts share one tile."""
    V, H = weight.shape
    if weight.dtype == dtype and weight.device.type != "cpu":
        yield slice(0, V), weight
        return
    slices = vocabulary_slices(V, H, dtype, WEIGHT_TILE_BYTES if weight.device.type == "cpu" else PRODUCT_BYTES)
    tile = None if weight.dtype == dtype else weight.new_empty((slices[0].stop, H), dtype=dtype)
    for columns in slices:
        rows = weight[columns]
        yield columns, rows if tile is None else tile[: rows.shape[0]].copy_(rows)


def project(h: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out = h W^T [n, V], never rounded below the dtype of `out`."""
    for columns, w in weight_tiles(weight, h.dtype):
        multiply(h, w.t(), out[:, columns])
    return out


def project_back(d_logits: Tensor, weight: Tensor, out: Tensor, factor: Tensor | None = None) -> Tensor:
    """out = d hidden = factor * d logits W [n, H]."""
    if weight.dtype == d_logits.dtype:
        return multiply(d_logits, weight, out, factor)
    for columns, w in weight_tiles(weight, d_logits.dtype):
        (multiply if columns.start == 0 else multiply_add)(d_logits[:, columns], w, out, factor)
    return out


class HeadGradients:
    """d hidden, d weight and d bias, filled chunk by chunk; what is not needed stays empty.

    They are in the statistics' dtype. d weight is a list: the whole [V, H], or of a low-precision weight on the CPU its
    slices of the vocabulary, one after another.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
        self.needs = needs
        V, H = weight.shape
        N = hidden.shape[0] if needs[0] else 0
        self.hidden = hidden.new_zeros((N, H), dtype=dtype)
        self._slices = gradient_slices(weight, dtype) if needs[1] else []
        # The first chunk writes d weight, the others add to it: zeroing it first is one more sweep over V x H.
        self._weight = [weight.new_empty((s.stop - s.start, H), dtype=dtype) for s in self._slices]
        self._written = False
        self.bias = weight.new_zeros(V if needs[2] else 0, dtype=dtype)

    @property
    def weight(self) -> list[Tensor]:
        return self._weight if self._written else [x.zero_() for x in self._weight]

    def add(self, rows: Rows, h: Tensor, weight: Tensor, d_logits: Tensor, factor: Tensor | None = None) -> None:
        """Two GEMMs: d_hidden[rows] = d logits W, d_weight += d logits^T h (4nHV FLOPs); d logits has h's dtype.

        The true d logits are `factor` (None: 1) times those given.
        """
        if d_logits.shape[0] == 0:
            return
        if self.needs[0] and isinstance(rows, slice):
            project_back(d_logits, weight, self.hidden[rows], factor)
        elif self.needs[0]:
            self.hidden[rows] = project_back(d_logits, weight, torch.empty_like(h, dtype=self.hidden.dtype), factor)
        for columns, sum_ in zip(self._slices, self._weight, strict=True):
            (multiply_add if self._written else multiply)(d_logits[:, columns].t(), h, sum_, factor)
        self._written = True
        if self.needs[2]:
            sum_ = d_logits.sum(0, dtype=self.bias.dtype)
            self.bias.add_(sum_ if factor is None else sum_ * factor)
