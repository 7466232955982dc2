"""Gradients that come into the Triton kernels with strides, or other than one."""

import pytest
from incoming_gradient_tests import OTHERS, check, test_incoming_gradients  # noqa: F401

pytest.importorskip("triton")


@pytest.fixture
def name() -> str:
    return "triton"


@pytest.mark.parametrize("function", OTHERS)
def test_incoming_gradients_of_the_other_families(name, device, function):
    check(function, OTHERS[function], name, device)
