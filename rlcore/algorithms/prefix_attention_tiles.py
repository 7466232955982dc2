"""Which tiles the programs of a GPU walk over a packed forest: host-side, from the node table, once per tree.

A lane is one query head of one row; the `group` query heads of a key head lie side by side, so lane l belongs to row
l // group. A query tile is `lanes` lanes of one key head, a key tile `keys` rows.

A query tile that begins in row i sees keys on i's path to the root and in its own rows, nothing else. Its keys are
covered from below upwards by intervals of `keys` rows, the next one ending at the last row of the path that is not yet
covered: no cover needs fewer. The queries of a key tile are one range of rows (under a window the first rows of every
run below), covered from its start. An interval is full where all queries of the tile see all its keys; only the others
are masked. Equal neighbours become one segment, so that a program loops over few of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# A key tile of a long prefix has far more steps than others. No item takes more than half of what each of the 132
# processors of an H100 or H200 has to do on average, so that with the longest first they finish together; splitting
# further would only cost memory. Nothing is split below 32 steps, where starting a program and adding up would weigh.
_ITEMS = 264
_LEAST_STEPS = 32

Found = list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


class Work(NamedTuple):
    """items [W, 5] int64, longest first: tile, slot (-1: none), and segments a:b, which are full, and b:c, masked.

    segments [S, 2] int64: first row or lane, number of steps.
    A tile with too many steps is split into items that have a slot each, for their partial sums: splits [T, 3] int64:
    tile, its first slot, their number. Slots of a tile are neighbours, in the order of the steps.
    """

    items: np.ndarray
    segments: np.ndarray
    splits: np.ndarray

    @property
    def slots(self) -> int:
        return int(self.splits[:, 2].sum())


class _Runs(NamedTuple):
    start: np.ndarray
    stop: np.ndarray
    end: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    """of the first row"""


def query_work(table: np.ndarray, group: int, lanes: int, keys: int, window: int | None) -> Work:
    """For every query tile the tiles of keys it sees. table: the node table [K, 4] of a PrefixTree."""
    runs = _runs(table)
    M = int(runs.stop[-1])
    tile = np.arange(-(-M * group // lanes))
    first = tile * lanes // group
    last = np.minimum((tile * lanes + lanes - 1) // group + 1, M)
    shallow, deep = _extremes(_depths(runs), first, last)
    found: Found = []
    steps = -(-(last - first) // keys)
    cover = last - steps * keys
    _add(found, tile, True, cover, steps)
    node, top = np.searchsorted(runs.start, first, side="right") - 1, first
    while len(tile):
        top = np.minimum(top, cover)
        low = clear = runs.start[node]
        if window is not None:  # no query sees a row above low, every query sees those from clear on
            low = np.maximum(low, low + shallow - window + 1 - runs.depth[node])
            clear = np.maximum(clear, clear + deep - window + 1 - runs.depth[node])
        full = np.where(runs.end[node] >= last, np.maximum(top - clear, 0) // keys, 0)
        masked = -(-np.maximum(top - full * keys - low, 0) // keys)
        _add(found, tile, False, top - full * keys, full)
        _add(found, tile, True, top - (full + masked) * keys, masked)
        cover = np.minimum(cover, top - (full + masked) * keys)
        above = runs.parent[node]
        # Above a row that lies before every window there are only more of them.
        on = (above >= 0) & (low <= runs.start[node])
        tile, last, shallow, deep, cover, node = (x[on] for x in (tile, last, shallow, deep, cover, above))
        top = runs.stop[node]
    return _pack(found, keys, None)


def key_work(table: np.ndarray, group: int, lanes: int, keys: int, window: int | None, heads: int) -> Work:
    """For every key tile the tiles of lanes that see it; long ones are split by the work of all `heads` key heads."""
    runs = _runs(table)
    M = int(runs.stop[-1])
    tile = np.arange(-(-M // keys))
    first, last = tile * keys, np.minimum(tile * keys + keys, M)
    nearest, furthest = _extremes(np.repeat(runs.end, runs.stop - runs.start), first, last)
    if window is None:
        # Depths do not matter: all rows are one run.
        shallow = deep = reach = np.zeros_like(first)
        runs = _Runs(*(np.array([x]) for x in (0, M, M, -1, 0)))
    else:
        shallow, deep = _extremes(_depths(runs), first, last)
        reach = np.full_like(first, window)
    found: Found = []
    cover = first * group
    node = np.searchsorted(runs.start, first, side="right") - 1
    while len(tile):
        start, stop = runs.start[node], runs.stop[node]
        # Rows of the run that some key of the tile may be seen by, and those that see all of its keys.
        seen = np.minimum(np.minimum(stop, furthest), _within(start, runs.depth[node], deep, reach, window))
        clear = np.minimum(np.minimum(seen, nearest), _within(start, runs.depth[node], shallow, reach, window))
        low, high = np.maximum(start * group, cover), seen * group
        head = -(-np.maximum((last - 1) * group - low, 0) // lanes)
        full = np.maximum(clear * group - (low + head * lanes), 0) // lanes
        head = np.where(full > 0, head, 0)
        middle = low + (head + full) * lanes
        tail = -(-np.maximum(high - middle, 0) // lanes)
        _add(found, tile, True, low, head)
        _add(found, tile, False, low + head * lanes, full)
        _add(found, tile, True, middle, tail)
        cover = np.where(high > low, middle + tail * lanes, cover)
        # A run that begins beyond the window has nothing below it that lies within.
        outside = _within(start, runs.depth[node], deep, reach, window) <= start
        node = np.where(outside, np.searchsorted(runs.start, runs.end[node]), node + 1)
        on = node < len(runs.start)
        on[on] &= runs.start[node[on]] < furthest[on]
        tile, last, nearest, furthest, shallow, deep, reach, cover, node = (
            x[on] for x in (tile, last, nearest, furthest, shallow, deep, reach, cover, node)
        )
    total = sum(int(steps.sum()) for *_, steps in found)
    return _pack(found, lanes, max(-(-total * heads // _ITEMS), _LEAST_STEPS))


def _within(
    start: np.ndarray, depth: np.ndarray, of_key: np.ndarray, reach: np.ndarray, window: int | None
) -> np.ndarray:
    """The row of a run from which on rows are `reach` or more below a key of depth `of_key`."""
    return np.full_like(start, np.iinfo(np.int64).max) if window is None else start + of_key + reach - depth


def _runs(table: np.ndarray) -> _Runs:
    start, stop, end, parent = table.T
    whole = start[0] == 0 and (start[1:] == stop[:-1]).all() and (start <= stop).all()
    if not (whole and (stop <= end).all() and (end <= stop[-1]).all() and (parent < np.arange(len(table))).all()):
        raise ValueError("node_table: expected runs (start, stop, end, parent) of a packed forest, in order")
    depth = [0]
    lengths = (stop - start).tolist()
    for above in parent.tolist()[1:]:
        depth.append(depth[above] + lengths[above] if above >= 0 else 0)
    return _Runs(start, stop, end, parent, np.asarray(depth))


def _depths(runs: _Runs) -> np.ndarray:
    """[M] of every row."""
    return np.repeat(runs.depth - runs.start, runs.stop - runs.start) + np.arange(runs.stop[-1])


def _extremes(x: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest of x[first:last], for many ranges."""
    ranges = np.stack([first, last], axis=1).ravel()
    x = np.r_[x, x[-1]]
    return np.minimum.reduceat(x, ranges)[::2], np.maximum.reduceat(x, ranges)[::2]


def _add(found: Found, tile: np.ndarray, masked: bool, start: np.ndarray, steps: np.ndarray) -> None:
    some = steps > 0
    found.append((tile[some], np.full(int(some.sum()), masked), start[some], steps[some]))


def _pack(found: Found, stride: int, limit: int | None) -> Work:
    """Segments by tile, full ones first, tiles of more than `limit` steps split evenly."""
    tile, masked, start, steps = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((start, masked, tile))
    tile, masked, start, steps = (x[order] for x in (tile, masked, start, steps))
    total = np.bincount(tile, steps).astype(np.int64)
    size = total if limit is None else -(-total // -(-total // limit))
    parts = -(-total // size)
    done = np.cumsum(steps) - steps
    done -= (np.cumsum(total) - total)[tile]
    # A segment is cut where a part ends: its steps done:done + steps of the tile into multiples of the part's size.
    pieces = (done + steps - 1) // size[tile] - done // size[tile] + 1
    piece = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    tile, masked, start, steps, done = (np.repeat(x, pieces) for x in (tile, masked, start, steps, done))
    part = done // size[tile] + piece
    begin, stop = np.maximum(done, part * size[tile]), np.minimum(done + steps, (part + 1) * size[tile])
    segments = np.stack([start + (begin - done) * stride, stop - begin], axis=1)

    item = (np.cumsum(parts) - parts)[tile] + part
    end = np.cumsum(np.bincount(item))
    full = np.bincount(item, ~masked).astype(np.int64)
    first = np.r_[0, end[:-1]]
    tile_of = np.repeat(np.arange(len(total)), parts)
    split = parts[tile_of] > 1
    slot = np.where(split, np.cumsum(split) - 1, -1)
    longest = np.argsort(-np.bincount(item, stop - begin), kind="stable")
    items = np.stack([tile_of, slot, first, first + full, end], axis=1)[longest]
    cut = np.flatnonzero(parts > 1)
    splits = np.stack([cut, np.cumsum(parts[cut]) - parts[cut], parts[cut]], axis=1)
    return Work(items.astype(np.int64), segments.astype(np.int64), splits.astype(np.int64))
