"""Where the kernel tests run: on the GPU if there is one, or in Triton's interpreter, on the CPU.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter is a run of its own (`make test` starts it):
TRITON_INTERPRET=1 pytest tests/kernels.
"""

import pytest
import torch

from interpreter import INTERPRETED, bfloat16_as_on_a_gpu

if INTERPRETED:
    bfloat16_as_on_a_gpu()


@pytest.fixture
def device() -> str:
    """The device whose tensors `rl.backend("triton")` takes here."""
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    return "cuda"
