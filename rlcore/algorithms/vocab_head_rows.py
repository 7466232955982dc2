"""Which rows of a batch the head walks: the kept ones, cut into chunks for the products and into blocks for caches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from rlcore.algorithms.vocab_head_products import Rows

# The fp32 logits of a chunk, unless the caller gives a budget. Few and large: every further chunk reads and writes d
# weight once more and makes the GEMMs thinner (`make bench` prints the ratio to bare GEMMs), so the bound is what a
# caller can spare. CPU: of the 64 MiB that a step may cost above its inputs, outputs and gradients the BLAS and the
# rest take some 10 (measured by `bench/memory.py`). GPU: of 2.5 GiB, what 4,096 rows of a vocabulary of 152K take, and
# 8,192 rows of d hidden in float32 at a hidden size of 4,096.
CHUNK_BYTES = {"cpu": 51 * 2**20, "default": 157 * 2**24}
# Row passes run over blocks of a chunk that stay in the L2 cache of a core between their sweeps. A GPU takes the whole
# chunk at once: there a launch costs more than a sweep.
BLOCK_BYTES = {"cpu": 2**20, "default": 2**32}
# The CPU's BLAS works through a left operand by blocks of rows: a chunk of 410 is 10 % slower per row than one of
# 384. On a GPU a product's tiles have 128 rows.
ROW_BLOCK = {"cpu": 384, "default": 128}


def compacts(device: torch.device) -> bool:
    """Whether dropped rows leave the GEMM. Only on CPU: elsewhere their count is not known without a device sync."""
    return device.type == "cpu"


def held_bytes(hidden: Tensor, dtype: torch.dtype) -> int:
    """What d hidden in `dtype` takes beside a result of fewer bits; not on a CPU, whose budget is for logits alone."""
    return 0 if hidden.dtype == dtype or compacts(hidden.device) else hidden.numel() * dtype.itemsize


def logits_bytes(device: torch.device, chunk_bytes: int | None, held: int = 0) -> int:
    """Bytes of logits: what the caller gives, otherwise what `held` bytes leave of the budget, at least a quarter."""
    bound = of_device(CHUNK_BYTES, device)
    return max(bound - held, bound // 4) if chunk_bytes is None else chunk_bytes


def chunk_rows(
    V: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None = None, held: int = 0
) -> int:
    """How many rows of logits a chunk of at most `chunk_bytes` may hold, beside `held` bytes."""
    rows = logits_bytes(device, chunk_bytes, held) // (max(V, 1) * dtype.itemsize)
    block = of_device(ROW_BLOCK, device)
    return max(1, rows - rows % block if rows > block else rows)


def of_device(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["default"])


def blocks(n: int, V: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Cut n rows into blocks that stay in cache."""
    step = max(1, of_device(BLOCK_BYTES, device) // (max(V, 1) * dtype.itemsize))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def even_chunks(rows: Rows, bound: int, device: torch.device) -> Iterator[Rows]:
    """Cut rows into as few chunks as the bound allows, of even size; on a GPU between blocks, if the bound is so too.

    On a CPU chunks of 768 and 232 rows were no faster than two of 500.
    """
    n = count(rows)
    parts = -(-n // max(bound, 1))  # a buffer for no rows has none
    block = of_device(ROW_BLOCK, device)
    block = 1 if compacts(device) or bound % block else block
    borders = [-(-(n * i // parts) // block) * block for i in range(parts)]
    for start, stop in itertools.pairwise([*borders, n]):
        yield slice(rows.start + start, rows.start + stop) if isinstance(rows, slice) else rows[start:stop]


def count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]


def kept_rows(keep: Tensor | None, N: int) -> Rows:
    """The rows where `keep` holds: indices on CPU, every row elsewhere (there the dropped ones are zeroed)."""
    if keep is None or not compacts(keep.device):
        return slice(0, N)
    rows = keep.nonzero().squeeze(1)
    return slice(0, N) if rows.shape[0] == N else rows


def take_hidden(hidden: Tensor, rows: Rows, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of `hidden` in the products' dtype; masked rows that stay (GPU) become zero, whatever they hold."""
    h = hidden[rows]
    if mask is not None and not compacts(mask.device):
        h = torch.where(mask[rows, None], h, 0)
    return h.to(dtype)


def row_stride(logits: Tensor) -> int:
    """The distance of two rows; a single one may say anything."""
    return logits.stride(0) if logits.shape[0] > 1 else logits.shape[1]


def lie_apart(logits: Tensor) -> bool:
    """Whether rows have unit stride and share no memory (an expanded row does): kernels take them where they lie."""
    return logits.stride(1) == 1 and row_stride(logits) >= logits.shape[1]


def check_target(target: Tensor, V: int, rows: Rows) -> None:
    """On CPU an out-of-range label raises; elsewhere its log-prob is NaN (reading it would wait for the device)."""
    labels = target[rows]
    if target.device.type != "cpu" or labels.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(labels))
    if low < 0 or high >= V:
        bad = low if low < 0 else high
        raise ValueError(f"target: expected labels in [0, {V}) on unmasked rows; got {bad}")


def keep_within(rows: Rows, keep: Rows) -> Rows:
    """Rows of a chunk, then some of those: the composed selection."""
    if isinstance(keep, slice) and isinstance(rows, slice):
        return slice(rows.start + keep.start, rows.start + keep.stop)
    return keep + rows.start if isinstance(rows, slice) else rows[keep]  # type: ignore[operator]
