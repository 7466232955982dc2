"""The C++ extension, built from csrc/; `rlcore.ops.backend.native()` gives it, or None where it was not built."""

from typing import Literal, TypedDict

class Features(TypedDict):
    compiler: str
    cxx_standard: int
    openmp: bool
    build_type: str

def features() -> Features: ...
def segment_sum(
    values_ptr: int,
    stride: int,
    offsets_ptr: int,
    n_segments: int,
    out_ptr: int,
    dtype: Literal["float32", "float64"],
) -> None: ...
