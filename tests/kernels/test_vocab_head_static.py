"""Launches of the vocabulary head's kernels that differ in their numbers alone compile nothing new."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from interpreter import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))  # after tests, which have names in common

import compile_kernels as static
from static_cases import FAMILIES

from rlcore.kernels import vocab_head as kernels
from rlcore.kernels import vocab_head_fused as fused


def compiled(*compilers) -> list[int]:
    """How often the open `compiling` block has compiled each kernel."""
    return [static.variants(kernel) for kernel in compilers]


@pytest.mark.parametrize("V", [4096, 50257])
def test_a_new_length_temperature_or_slice_compiles_nothing(V):
    def launch(n: int, first: int, temperature: float) -> None:
        """Rows [first, first + n) of a chunk, whose vectors begin at any multiple of four bytes."""
        part = slice(first, first + n)
        logits, vectors, target = torch.empty(64, V), torch.empty(8, 64), torch.zeros(64, dtype=torch.int64)
        numbers = (None, torch.full((64,), temperature)[part], None, torch.ones(()))
        kernels.statistics(logits[part], target[part], *numbers, True)
        stats, d = [x[part] for x in vectors[:4]], [x[part] for x in vectors[4:6]]
        out = kernels.narrower(logits[part], torch.bfloat16)
        kernels.gradient(logits[part], out, target[part], *numbers, tuple(stats), *d)

    with static.compiling("sm_90"):
        launch(16, 0, 1.0)
        assert compiled(kernels.statistics_kernel, kernels.gradient_kernel) == [1, 1]
        for n, first, temperature in ((1, 0, 0.5), (17, 3, 1.5), (7, 1, 1.0), (32, 16, 2.0)):
            launch(n, first, temperature)
        assert compiled(kernels.statistics_kernel, kernels.gradient_kernel) == [1, 1]


def test_a_new_batch_compiles_nothing_in_the_fused_kernel():
    def launch(n: int) -> None:
        vectors, target = torch.empty(64), torch.zeros(64, dtype=torch.int64)
        hidden, weight, one = torch.empty(64, 48), torch.empty(5000, 48), torch.ones(())
        fused.statistics(hidden[-n:], weight, target[-n:], None, None, vectors[-n:], None, one, False)

    with static.compiling("sm_90"):
        launch(16)
        assert compiled(fused.tile_statistics_kernel, fused.merge_kernel) == [1, 1]
        for n in (1, 7, 64):
            launch(n)
        assert compiled(fused.tile_statistics_kernel, fused.merge_kernel) == [1, 1]


def test_float32_is_not_multiplied_in_tf32():
    """NVIDIA's tensor cores have no float32; a mask of 8 bits once made the compiler take operands for upcast ones."""
    label = "fused float32 masked bias entropy"
    for facts in static.compile_family({label: FAMILIES["vocab_head"][label]}, "sm_100")[label]:
        assert facts.tensor_core == 0


def test_rows_at_multiples_of_16_bytes_are_read_16_bytes_at_once(monkeypatch):
    assembly = []
    facts = static.facts
    monkeypatch.setattr(static, "facts", lambda *a: (assembly.append(a[1].asm["ptx"]), facts(*a))[1])
    for label in ("statistics bfloat16", "gradient bfloat16", "gradient float32 to bfloat16 entropy"):
        static.compile_family({label: FAMILIES["vocab_head"][label]}, "sm_90")
    for ptx in assembly:
        assert "ld.global.v4.b32" in ptx
