"""What is compiled without a GPU: per family, launches of its kernels as they ship, over dtypes and head sizes.

Nothing is computed, so tensors are empty ones on the CPU. `make test` compiles the cases of QUICK, which have every
kernel once; `make test-full` and `make static` compile all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Case = Callable[[], Any]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def segments() -> dict[str, Case]:
    return reductions() | scans()


def reductions() -> dict[str, Case]:
    from rlcore.kernels.segments import segment_reduce
    from rlcore.kernels.segments_advantage import group_advantage
    from rlcore.kernels.segments_rank import segment_rank, segment_topk

    rows, long, short = 4096, torch.zeros(5, dtype=torch.int64), torch.zeros(65, dtype=torch.int64)
    order, mask = torch.zeros(rows, dtype=torch.int64), empty(rows, dtype=torch.bool)
    cases: dict[str, Case] = {}

    def add(kind: str, dtype: torch.dtype, offsets: Tensor, *given: Tensor | None) -> None:
        name = f"{kind} {str(dtype).removeprefix('torch.')} {'short' if offsets is short else 'long'}"
        x = empty(rows, dtype=dtype)
        cases[name + (" full" if given else "")] = lambda: segment_reduce(kind, x, offsets, *given)

    for kind in ("sum", "mean", "std", "min", "max", "count"):
        add(kind, torch.float32, long, order, mask)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        add("sum", dtype, long)
        add("std", dtype, short, order, mask)
    add("scope", torch.float32, long, order, mask, empty(rows))
    for name, x in (("float32", empty(rows)), ("bfloat16", empty(rows, dtype=torch.bfloat16))):
        cases[f"rank {name}"] = lambda x=x: segment_rank(x, long)
        cases[f"topk {name} full"] = lambda x=x: segment_topk(x, 3, long, order, mask)
    reward = empty(rows)
    for center, scale in (("group", "group"), ("leave_one_out", "none"), ("batch", "batch"), ("none", "batch")):
        cases[f"advantage {center} {scale}"] = lambda center=center, scale=scale: group_advantage(
            reward, order, center, scale, False, 1.0, 1e-6, reward, mask, torch.float32
        )
    return cases


def scans() -> dict[str, Case]:
    from rlcore.kernels.segments_linear import linear_scan
    from rlcore.kernels.segments_scan import reverse_scan

    def case(kind: str, inputs: int, sequences: int, dtype: torch.dtype, full: bool, rows: int = 4096) -> Case:
        xs = tuple(empty(rows, dtype=dtype) for _ in range(inputs))
        offsets, mask = torch.zeros(sequences + 1, dtype=torch.int64), empty(rows, dtype=torch.bool)
        rest = (mask, empty(sequences), xs[0], xs[0]) if full else (None, None, 0.9, 0.9)
        return lambda: reverse_scan(kind, xs, sequences, offsets if full else None, *rest)

    cases = {}
    for kind, inputs in (("return", 1), ("gae", 2), ("vtrace", 3)):
        for name, sequences, rows in (("short", 64, 4096), ("long", 4, 4096), ("parts", 4, 1 << 18)):
            cases[f"{kind} {name} full"] = case(kind, inputs, sequences, torch.float32, True, rows)
    cases["gae long"] = case("gae", 2, 4, torch.float32, False)
    for dtype in (torch.bfloat16, torch.float16):
        cases[f"gae long full {str(dtype).removeprefix('torch.')}"] = case("gae", 2, 4, dtype, True)
    for dtype in (torch.float64, torch.float32):
        x, last = empty(4096, dtype=dtype), empty(4096, dtype=torch.bool)
        cases[f"linear {str(dtype).removeprefix('torch.')}"] = lambda x=x, last=last: linear_scan(x, x, last)
    return cases


def prefix_attention() -> dict[str, Case]:
    def launch(dtype: torch.dtype, D: int, sink: Tensor | None, window: int | None, softcap: float | None) -> None:
        from rlcore.kernels import prefix_attention as forward
        from rlcore.kernels import prefix_attention_backward as backward
        from rlcore.kernels import prefix_attention_keys as keys

        q, do, o = (empty(256, 8, D, dtype=dtype) for _ in range(3))
        k, v = (empty(256, 2, D, dtype=dtype) for _ in range(2))
        end = position = torch.zeros(256, dtype=torch.int64)
        items, segments, splits = (torch.zeros(1, n, dtype=torch.int64) for n in (5, 2, 3))
        work, options = (items, segments), (0.1, window, softcap)
        _, lse = forward.prefix_attention_forward(
            q, k, v, end, position, *work, sink, *options, forward.forward_blocks(D, dtype)
        )
        rows = do, q, k, v, *backward.prefix_attention_delta(do, q, o, lse), end, position
        backward.prefix_attention_dq(*rows, *work, *options, backward.query_blocks(D, dtype))
        keys.prefix_attention_dkdv(*rows, *work, splits, 1, *options, keys.key_blocks(D, dtype))

    plain, full = (None, None, None), (empty(8), 9, 2.0)
    return {
        f"{str(dtype).removeprefix('torch.')} head size {D}{label}": partial(launch, dtype, D, *options)
        for dtype, D in itertools.product((torch.bfloat16, torch.float16, torch.float32), (64, 128, 256))
        for label, options in (("", plain), (" sink, window, softcap", full))
    }


def policy_loss() -> dict[str, Case]:
    import rlcore as rl
    from rlcore.ops.policy_loss_triton import evaluate

    def case(full: bool, dtype: torch.dtype, ratio: str, surrogate: str, estimator: str, aggregate: str) -> Case:
        field = lambda: empty(4096, dtype=dtype)  # noqa: E731
        objective, batch = rl.Objective(ratio, surrogate), {}
        if full:
            objective = rl.Objective(ratio, surrogate, dual_clip=3.0, correction=rl.TIS(), kl=rl.KL(estimator),
                                     entropy=0.1, aggregate=aggregate, length=9.0)  # fmt: skip
            names = ("ref_logp", "rollout_logp", "weight", "clip_low", "clip_high")
            masks = {name: torch.ones(4096, dtype=torch.bool) for name in ("mask", "kl_mask")}
            batch = {name: field() for name in names} | masks
        offsets = torch.tensor([0, 4096])
        rows = rl.TokenBatch(
            torch.zeros(4096, dtype=torch.int64), offsets, advantage=field(), old_logp=field(),
            segment=torch.zeros(4096, dtype=torch.int64), **batch,
        )  # fmt: skip
        return lambda: evaluate(empty(4096), empty(4096) if full else None, rows, objective, (True, full))

    shapes = [("token", "ppo", "k1"), ("token", "ppo", "k2"), ("token", "ppo", "k3"), ("token", "cispo", "k3"),
              ("token", "reinforce", "k3"), ("none", "reinforce", "k3"), ("sequence", "reinforce", "k3"),
              ("segment", "ppo", "k3")]  # fmt: skip
    cases = {" ".join((*shape, "full")): case(True, torch.float32, *shape, "token_mean") for shape in shapes}
    cases["sequence ppo full"] = case(True, torch.float32, "sequence", "ppo", "k3", "seq_mean_token_mean")
    cases["sequence ppo full bfloat16"] = case(True, torch.bfloat16, "sequence", "ppo", "k3", "token_mean")
    cases["token ppo"] = case(False, torch.float32, "token", "ppo", "", "")
    return cases


def vocab_head() -> dict[str, Case]:
    from rlcore.kernels import vocab_head as kernels
    from rlcore.kernels import vocab_head_fused as fused

    n, H, V = 512, 4096, 151936
    one, bias, mask, target = torch.ones(()), empty(V), empty(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
    stats = tuple(empty(n) for _ in range(4))

    further = (target, empty(n))

    def statistics(logits: Tensor, entropy: bool, *head: Tensor | None, more: Any = None) -> Any:
        return kernels.statistics(logits, target, *head, entropy, more)

    def gradient(logits: Tensor, entropy: bool, *head: Tensor | None, dtype: torch.dtype | None = None) -> Any:
        out = kernels.narrower(logits, dtype or logits.dtype)
        return kernels.gradient(logits, out, target, *head, stats, stats[0], stats[1] if entropy else None)

    # entropy, bias, temperature, softcap, logit scale
    heads = {"": (False, None, one, None, one), " bias softcap entropy": (True, bias, empty(n), one, one)}
    cases: dict[str, Case] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name, logits = str(dtype).removeprefix("torch."), empty(n, V, dtype=dtype)
        h, w = empty(n, H, dtype=dtype), empty(V, H, dtype=dtype)
        for label, head in heads.items():
            cases[f"statistics {name}{label}"] = partial(statistics, logits, *head)
            cases[f"gradient {name}{label}"] = partial(gradient, logits, *head)
        if dtype != torch.float32:
            cases[f"gradient float32 to {name} entropy"] = partial(
                gradient, empty(n, V), True, None, one, None, one, dtype=dtype
            )
        run = partial(fused.statistics, h, w, target)
        cases[f"fused {name}"] = partial(run, None, None, one, None, one, False)
        cases[f"fused {name} masked bias entropy"] = partial(run, mask, bias, empty(n), None, one, True)
        cases[f"fused {name} masked softcap entropy"] = partial(run, mask, None, empty(n), one, one, True)
        label, head = " bias softcap entropy", heads[" bias softcap entropy"]
        cases[f"statistics {name}{label} top-1"] = partial(statistics, logits, *head, more=further)
        cases[f"fused {name} masked bias entropy top-1"] = partial(run, mask, bias, empty(n), None, one, True, further)
        run = partial(run, mask, None, empty(n), one, one, True)
        cases[f"fused {name} masked softcap entropy top-1"] = partial(run, further)
    # Rows of a vocabulary of odd size: no wide loads.
    cases["statistics float32 odd"] = partial(statistics, empty(n, 50257), True, None, one, None, one)
    cases["gradient float32 odd"] = partial(gradient, empty(n, 50257), True, None, one, None, one)
    return cases


FAMILIES = {
    "segments": segments(),
    "prefix_attention": prefix_attention(),
    "policy_loss": policy_loss(),
    "vocab_head": vocab_head(),
}
QUICK = {
    "segments": ["scope float32 long full", "topk bfloat16 full", "advantage leave_one_out none", "vtrace parts full",
                 "linear float64"],
    "prefix_attention": ["bfloat16 head size 128"],
    "policy_loss": ["sequence ppo full"],
    "vocab_head": ["statistics float32 bias softcap entropy top-1", "gradient float32 to bfloat16 entropy",
                   "fused bfloat16 masked bias entropy"],
}
