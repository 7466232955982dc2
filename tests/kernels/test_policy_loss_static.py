"""What the compiler makes of the policy loss in Triton: one variant for all numbers, and a count that orders."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import rlcore as rl
from interpreter import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))  # after tests, which have names in common

import compile_kernels as static
from static_cases import FAMILIES

from rlcore.kernels.policy_loss import policy_loss_kernel
from rlcore.kernels.policy_loss_units import policy_units_kernel
from rlcore.ops.policy_loss_triton import evaluate


def test_no_number_length_or_cut_compiles_again():
    def case(n, start, clip, length):
        objective = rl.Objective("segment", clip=clip, kl=rl.KL("k3", clip[0]), dual_clip=length + 1, length=length,
                                 aggregate="seq_mean_token_sum_norm")  # fmt: skip
        x = torch.rand(n + start)
        batch = rl.TokenBatch(
            torch.zeros(n, dtype=torch.int64), torch.tensor([0, n]), advantage=x[start:], old_logp=x[start:],
            ref_logp=x[start:], mask=torch.ones(n + start, dtype=torch.bool)[start:],
            segment=torch.zeros(n, dtype=torch.int64),
        )  # fmt: skip
        return x[start:], None, batch, objective, (True, False)

    lengths = [case(4096, 0, (0.2, 0.2), 9.0), case(1, 0, (0.1, 0.3), 1.0), case(77, 3, (0.0, 1.0), 16.0),
               case(400_000, 1, (1.0, 2.0), 2.0)]  # fmt: skip
    with static.compiling("sm_90"):
        for length in lengths:
            evaluate(*length)
            assert [static.variants(kernel) for kernel in (policy_loss_kernel, policy_units_kernel)] == [1, 1]


# What the assembly says of memory, and where all threads meet; then how the count has to lie among it.
SEEN = {
    "sm_90": r"\b(?:bar\.sync|atom\.\S+|st\.global\S*|ld\.global\.\S+)",
    "gfx942": r"\b(?:s_barrier|global_atomic_add|global_store_\w+|buffer_wbl2 sc1|buffer_inv sc1|s_waitcnt vmcnt\(0\))",
}
COUNT = {
    "sm_90": "bar.sync atom.global.gpu.acq_rel.add.u32 bar.sync",
    "gfx942": "s_barrier buffer_wbl2 sc1 s_waitcnt vmcnt(0) global_atomic_add"
    " s_waitcnt vmcnt(0) buffer_inv sc1 s_barrier",
}


@pytest.mark.parametrize("target", SEEN)
def test_what_programs_leave_is_seen_by_the_one_that_counts_last(target, monkeypatch):
    """Partial results are out before the count; the last program's other threads, and caches, wait for it."""
    assembly, facts = [], static.facts
    text = lambda kernel: kernel.asm["amdgcn" if target == "gfx942" else "ptx"]  # noqa: E731
    monkeypatch.setattr(static, "facts", lambda *a: (assembly.append(text(a[1])), facts(*a))[1])
    static.compile_family({"": FAMILIES["policy_loss"]["token ppo"]}, target)
    seen = re.findall(SEEN[target], assembly[0])
    before, after = " ".join(seen).split(COUNT[target])
    if target == "sm_90":  # not through the first level cache, which may hold what was there before
        assert "ld.global.cg" in after and "ld.global.cg" not in before
