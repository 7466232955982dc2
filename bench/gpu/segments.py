"""segments on a GPU: scans beside a copy of the same bytes, and the CUDA C++ scan beside Triton's."""

from __future__ import annotations

import torch
from clock import Bench
from measure import check
from targets import Found, Target, measures
from test_segments import GAMMA, LAM, gae_by_column, ragged
from torch import Tensor

import rlcore as rl

DENSE = Target("segments.gae", "gae, 512 x 4,096", "bandwidth of a copy of the same bytes", "least", 0.6)
RAGGED = Target("segments.gae_ragged", "gae, the same tokens ragged", "bandwidth of a copy of the same bytes", "least",
                0.6)  # fmt: skip
CUDA = Target("segments.gae_cuda", "gae in CUDA C++", "in Triton")
COPY = Target("segments.copy", "copy bandwidth, 4 GiB", "", unit="TB/s")


@measures(DENSE, RAGGED, CUDA)
def gae(bench: Bench) -> Found:
    B, T = (8, 64) if bench.quick else (512, 4096)
    reward, value = torch.randn(2, B, T, device=bench.device).unbind()
    flat = reward.flatten(), value.flatten()
    offsets = ragged(B, B * T).to(bench.device)
    # Reads two float32 and writes two: the copy reads and writes as much in all.
    source = torch.randn(2, B * T, device=bench.device)
    target = torch.empty_like(source)

    def dense() -> tuple[Tensor, Tensor]:
        return tuple(rl.gae(reward, value, gamma=GAMMA, lam=LAM))

    def in_cuda() -> tuple[Tensor, Tensor]:
        with rl.backend("cuda"):
            return dense()

    def packed() -> tuple[Tensor, Tensor]:
        return tuple(rl.gae(*flat, offsets, gamma=GAMMA, lam=LAM))

    check("gae", dense(), gae_by_column(reward, value), tolerance=1e-4)
    a, b = offsets[1:3].tolist()
    check("gae, ragged", [x[a:b] for x in packed()], [x[0] for x in gae_by_column(*(x[None, a:b] for x in flat))])
    contestants = {"dense": dense, "packed": packed, "copy": lambda: target.copy_(source)}
    cuda = rl.backends()["cuda"]
    if cuda == "live":
        check("gae, CUDA", in_cuda(), dense(), tolerance=1e-4)
        contestants["cuda"] = in_cuda
    race = bench.race(contestants)
    yield DENSE.of_race(race, ["dense"], ["copy"])
    yield RAGGED.of_race(race, ["packed"], ["copy"])
    yield CUDA.of_race(race, ["cuda"], ["dense"], speedup=True) if cuda == "live" else CUDA.missing(cuda)


@measures(COPY)
def copy(bench: Bench) -> Found:
    source = torch.rand(2**10 if bench.quick else 2**30, device=bench.device)
    target = torch.empty_like(source)
    race = bench.race({"copy": lambda: target.copy_(source)}, seconds=1.0)
    yield COPY.number(2 * source.nbytes / min(race.device.of("copy")) / 1e12, "bytes read and written")
