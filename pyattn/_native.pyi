from collections.abc import Sequence

BLOCK_M: int
BLOCK_N: int
DECODE_QUERIES: int
DECODE_KEYS: int
FEW_ROWS: int
PROJECTION_ROWS: int

class AttentionPlan:
    def __init__(
        self,
        *,
        dtype: int,
        sizes: Sequence[int],
        query_stride: Sequence[int],
        key_stride: Sequence[int],
        value_stride: Sequence[int],
        lse_stride: Sequence[int],
        mask_dtype: int,
        mask_stride: Sequence[int],
        alibi_stride_b: int,
        page_size: int,
        q_offset: int | None,
        window_left: int,
        window_right: int,
        scale: float,
        softcap: float,
        dropout_threshold: int,
    ) -> None: ...
    def forward(
        self,
        isa: int,
        threads: int,
        addresses: Sequence[int],
        out_stride: Sequence[int],
        dropout_seed: int,
        /,
    ) -> None: ...
    def backward(
        self,
        isa: int,
        threads: int,
        addresses: Sequence[int],
        out_stride: Sequence[int],
        dropout_seed: int,
        grad_addresses: Sequence[int],
        grad_strides: Sequence[Sequence[int]],
        grad_mask_sizes: Sequence[int],
        /,
    ) -> None: ...

class CudaKernel:
    def __init__(self, image: bytes, name: str, threads: int, shared_bytes: int, device: int) -> None: ...
    def launch(self, blocks: int, stream: int, params: bytes, /) -> None: ...

def cuda_open(library: str, /) -> None: ...
def cuda_driver_version() -> int: ...
def tensor_map(
    *,
    dtype: int,
    address: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: bool = True,
) -> bytes: ...
def product(
    isa: int,
    threads: int,
    dtype: int,
    sizes: Sequence[int],
    a: Sequence[int],
    transpose_a: bool,
    b: Sequence[int],
    c: Sequence[int],
    /,
) -> None: ...
def pack_weight(isa: int, threads: int, dtype: int, weight: Sequence[int], out: int, /) -> int: ...
def projection(
    op: str,
    isa: int,
    threads: int,
    dtype: int,
    sizes: Sequence[int],
    addresses: Sequence[int],
    weight_stride: int,
    positions_stride_b: int,
    matrices: Sequence[Sequence[int]],
    num_heads: Sequence[int],
    heads: Sequence[Sequence[int]],
    eps: float,
    flags: Sequence[bool],
    /,
) -> None: ...
def available_isas() -> list[str]: ...
def peak_gflops(isa: int, dtype: int, /) -> float: ...
def scratch_peak_bytes(reset: bool, /) -> int: ...
