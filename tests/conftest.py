"""Shared test settings: one thread, fixed seeds, and NaN in every uninitialized tensor."""

import os
from contextlib import suppress

import pytest
import torch

# Imported by tests, not one themselves.
pytest.register_assert_rewrite("policy_loss_kernel_tests", "incoming_gradient_tests")

with suppress(ModuleNotFoundError):  # a machine with a GPU may lack it: tests that need it are not collected there
    from hypothesis import settings

    # The same examples in every run, as of all other tests. HYPOTHESIS_PROFILE=default looks for new ones.
    settings.register_profile("fixed", derandomize=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


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
