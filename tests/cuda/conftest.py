"""Where the tests of the CUDA kernels run: on the GPU if there is one and `rlcore._cuda` is built, or emulated."""

from __future__ import annotations

import emulated
import pytest
import torch

from rlcore.ops import backend


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device whose tensors `rl.backend("cuda")` takes here."""
    if torch.cuda.is_available() and backend.backends()["cuda"] == "live":
        return "cuda"
    module = emulated.module()
    monkeypatch.setattr(backend, "_cuda", lambda: module)
    monkeypatch.setattr(backend, "_cuda_state", lambda: "live")
    return "cpu"
