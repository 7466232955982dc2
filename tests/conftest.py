"""Shared test settings: one thread, fixed seeds, and NaN in every uninitialized tensor."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def poison_uninitialized_memory():
    """`torch.empty` returns NaN (or the largest integer), so that a read before a write shows in the result."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
