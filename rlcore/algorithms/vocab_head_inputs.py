"""What the vocabulary head accepts: shapes, dtypes, autocast, and its numbers as tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlcore.algorithms.vocab_head_passes import Scale
from rlcore.layout_checks import check_zero_one

Number = float | Tensor
FlatHead = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None, Tensor]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Statistics, losses and accumulated gradients are float32; float64 inputs keep float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """The dtype to which F.linear would cast its inputs here, or None outside autocast."""
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Autocast's rule: floating tensors other than float64 take the region's dtype."""
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def as_in_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs as F.linear would use them: cast under autocast, otherwise of one dtype (TypeError)."""
    dtype = autocast_dtype(hidden)
    hidden, weight = cast(hidden, dtype), cast(weight, dtype)
    bias = None if bias is None else cast(bias, dtype)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected dtype {hidden.dtype} like hidden (outside autocast); got {x.dtype}")
    return hidden, weight, bias


def as_number(x: Number, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor. The product, unlike a fill, keeps it out of a compiled graph's constants."""
    if isinstance(x, Tensor):
        return x.detach().to(device=device, dtype=dtype)
    return torch.ones((), dtype=dtype, device=device) * x


def scale_of(hidden: Tensor, temperature: Number, softcap: Number | None, logit_scale: Number) -> Scale:
    """The head's numbers as tensors of the statistics' dtype, temperature flat."""
    dtype, device = statistics_dtype(hidden), hidden.device
    by_row = as_number(temperature, dtype, device)
    return Scale(
        by_row if by_row.dim() == 0 else by_row.reshape(-1),
        None if softcap is None else as_number(softcap, dtype, device),
        as_number(logit_scale, dtype, device),
    )


def flat_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Number,
    softcap: Number | None,
    logit_scale: Number,
    chunk_bytes: int | None,
) -> FlatHead:
    """A head's inputs, checked, by flat rows: hidden, weight, bias, target, mask, temperature, softcap, logit_scale."""
    check_head(hidden, weight, target, bias, mask, temperature, softcap, logit_scale)
    check_chunk_bytes(chunk_bytes)
    scale = scale_of(hidden, temperature, softcap, logit_scale)
    keep = None if mask is None else (mask != 0).reshape(-1)
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias, target.reshape(-1), keep, *scale[:3]


def per_row(temperature: Number, z: Tensor) -> Number:
    """A temperature per row as a column beside logits [..., V]."""
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature.to(z.dtype)[..., None]
    return temperature


# ------------------------------------------------------------------------------------------------ checks


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Number,
    softcap: Number | None,
    logit_scale: Number,
) -> None:
    """Shapes, dtypes and devices of a head's inputs; errors name the argument, what was expected and what came."""
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden: expected shape [N, H] or [B, T, H]; got {tuple(hidden.shape)}")
    H = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != H or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape [V, {H}] with V >= 1 and H of hidden; got {tuple(weight.shape)}")
    check_labels(target, tuple(hidden.shape[:-1]), "hidden without its last axis")
    if bias is not None:
        check_floating("bias", bias)
        V = weight.shape[0]
        if tuple(bias.shape) != (V,):
            raise ValueError(f"bias: expected shape ({V},), one per row of weight; got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("target", target), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name}: expected on {hidden.device} like hidden; got {x.device}")
    as_in_linear(hidden, weight, bias)
    check_mask(mask, target)
    check_temperature(temperature, target, mask)
    if softcap is not None:
        check_number("softcap", softcap, positive=True)
    check_number("logit_scale", logit_scale, positive=False)


def check_scores(logits: Tensor, target: Tensor, mask: Tensor | None, temperature: Number) -> None:
    """The same for logits that exist."""
    check_floating("logits", logits)
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [N, V] or [B, T, V] with V >= 1; got {tuple(logits.shape)}")
    check_labels(target, tuple(logits.shape[:-1]), "logits without their last axis")
    if target.device != logits.device:
        raise ValueError(f"target: expected on {logits.device} like logits; got {target.device}")
    check_mask(mask, target)
    check_temperature(temperature, target, mask)


def check_chunk_bytes(chunk_bytes: int | None) -> None:
    if chunk_bytes is None:
        return
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
        raise TypeError(f"chunk_bytes: expected a whole number of bytes or None; got {type(chunk_bytes).__name__}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected at least 1; got {chunk_bytes}")


def check_overwritable(logits: Tensor) -> None:
    """Whether a backward pass may write the gradient over these logits: its own memory, each element once."""
    check_floating("logits", logits)
    if torch.compiler.is_compiling() or not (logits.requires_grad and torch.is_grad_enabled()):
        return
    for x, what in ((logits, "a leaf"), (logits._base, "a view of a leaf")):
        if x is not None and x.is_leaf and x.requires_grad:
            raise ValueError(
                f"logits: expected the result of an operation with inplace_backward=True; got {what} that requires "
                "grad, which its gradient would overwrite"
            )
    reach = 0  # of the axes with smaller strides
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                "logits: expected elements that share no memory with inplace_backward=True; got shape "
                f"{tuple(logits.shape)} with strides {logits.stride()}"
            )
        reach += stride * (size - 1)


def check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16; got {x.dtype}")


def check_labels(target: Tensor, shape: tuple[int, ...], like: str) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor; got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: expected int64 labels; got {target.dtype}")
    if tuple(target.shape) != shape:
        raise ValueError(f"target: expected shape {shape}, that of {like}; got {tuple(target.shape)}")


def check_mask(mask: Tensor | None, target: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a torch.Tensor or None; got {type(mask).__name__}")
    if mask.shape != target.shape:
        raise ValueError(f"mask: expected shape {tuple(target.shape)} like target; got {tuple(mask.shape)}")
    if mask.device != target.device:
        raise ValueError(f"mask: expected on {target.device} like target; got {mask.device}")
    if mask.dtype != torch.bool:
        check_zero_one("mask", mask)


def check_temperature(temperature: Number, target: Tensor, mask: Tensor | None) -> None:
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        check_number("temperature", temperature, positive=True)
        return
    if temperature.shape != target.shape:
        expected = f"a number or shape {tuple(target.shape)} like target"
        raise ValueError(f"temperature: expected {expected}; got shape {tuple(temperature.shape)}")
    check_constant("temperature", temperature)
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        good = temperature > 0 if mask is None else (temperature > 0) | (mask == 0)
        if not bool(good.all()):
            raise ValueError("temperature: expected values above 0 on unmasked rows; got some that are not")


def check_number(name: str, x: Number, positive: bool) -> None:
    """A finite number (above 0). Tensors on a GPU and numbers inside compiled code are not read."""
    if isinstance(x, Tensor):
        if x.dim():
            raise ValueError(f"{name}: expected a number or a 0-d tensor; got shape {tuple(x.shape)}")
        check_constant(name, x)
        if x.device.type != "cpu":
            return
    elif isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a number; got {type(x).__name__}")
    if torch.compiler.is_compiling():
        return
    if not math.isfinite(x) or (positive and x <= 0):
        raise ValueError(f"{name}: expected a finite number{' above 0' if positive else ''}; got {float(x)}")


def check_constant(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name}: expected a constant; got a tensor that requires grad, and the head gives it none")
