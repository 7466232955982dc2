"""rlcore: fused kernels for reinforcement learning of language models, and the lean loop that trains with them."""

from rlcore.ops.backend import backend, backends

__version__ = "0.1.0"

__all__ = ["__version__", "backend", "backends"]
