"""The error rule: root mean square error against a float64 oracle, beside that of plain torch in the same dtype."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0


def to_float64(x: Tensor | np.ndarray | float) -> np.ndarray:
    if isinstance(x, Tensor):
        x = x.detach().to(torch.float64).cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def errors(actual: np.ndarray, oracle: np.ndarray) -> tuple[float, float]:
    difference = np.abs(actual - oracle)
    return math.sqrt(np.mean(difference**2)), float(np.max(difference))


def assert_accurate(
    actual: Tensor,
    oracle: Tensor | np.ndarray | float,
    baseline: Tensor | None = None,
    *,
    gradient: bool = False,
    norm: float | None = None,
    name: str = "result",
) -> None:
    """Check `actual` against `oracle` by the rule of the design.

    The root mean square error may be 2x (gradient: 3x) and the maximum error 4x (6x) that of `baseline`, plain torch in
    the same dtype. The floor is 4 * eps * max|oracle|; for gradients also 4 * eps * `norm`, the largest gradient of
    the whole problem. Without a baseline the floor alone holds. NaN anywhere fails unless the oracle has it too.
    """
    x, reference = to_float64(actual), to_float64(oracle)
    assert x.shape == reference.shape, f"{name}: shape {x.shape}, expected {reference.shape}"
    if x.size == 0:
        return
    assert np.array_equal(np.isnan(x), np.isnan(reference)), f"{name}: NaN pattern differs from the oracle's"
    keep = np.isfinite(reference)
    infinite = np.isinf(reference)
    assert np.array_equal(x[infinite], reference[infinite]), f"{name}: infinities differ"
    x, reference = x[keep], reference[keep]
    if x.size == 0:
        return
    eps = torch.finfo(actual.dtype if actual.dtype.is_floating_point else torch.float32).eps
    scale = max(float(np.max(np.abs(reference))), norm or 0.0)
    floor = 4 * eps * scale
    factor = GRADIENT if gradient else FORWARD
    allowed_rms = allowed_max = floor
    if baseline is not None:
        base_rms, base_max = errors(to_float64(baseline)[keep], reference)
        allowed_rms, allowed_max = max(floor, factor * base_rms), max(floor, 2 * factor * base_max)
    rms, maximum = errors(x, reference)
    assert rms <= allowed_rms, f"{name}: rms error {rms:.3g} > {allowed_rms:.3g} (scale {scale:.3g})"
    assert maximum <= max(allowed_max, 2 * allowed_rms), f"{name}: max error {maximum:.3g} > {allowed_max:.3g}"
