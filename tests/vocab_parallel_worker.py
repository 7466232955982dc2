"""One rank of the vocabulary-parallel tests: `python vocab_parallel_worker.py RANK RANKS FOLDER`.

Runs every case on this rank's shard and saves the results to FOLDER/RANK.pt.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from vocab_head_cases import coefficients, make

import rlcore as rl

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


def case_of(name: str):
    case = make(**CASES[name])
    if case.mask is not None:
        case.hidden[~case.mask], case.target[~case.mask] = torch.nan, -100
    return case


def run(name: str, part: slice):
    case = case_of(name)
    bias = None if case.bias is None else case.bias[part]
    own = replace(case, weight=case.weight[part], bias=bias).fresh()
    out = rl.vocab_parallel_logprob(own.hidden, own.weight, own.target, part.start, entropy=True, statistics=True,
                                    **own.kwargs(), chunk_bytes=20 * V * 4)  # fmt: skip
    return [*out, *torch.autograd.grad(out[:2], own.leaves, coefficients(case))]


if __name__ == "__main__":
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    borders = SHARDS[ranks]
    found = {name: run(name, slice(borders[rank], borders[rank + 1])) for name in CASES}
    stray = torch.tensor([V, 5, -1])
    found["stray"] = [rl.vocab_parallel_logprob(torch.ones(3, 4), torch.ones(borders[rank + 1] - borders[rank], 4),
                                                stray, borders[rank]).logp]  # fmt: skip
    torch.save({name: [x.detach() for x in xs] for name, xs in found.items()}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
