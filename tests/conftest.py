"""Shared test settings: one thread, fixed seeds, and NaN in every uninitialized tensor."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def poison_uninitialized_memory():
    """`torch.empty` returns NaN (or the largest integer), so that a read before a write shows in the result."""
    # On a GPU torch has no deterministic form of some functions that the references call: there it warns. That ours
    # give the same bits again is tested by running them twice.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
