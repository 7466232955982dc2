"""The C++ extension, built from csrc/; `rlcore.ops.backend.native()` gives it, or None where it was not built."""

from collections.abc import Sequence
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
def prefix_attention_forward(
    node_table: int,
    nodes: int,
    rows: int,
    q: tuple[int, int, int],
    k: tuple[int, int, int],
    v: tuple[int, int, int],
    query_heads: int,
    key_heads: int,
    size: int,
    scale: float,
    window: int,
    softcap: float,
    sink: int,
    read: int,
    o: int,
    lse: int,
    threads: int,
) -> None: ...
def prefix_attention_backward(
    node_table: int,
    nodes: int,
    rows: int,
    q: tuple[int, int, int],
    k: tuple[int, int, int],
    v: tuple[int, int, int],
    query_heads: int,
    key_heads: int,
    size: int,
    scale: float,
    window: int,
    softcap: float,
    read: int,
    dout: tuple[int, int, int],
    o: tuple[int, int, int],
    lse: int,
    slices: int,
    dq: int,
    dk: int,
    dv: int,
    threads: int,
) -> None: ...

# Addresses are those of contiguous tensors (mask: bool; ids, offsets and counts: int64), 0 for none.
def segment_reduce(
    what: Literal["sum", "mean", "std", "min", "max"],
    x: int,
    offsets: int,
    ids: int,
    mask: int,
    rows: int,
    count: int,
    ddof: int,
    out: int,
    dtype: Literal["float32", "float64"],
    threads: int,
) -> None: ...
def segment_count(offsets: int, ids: int, mask: int, rows: int, count: int, out: int, threads: int) -> None: ...
def segment_rank(
    x: int,
    offsets: int,
    ids: int,
    mask: int,
    rows: int,
    count: int,
    out: int,
    dtype: Literal["float32", "float64"],
    threads: int,
) -> None: ...
def segment_topk(
    x: int,
    offsets: int,
    ids: int,
    mask: int,
    rows: int,
    count: int,
    k: int,
    values: int,
    places: int,
    dtype: Literal["float32", "float64"],
    threads: int,
) -> None: ...
def group_advantage(
    reward: int,
    group: int,
    weight: int,
    mask: int,
    n: int,
    center: Literal["none", "group", "leave_one_out", "batch"],
    scale: Literal["none", "group", "batch"],
    spread_of_residual: bool,
    ddof: float,
    eps: float,
    out: int,
) -> None: ...
def reverse_scan(
    delta: int,
    decay_rows: int,
    decay: float,
    offsets: int,
    count: int,
    rows: int,
    mask: int,
    bootstrap: int,
    out: int,
    dtype: Literal["float32", "float64"],
    threads: int,
) -> None: ...
def gae(
    reward: int,
    value: int,
    gamma_rows: int,
    gamma: float,
    lam_rows: int,
    lam: float,
    offsets: int,
    count: int,
    rows: int,
    mask: int,
    bootstrap: int,
    advantage: int,
    returns: int,
    dtype: Literal["float32", "float64"],
    threads: int,
) -> None: ...
def vtrace(
    reward: int,
    value: int,
    log_ratio: int,
    gamma_rows: int,
    gamma: float,
    lam_rows: int,
    lam: float,
    rho_bar: float,
    c_bar: float,
    offsets: int,
    count: int,
    rows: int,
    mask: int,
    bootstrap: int,
    advantage: int,
    returns: int,
    dtype: Literal["float32", "float64"],
    threads: int,
) -> None: ...
def linear_scan(delta: int, decay: int, last: int, n: int, out: int, threads: int) -> None: ...

POLICY_LOSS_METRICS: int

def policy_loss(
    fields: Sequence[int],
    numbers: Sequence[int],
    totals: Sequence[int],
    rows: int,
    offsets: int,
    sequences: int,
    ratio: Literal["none", "token", "unit"],
    surrogate: Literal["ppo", "cispo", "reinforce"],
    estimator: Literal["", "k1", "k2", "k3"],
    aggregate: str,
    dual_clip: bool,
    correction: bool,
    entropy_term: bool,
    unit_base: int,
    unit_count: int,
    loss: int,
    metrics: int,
    threads: int,
) -> int: ...
