"""Shards of the vocabulary in processes of their own, over gloo, against the oracle and against one whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vocab_head_cases import check_forward, check_further, check_gradients
from vocab_parallel_worker import CASES, ROWS, case_of

from rlcore.algorithms import vocab_head_passes as reference
from rlcore.algorithms import vocab_head_shards as merging
from rlcore.algorithms.vocab_head_passes import RowStatistics

WORKER = Path(__file__).resolve().parents[1] / "vocab_parallel_worker.py"


def run_ranks(count, folder, kind, **environment):
    """What every rank found: one dict of results per rank."""
    command = [sys.executable, str(WORKER)]
    running = [
        subprocess.Popen([*command, str(rank), str(count), str(folder), kind], stderr=subprocess.PIPE, text=True,
                         env=os.environ | environment)
        for rank in range(count)
    ]  # fmt: skip
    errors = [process.communicate(timeout=250)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    return run_ranks(request.param, tmp_path_factory.mktemp("ranks"), "cases")


@pytest.mark.parametrize("name", CASES)
def test_shards_are_one_head(ranks, name):
    case, found = case_of(name), [rank[name] for rank in ranks]
    logp, entropy, *further = found[0][:5]
    d_hidden = found[0][5]
    check_forward(case, logp, entropy)
    check_further(case, *further)
    shards = [torch.cat(parts) for parts in zip(*(x[6:] for x in found), strict=True)]
    check_gradients(case, [d_hidden, *shards])
    for x in found[1:]:
        for y, z in zip(x[:6], found[0], strict=False):
            assert torch.equal(y, z)


def test_a_label_outside_the_whole_vocabulary_has_no_logprob(ranks):
    for rank in ranks:
        assert rank["stray"][0].isnan().tolist() == [True, False, True]


def test_a_row_is_the_same_bits_in_any_batch(tmp_path):
    """Inside batch_invariant(), by the fused kernel in Triton's interpreter."""
    pytest.importorskip("triton")
    for rank in run_ranks(2, tmp_path, "invariant", TRITON_INTERPRET="1"):
        logp, entropy, *parts = rank["invariant"]
        check_forward(case_of("rows"), logp, entropy)
        for i, rows in enumerate(ROWS[1:]):
            assert torch.equal(parts[2 * i], logp[rows]) and torch.equal(parts[2 * i + 1], entropy[rows])


@pytest.mark.parametrize("cuts", [(123,), (1, 123), (40, 80, 123), (122, 123)])
def test_merged_shards(cuts):
    """Shards without a finite logit, also where the label is; in float32 as exact as one pass over all."""
    z = (torch.randn(6, 123) * 8).double()
    z[0, :40], z[1, 100], z[2, :40] = -torch.inf, 300.0, -torch.inf
    target = torch.tensor([50, 100, 0, 122, 40, 39])
    starts = (0, *cuts[:-1])
    shards = [
        reference.block_statistics(z[:, a:b].float(), target - a, True) for a, b in zip(starts, cuts, strict=True)
    ]
    stacked = RowStatistics(*(torch.stack(x) for x in zip(*shards, strict=True)))
    found = merging.merge_shards(stacked, target, torch.tensor(starts), torch.tensor(cuts))
    expected = reference.block_statistics(z, target, True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)
