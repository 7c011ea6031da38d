from collections.abc import Sequence

BLOCK_M: int
BLOCK_N: int

def attention_forward(
    isa: str,
    threads: int,
    dtype: int,
    sizes: Sequence[int],
    query: int,
    query_stride: Sequence[int],
    key: int,
    key_stride: Sequence[int],
    value: int,
    value_stride: Sequence[int],
    out: int,
    out_stride: Sequence[int],
    lse: int,
    mask: int,
    mask_dtype: int,
    mask_stride: Sequence[int],
    q_offsets: int,
    kv_lengths: int,
    kv_starts: int,
    q_offset: int | None,
    window_left: int,
    window_right: int,
    scale: float,
    /,
) -> None: ...
def available_isas() -> list[str]: ...
def peak_gflops(isa: str, dtype: int, /) -> float: ...
def scratch_peak_bytes(reset: bool, /) -> int: ...
