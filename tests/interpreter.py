"""Whether this run interprets Triton's kernels on the CPU instead of compiling them, and bfloat16 as GPUs do it.

Triton's interpreter holds bfloat16 as 16-bit integers. It rounds to it by cutting off, and multiplies matrices of it as
integers; `bfloat16_as_on_a_gpu` mends both.
"""

import os

import numpy as np

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def bfloat16_as_on_a_gpu() -> None:
    """From now on: rounding to the nearest, ties to even; products of bfloat16 are exact, sums float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(x, source, target, mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(x)
        if (source, target) == (tl.float32, tl.bfloat16):
            return rounded(x)
        return convert(x, source, target, mode)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widened(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)
