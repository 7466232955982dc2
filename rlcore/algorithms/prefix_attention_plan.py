"""Which blocks of a packed forest one flash attention call can take together."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Runs and whole subtrees up to this many rows share a call with others of similar size; longer runs fill a call alone.
# Forward and backward in ms (2 threads, 8 query heads of 32) with 16, 32, 64 and 128: 64 prompts of 20 with 8 answers
# up to 8: 54, 36, 30, 28; 8 prompts of 100 with 8 up to 100: 44, 44, 44, 55; one of 512 with 8 up to 64: all 14.
_SMALL = 64
Block = tuple[int, int, int, int]


class Part(NamedTuple):
    """Equal-shaped blocks for one call: queries [B, Lq] and keys [B, Lk] are packed rows.

    own: the keys are the queries' rows; causal where there is no mask, else mask [B, 1, Lq, Lk] says who sees whom.
    Otherwise every query sees every key. Blocks shorter than Lq repeat their last row: `kept` [n] selects the real
    queries of the flattened [B * Lq], `padding` [B, 1, Lq, 1] marks the others; both None where all are real.
    rows [n] are the packed rows of the real queries, all distinct. The slices stand for the rows of a single block.
    """

    own: bool
    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    kept: Tensor | None
    padding: Tensor | None
    rows: Tensor
    query_slice: slice | None
    key_slice: slice | None

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as what flash attention adds to the scores."""
        if self.mask is None:
            return None
        return torch.zeros(self.mask.shape, dtype=dtype).masked_fill_(~self.mask, float("-inf"))


def plan(node_table: Tensor) -> tuple[Part, ...]:
    """The parts of a forest from its host-side node table [K, 4]: own blocks first, they cover each row once."""
    return _plan(node_table.numpy().tobytes())


@lru_cache(maxsize=32)
def _plan(table: bytes) -> tuple[Part, ...]:
    nodes = np.frombuffer(table, dtype=np.int64).reshape(-1, 4)
    ends = np.repeat(nodes[:, 2], nodes[:, 1] - nodes[:, 0])
    causal: dict[tuple[int, ...], list[Block]] = {}
    masked: dict[tuple[int, ...], list[Block]] = {}
    dense: dict[tuple[int, ...], list[Block]] = {}
    shape: tuple[int, ...]
    level: dict[int, int] = {-1: -1}
    covered = 0
    for k, (start, stop, end, parent) in enumerate(nodes.tolist()):
        length, below = stop - start, end - stop
        # Rows below a masked block are in it, and an empty block would not survive the flash call.
        if stop <= covered or not length:
            level[k] = level.get(parent, 0)
            continue
        level[k] = level[parent] + 1
        if below and end - start <= _SMALL:
            masked.setdefault((_rounded(end - start),), []).append((start, end, start, end))
            covered = end
            continue
        shape = (_rounded(length),) if length <= _SMALL else (length, k)
        causal.setdefault(shape, []).append((start, stop, start, stop))
        if below:
            # Two rectangles of one level never share a row, so a call can merge all of its rows at once.
            small = length <= _SMALL and below <= 4 * _SMALL
            shape = (level[k], length, _rounded(below)) if small else (level[k], length, below, k)
            dense.setdefault(shape, []).append((stop, end, start, stop))
    return (*_parts(causal.values(), True), *_parts(masked.values(), True, ends), *_parts(dense.values(), False))


def _rounded(length: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most a third of a padded block is padding."""
    power = 1 << (length - 1).bit_length()
    return 3 * power // 4 if power >= 4 and length <= 3 * power // 4 else power


def _parts(groups: Iterable[list[Block]], own: bool, ends: np.ndarray | None = None) -> list[Part]:
    return [_part(blocks, own, ends) for blocks in groups]


def _part(blocks: list[Block], own: bool, ends: np.ndarray | None) -> Part:
    q_start, q_stop, k_start, k_stop = np.asarray(blocks, dtype=np.int64).T
    steps = np.arange(int((q_stop - q_start).max()))
    queries = np.minimum(q_start[:, None] + steps, q_stop[:, None] - 1)
    keys = queries if own else k_start[:, None] + np.arange(int((k_stop - k_start)[0]))
    real = steps < (q_stop - q_start)[:, None]
    mask = None
    if ends is not None:
        i, j = queries[:, :, None], queries[:, None, :]
        mask = torch.from_numpy(((j <= i) & (i < ends[j]) & real[:, None, :])[:, None])
    single = len(blocks) == 1
    padded = not real.all()
    return Part(
        own=own,
        queries=torch.from_numpy(queries),
        keys=torch.from_numpy(np.ascontiguousarray(keys)),
        mask=mask,
        kept=torch.from_numpy(np.flatnonzero(real.ravel())) if padded else None,
        padding=torch.from_numpy(~real[:, None, :, None]) if padded else None,
        rows=torch.from_numpy(queries[real]),
        query_slice=slice(int(q_start[0]), int(q_stop[0])) if single else None,
        key_slice=slice(int(k_start[0]), int(k_stop[0])) if single else None,
    )
