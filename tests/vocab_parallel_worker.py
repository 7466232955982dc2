"""One rank of the vocabulary-parallel tests: `python vocab_parallel_worker.py RANK RANKS FOLDER cases|invariant`.

Runs every case on this rank's shard, or the batch-invariant one, and saves the results to FOLDER/RANK.pt.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from vocab_head_cases import coefficients, make

import rlcore as rl
from rlcore.algorithms import vocab_head_chunks as chunks

V = 123
SHARDS = {2: (0, 50, V), 3: (0, 1, 70, V)}  # of uneven sizes
CASES = {
    "plain": {"setting": "plain"},
    "rows": {"setting": "rows", "masked": 0.3},
    "peaked": {"data": "peaked", "setting": "bias"},
    "forbidden": {"data": "forbidden", "setting": "softcap", "masked": 0.3},
    "float64": {"setting": "rows", "dtype": torch.float64, "masked": 0.3},
    "bfloat16": {"setting": "bias", "dtype": torch.bfloat16},
    "padded": {"setting": "rows", "shape": (3, 17), "masked": 0.3},
}
ROWS = (slice(None), [3], list(range(5, 20)), [46, 20, 14, 8, 2])


def case_of(name: str):
    case = make(**CASES[name])
    if case.mask is not None:
        case.hidden[~case.mask], case.target[~case.mask] = torch.nan, -100
    return case


def run(case, part: slice):
    bias = None if case.bias is None else case.bias[part]
    own = replace(case, weight=case.weight[part], bias=bias).fresh()
    out = rl.vocab_parallel_logprob(own.hidden, own.weight, own.target, part.start, entropy=True, statistics=True,
                                    **own.kwargs(), chunk_bytes=20 * V * 4)  # fmt: skip
    return [*out, *torch.autograd.grad(out[:2], own.leaves, coefficients(case))]


def invariant(part: slice):
    """logp and entropy of all rows, then of some of them, without logits in memory."""
    chunks.forward_chunks = None
    case, found = case_of("rows"), []
    for rows in ROWS:
        some = replace(case, hidden=case.hidden[rows], target=case.target[rows], mask=case.mask[rows],
                       temperature=case.temperature[rows])  # fmt: skip
        with rl.backend("triton"), rl.batch_invariant():
            found += run(some, part)[:2]
    return found


if __name__ == "__main__":
    rank, ranks, folder, kind = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    borders = SHARDS[ranks]
    part = slice(borders[rank], borders[rank + 1])
    if kind == "invariant":
        found = {"invariant": invariant(part)}
    else:
        found = {name: run(case_of(name), part) for name in CASES}
        stray = torch.tensor([V, 5, -1])
        found["stray"] = [rl.vocab_parallel_logprob(torch.ones(3, 4), torch.ones(part.stop - part.start, 4),
                                                    stray, part.start).logp]  # fmt: skip
    torch.save({name: [x.detach() for x in xs] for name, xs in found.items()}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
