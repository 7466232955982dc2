"""Random numbers that need no state: every stream is a hash of the run's seed and what it is for.

A stream named by `(seed, "rollout", step)` is the same after a crash as before it, whatever else was drawn in between,
so a checkpoint holds no generator states and a resumed run repeats the interrupted one exactly.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(*name: object) -> int:
    """A 63-bit seed from the parts of a name, e.g. `seed_of(config.seed, "rollout", step)`."""
    digest = hashlib.sha256("\x1f".join(map(str, name)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*name: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded with `seed_of(*name)`."""
    return torch.Generator(device=device).manual_seed(seed_of(*name))


def permutation(size: int, *name: object) -> list[int]:
    """A permutation of range(size), the same on every device."""
    return torch.randperm(size, generator=generator(*name)).tolist()
