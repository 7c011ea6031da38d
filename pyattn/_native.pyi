from collections.abc import Sequence
from typing import Any

BLOCK_M: int
BLOCK_N: int
DECODE_QUERIES: int
DECODE_KEYS: int

# The arguments after those named are `_arguments` of pyattn/backends/cpu.py.
def attention_forward(isa: str, threads: int, *arguments: Any) -> None: ...
def attention_backward(
    isa: str,
    threads: int,
    grad_out: int,
    grad_out_stride: Sequence[int],
    grad_lse: int,
    grad_query: int,
    grad_query_stride: Sequence[int],
    grad_key: int,
    grad_key_stride: Sequence[int],
    grad_value: int,
    grad_value_stride: Sequence[int],
    grad_mask: int,
    grad_mask_sizes: Sequence[int],
    *arguments: Any,
) -> None: ...
def available_isas() -> list[str]: ...
def peak_gflops(isa: str, dtype: int, /) -> float: ...
def scratch_peak_bytes(reset: bool, /) -> int: ...
