"""prefix_attention on a GPU: one packed tree beside torch's flash attention on the prompt repeated per response."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from clock import Bench
from measure import check
from targets import Found, Target, measures
from test_prefix_attention import packed_rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import rlcore as rl

OURS = "prefix_attention forward and backward, P 4,096, S 1,024, G 8, 32/8 heads of 128, bf16"
FLASH = "torch's flash attention, repeated batch"
RATE = Target("prefix_attention.rate", f"{OURS}: useful FLOP/s", FLASH, "least", 0.95)
WALL = Target("prefix_attention.wall", f"{OURS}: wall clock", FLASH, "least", 2.1, call=True)
CUDNN = Target("prefix_attention.cudnn", f"{OURS}: device time", "cuDNN's attention, repeated batch")
COMPOSED = Target("prefix_attention.composed", f"{OURS}: device time", "our composition of flash attention calls")


@measures(RATE, WALL, CUDNN, COMPOSED)
def tree_beside_repeated_batch(bench: Bench) -> Found:
    P, S, G, heads, kv_heads, D = (16, 8, 2, 4, 2, 16) if bench.quick else (4096, 1024, 8, 32, 8, 128)
    make = {"device": bench.device, "dtype": torch.bfloat16}
    tree = rl.PrefixTree.from_groups([[1] * P], [[[2] * S] * G]).to(bench.device)
    rows = packed_rows(1, G, P, S).to(bench.device)
    leaves = [torch.randn(tree.M, h, D, **make, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    weight = torch.randn(G, S, heads, D, **make)  # the loss reads response rows alone
    packed_weight = torch.zeros(tree.M, heads, D, **make)
    packed_weight[rows[:, P:]] = weight
    padded_weight = F.pad(weight, (0, 0, 0, 0, P, 0)).transpose(1, 2)
    # The copies of the prompt are not part of the baseline's time.
    repeated = [x.detach()[rows].transpose(1, 2).contiguous().requires_grad_() for x in leaves]

    def ours() -> tuple[Tensor, ...]:
        o = rl.prefix_attention(*leaves, tree)
        return torch.autograd.grad(o, leaves, packed_weight)

    def composed() -> tuple[Tensor, ...]:
        with rl.backend("native"):
            return ours()

    def torch_by(kind: SDPBackend) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            with sdpa_kernel(kind):
                o = F.scaled_dot_product_attention(*repeated, is_causal=True, enable_gqa=True)
            return torch.autograd.grad(o, repeated, padded_weight)

        return run

    def summed(gradients: tuple[Tensor, ...]) -> list[Tensor]:
        """Of the copies of each token."""
        zeros = (torch.zeros_like(x, dtype=torch.float32) for x in leaves)
        return [z.index_put((rows,), g.transpose(1, 2).float(), accumulate=True) for z, g in zip(zeros, gradients)]

    flash = torch_by(SDPBackend.FLASH_ATTENTION)
    check(FLASH, ours(), summed(flash()), tolerance=2e-2)
    contestants, left_out = {"ours": ours, "flash": flash}, {}
    for name, function in (("cudnn", torch_by(SDPBackend.CUDNN_ATTENTION)), ("composed", composed)):
        try:
            found = function()
            check(name, summed(found) if name == "cudnn" else found, ours(), tolerance=2e-2)
            contestants[name] = function
        except (RuntimeError, AssertionError) as error:
            left_out[name] = f"{error}".splitlines()[0][:200]
    race = bench.race(contestants, seconds=6.0)
    pairs_of_tree, pairs_of_copies = P**2 / 2 + G * (P * S + S**2 / 2), G * (P + S) ** 2 / 2
    rate = 3.5 * 4 * D * heads * pairs_of_tree / min(race.device.of("ours")) / 1e12
    yield RATE.of_race(race, ["ours"], ["flash"], f"{rate:.0f} TFLOP/s", pairs_of_tree / pairs_of_copies)
    yield WALL.of_race(race, ["ours"], ["flash"])
    for name, target in (("cudnn", CUDNN), ("composed", COMPOSED)):
        if name in left_out:
            yield target.missing(left_out[name])
        else:
            yield target.of_race(race, ["ours"], [name], speedup=True)
