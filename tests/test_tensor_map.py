"""Tensor maps for TMA: what the driver is asked for, which of them are kept, and what is refused.

The emulated driver writes its arguments where a real one encodes them (csrc/emulator/tensor_map.h).
"""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from typing import NamedTuple

import emulator
import pytest
import torch
from gpu_kernels import ON_GPU

from pyattn.backends.cuda import launch

if ON_GPU or not emulator.supported():
    pytest.skip("looks at what the emulated driver sees, on x86-64", allow_module_level=True)
BF16, F16 = 1, 2  # codes of _native
CODES = {torch.bfloat16: BF16, torch.float16: F16}
# Of cuda.h.
DATA_TYPES = {torch.bfloat16: 9, torch.float16: 6}
SWIZZLE_NONE, SWIZZLE_128B, L2_PROMOTION_256B = 0, 3, 3
# Of a [2, 3, 100, 128] tensor in bf16, of which a box is 64 rows of half a head.
LEGAL = {
    "dtype": BF16,
    "address": 1 << 20,
    "sizes": [2, 3, 100, 128],
    "strides": [76800, 25600, 256, 2],
    "box": [1, 1, 64, 64],
    "swizzle": True,
}


class Received(NamedTuple):
    """``emulator::TensorMap``."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    data_type: int
    rank: int
    interleave: int
    swizzle: int
    l2_promotion: int
    fill: int


def received(tensor_map):
    address, *arrays = struct.unpack("=Q5Q4Q5I5I6B2x", tensor_map)
    return Received(address, *(tuple(arrays[a:b]) for a, b in ((0, 5), (5, 9), (9, 14), (14, 19))), *arrays[19:])


def encode(**overrides):
    return launch._native.tensor_map(**LEGAL | overrides)


def encode_tensor(x, box, **kwargs):
    strides = [2 * stride for stride in x.stride()]
    return encode(dtype=CODES[x.dtype], address=x.data_ptr(), sizes=x.shape, strides=strides, box=box, **kwargs)


@pytest.fixture(autouse=True)
def driver():
    """An emulated one, just opened: nothing is kept, nothing was asked for."""
    with emulator.installed() as gpu:
        gpu.configure(racing=False)
        yield gpu


# ---- what the driver is asked for --------------------------------------------------------------------------


def test_the_driver_gets_the_innermost_first_and_no_stride_of_it():
    assert received(encode()) == Received(
        address=1 << 20,
        sizes=(128, 100, 3, 2, 0),
        strides=(256, 25600, 76800, 0),
        box=(64, 64, 1, 1, 0),
        element_strides=(1, 1, 1, 1, 0),
        data_type=DATA_TYPES[torch.bfloat16],
        rank=4,
        interleave=0,
        swizzle=SWIZZLE_128B,
        l2_promotion=L2_PROMOTION_256B,
        fill=0,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_a_tensor_of_every_rank(rank, dtype):
    x = torch.empty([2, 3, 4, 5, 64][-rank:], dtype=dtype).transpose(0, -2)  # strides in no order
    box = [1, 2, 3, 4, 64][-rank:]
    map = received(encode_tensor(x, box))
    assert map.rank == rank and map.data_type == DATA_TYPES[dtype]
    assert map.address == x.data_ptr()
    assert map.sizes == (*reversed(x.shape), *[0] * (5 - rank))
    assert map.strides == (*(2 * s for s in reversed(x.stride()[:-1])), *[0] * (5 - rank))
    assert map.box == (*reversed(box), *[0] * (5 - rank))
    assert map.element_strides == (*[1] * rank, *[0] * (5 - rank))


@pytest.mark.parametrize(
    ("row", "swizzle", "expected"),
    [
        (64, True, SWIZZLE_128B),
        (64, False, SWIZZLE_NONE),
        (56, True, SWIZZLE_NONE),
        (8, True, SWIZZLE_NONE),
        (256, False, SWIZZLE_NONE),
    ],
)
def test_rows_of_128_bytes_are_swizzled_unless_asked_otherwise(row, swizzle, expected):
    map = received(encode(box=[1, 1, 64, row], swizzle=swizzle))
    assert map.swizzle == expected and map.box[0] == row


def test_swizzle_is_the_default():
    arguments = {name: value for name, value in LEGAL.items() if name != "swizzle"}
    assert received(launch._native.tensor_map(**arguments)).swizzle == SWIZZLE_128B


def test_the_limits_themselves_are_legal():
    map = received(
        encode(
            address=2**64 - 16,
            sizes=[2**32, 1, 2**32],
            strides=[2**40 - 16, 0, 2],
            box=[256, 1, 256],
            swizzle=False,
        )
    )
    assert map.address == 2**64 - 16
    assert map.sizes[:3] == (2**32, 1, 2**32) and map.strides[:2] == (0, 2**40 - 16) and map.box[:3] == (256, 1, 256)


# ---- which are kept ----------------------------------------------------------------------------------------

OTHER = {
    "dtype": F16,
    "address": (1 << 20) + 16,
    "sizes": [2, 3, 101, 128],
    "strides": [76800, 25600, 272, 2],
    "box": [1, 1, 32, 64],
    "swizzle": False,
}


def test_a_repeated_call_asks_once(driver):
    first = encode()
    assert len(first) == 128 and driver.tensor_maps() == 1
    assert encode() == first and driver.tensor_maps() == 1


@pytest.mark.parametrize("name", OTHER)
def test_another_argument_is_another_map(driver, name):
    first, other = encode(), encode(**{name: OTHER[name]})
    assert first != other and driver.tensor_maps() == 2
    assert encode() == first and encode(**{name: OTHER[name]}) == other and driver.tensor_maps() == 2


@pytest.mark.parametrize("name", ["sizes", "strides", "box"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_entry_counts(driver, name, index):
    other = list(LEGAL[name])
    other[index] += 16
    assert encode() != encode(**{name: other}) and driver.tensor_maps() == 2


def test_no_more_than_4096_are_kept(driver):
    addresses = range(16, 16 * 4097, 16)
    maps = [encode(address=address) for address in addresses]
    assert [encode(address=address) for address in addresses] == maps and driver.tensor_maps() == 4096
    encode()  # one more: all others go
    assert driver.tensor_maps() == 4097
    encode(), encode(address=16)
    assert driver.tensor_maps() == 4098


def test_another_driver_is_asked_again(driver):
    encode()
    launch._native.cuda_open(str(emulator.driver()))
    encode()
    assert driver.tensor_maps() == 2


def test_threads_get_their_own_maps(driver):
    addresses = [16 * i for i in range(1, 100)]
    wrong = []

    def work():
        wrong.extend(a for a in addresses * 20 if received(encode(address=a)).address != a)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and driver.tensor_maps() == len(addresses)


# ---- what is refused ---------------------------------------------------------------------------------------

REFUSED = [
    ({"dtype": 0}, r"dtype must be 1 \(bf16\) or 2 \(f16\), got 0"),
    ({"dtype": 3}, r"dtype must be 1 \(bf16\) or 2 \(f16\), got 3"),
    ({"dtype": 4}, r"dtype must be a code from 0 to 3, got 4"),
    ({"address": 24}, r"address must be a multiple of 16, got 24"),
    ({"sizes": [128], "strides": [2], "box": [64]}, r"sizes must have 2 to 5 entries, got 1"),
    ({"sizes": [], "strides": [], "box": []}, r"sizes must have 2 to 5 entries, got 0"),
    (
        {"sizes": [1] * 5 + [128], "strides": [256] * 5 + [2], "box": [1] * 5 + [64]},
        r"sizes must have 2 to 5 entries, got 6",
    ),
    ({"strides": [25600, 256, 2]}, r"strides must have as many entries as sizes, got 3"),
    ({"box": [1, 1, 1, 64, 64]}, r"box must have as many entries as sizes, got 5"),
    ({"sizes": [2, 0, 100, 128]}, r"sizes\[1\] must be 1 to 2\^32, got 0"),
    ({"sizes": [2, 3, 100, -1]}, r"sizes\[3\] must be 1 to 2\^32, got -1"),
    ({"sizes": [2**32 + 1, 3, 100, 128]}, r"sizes\[0\] must be 1 to 2\^32, got 4294967297"),
    ({"strides": [76800, 25600, 264, 2]}, r"strides\[2\] must be a multiple of 16 bytes.* got 264"),
    ({"strides": [76800, -16, 256, 2]}, r"strides\[1\] must be .*at least 0.* got -16"),
    ({"strides": [2**40, 25600, 256, 2]}, r"strides\[0\] must be .*below 2\^40, got 1099511627776"),
    ({"strides": [76800, 25600, 256, 4]}, r"strides\[3\] must be the 2 bytes of an element, got 4"),
    ({"strides": [76800, 25600, 256, 16]}, r"strides\[3\] must be the 2 bytes of an element, got 16"),
    ({"box": [1, 1, 0, 64]}, r"box\[2\] must be 1 to 256, got 0"),
    ({"box": [1, 1, 64, 0]}, r"box\[3\] must be 1 to 256, got 0"),
    ({"box": [257, 1, 1, 64]}, r"box\[0\] must be 1 to 256, got 257"),
    ({"box": [1, 1, 64, 264], "swizzle": False}, r"box\[3\] must be 1 to 256, got 264"),
    ({"box": [1, 1, 64, 60]}, r"box\[3\] must be a multiple of 8 \(16 bytes\), got 60"),
    ({"box": [1, 1, 64, 72]}, r"box\[3\] must be at most 64 \(128 bytes\) with swizzle, got 72"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[text.replace("\\", "") for _, text in REFUSED])
def test_what_the_driver_would_not_take_is_refused(driver, overrides, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        encode(**overrides)
    assert driver.tensor_maps() == 0


def test_an_error_of_the_driver_is_raised_and_not_kept(driver):
    for asked in (1, 2):
        with pytest.raises(RuntimeError, match=r"^cuTensorMapEncodeTiled: CUDA error 999, a tensor map of no tensor$"):
            encode(address=0)
        assert driver.tensor_maps() == asked


def test_arguments_go_by_name():
    with pytest.raises(TypeError):
        launch._native.tensor_map(*LEGAL.values())


def test_without_a_driver():
    code = f"""
import importlib.util as u
spec = u.spec_from_file_location("_native", {launch._native.__file__!r})
native = u.module_from_spec(spec)
spec.loader.exec_module(native)
native.tensor_map(**{LEGAL})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: the CUDA driver has not been opened" in done.stderr
