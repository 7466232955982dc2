"""The C++ extension, built from csrc/; `rlcore.ops.backend.native()` gives it, or None where it was not built."""

from typing import Literal, TypedDict

class Features(TypedDict):
    compiler: str
    cxx_standard: int
    openmp: bool
    build_type: str
    isa: Literal["baseline", "avx2", "avx512"]

def features() -> Features: ...
def segment_sum(
    values_ptr: int,
    stride: int,
    offsets_ptr: int,
    n_segments: int,
    out_ptr: int,
    dtype: Literal["float32", "float64"],
) -> None: ...
def vocab_head_statistics(
    logits: int,
    row_stride: int,
    rows: int,
    columns: int,
    target: int,
    temperature: int,
    temperature_stride: int,
    scale: float,
    cap: float,
    maximum: int,
    log_sum: int,
    logp: int,
    entropy: int,
    threads: int,
) -> None: ...
def vocab_head_gradient(
    logits: int,
    row_stride: int,
    rows: int,
    columns: int,
    target: int,
    temperature: int,
    temperature_stride: int,
    scale: float,
    cap: float,
    maximum: int,
    log_sum: int,
    entropy: int,
    d_logp: int,
    d_entropy: int,
    keep: int,
    kept: int,
    raw: bool,
    threads: int,
) -> None: ...
