"""Gradients that come into the CUDA kernels with strides, or other than one."""

import pytest
from incoming_gradient_tests import test_incoming_gradients  # noqa: F401


@pytest.fixture
def name() -> str:
    return "cuda"
