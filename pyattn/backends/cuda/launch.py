"""How a kernel is started: the GPU, the compiled code, the argument ``struct Params`` of params.cuh."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pyattn import jit
from pyattn.backends.cuda.kernels import Kernel

try:
    from pyattn import _native
except ImportError as error:  # reported by `unavailable`, never at import
    _native = None  # type: ignore[assignment]
    _import_error = str(error)


# ---- the GPU -------------------------------------------------------------------------------------------------


def arch_name(major: int, minor: int) -> str:
    """The architecture of a compute capability, with all that is special to it: "sm_80", "sm_90a"."""
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


class Target(NamedTuple):
    """What kernels are chosen for."""

    arch: str
    multiprocessors: int = 1


class Gpu:
    """Where kernels run. The tests put an emulator in its place."""

    device_type = "cuda"

    def unavailable(self) -> list[str]:
        if not torch.cuda.is_available():
            return ["torch finds no GPU"]
        if torch.version.hip is not None:
            return ["runs on NVIDIA GPUs, this torch is for AMD's"]
        if reasons := jit.unavailable():
            return reasons
        try:
            _native.cuda_open("libcuda.so.1")
        except RuntimeError as error:
            return [str(error)]
        driver = _native.cuda_driver_version() // 1000
        if (nvrtc := jit.nvrtc_version()[0]) > driver:
            return [f"NVRTC {nvrtc} makes code for a newer driver than this one, which is for CUDA {driver}"]
        return []

    def target(self, device: torch.device) -> Target:
        properties = torch.cuda.get_device_properties(device)
        return Target(arch_name(properties.major, properties.minor), properties.multi_processor_count)

    def cubin(self, file: str, defines: jit.Defines, arch: str) -> bytes:
        return jit.cubin(file, defines, arch)

    def stream(self, device: torch.device) -> int:
        return torch._C._cuda_getCurrentRawStream(device.index)


gpu = Gpu()


@functools.cache
def target_of(device: torch.device) -> Target:
    return gpu.target(device)


def unavailable() -> list[str]:
    if _native is None:
        return [f"the extension pyattn._native is missing ({_import_error})"]
    return gpu.unavailable()


@functools.cache
def loaded(kernel: Kernel, device: torch.device) -> Any:
    code = gpu.cubin(kernel.file, kernel.defines, target_of(device).arch)
    return _native.CudaKernel(code, kernel.name, kernel.threads, kernel.shared_bytes, device.index or 0)


# ---- arguments -----------------------------------------------------------------------------------------------


class Addresses(NamedTuple):
    """The pointers of ``struct Params``, in their order; 0 is null."""

    query: int = 0
    key: int = 0
    value: int = 0
    out: int = 0
    lse: int = 0
    partial_out: int = 0
    partial_lse: int = 0
    mask: int = 0
    alibi_slopes: int = 0
    sinks: int = 0
    q_offsets: int = 0
    kv_lengths: int = 0
    kv_starts: int = 0
    block_table: int = 0
    cu_seqlens_q: int = 0
    cu_seqlens_k: int = 0
    seed: int = 0
    grad_out: int = 0
    grad_lse: int = 0
    delta: int = 0
    grad_query: int = 0
    grad_key: int = 0
    grad_value: int = 0
    query_sums: int = 0
    grad_mask: int = 0


@functools.cache
def numbers() -> dict[str, str]:
    """The other fields of ``struct Params``, as params.cuh declares them, with their codes for ``struct.pack``."""
    text = (jit.SOURCES / "params.cuh").read_text()
    fields = re.findall(r"^  (.+?)(\w+);", text, re.MULTILINE)
    pointers = tuple(name for kind, name in fields if "*" in kind)
    assert pointers == Addresses._fields, f"params.cuh and Addresses differ: {pointers}"
    return {
        name: {"int64_t": "q", "int32_t": "i", "float": "f"}[kind.strip()] for kind, name in fields if "*" not in kind
    }


_pack_addresses = struct.Struct(f"={len(Addresses._fields)}Q").pack


def pack_numbers(values: dict[str, float]) -> bytes:
    codes = numbers()
    unknown = values.keys() - codes.keys()
    assert not unknown, f"params.cuh has no {unknown}"
    packed = struct.pack("=" + "".join(codes.values()), *(values.get(name, 0) for name in codes))
    return packed + bytes(-len(packed) % 8)  # as a struct with fields of 8 bytes ends


class Map(NamedTuple):
    """A tensor as TMA sees it, in four dimensions; the sizes of its boxes."""

    name: str  # of its address
    dtype: int  # the code of csrc/params.h
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    box: tuple[int, ...]

    def encode(self, addresses: Addresses) -> bytes:
        _, dtype, sizes, strides, box = self
        address = getattr(addresses, self.name)
        return _native.tensor_map(dtype=dtype, address=address, sizes=sizes, strides=strides, box=box)


class Launch(NamedTuple):
    """A kernel, and all that it is called with but addresses."""

    kernel: Kernel
    blocks: int
    numbers: bytes
    maps: tuple[Map, ...] = ()

    def run(self, addresses: Addresses, device: torch.device) -> None:
        if self.blocks:
            params = _pack_addresses(*addresses) + self.numbers
            if self.maps:
                params = b"".join(x.encode(addresses) for x in self.maps) + params
                params += bytes(-len(params) % 64)
            loaded(self.kernel, device).launch(self.blocks, gpu.stream(device), params)


def run(launches: Sequence[Launch], addresses: Addresses, device: torch.device) -> None:
    """On the current stream of the tensors' device."""
    for launch in launches:
        launch.run(addresses, device)
