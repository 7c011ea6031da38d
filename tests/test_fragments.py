"""Which thread holds which element, and where a tile's elements lie: what the emulator and the kernels take as given.

A mistake that both share would cancel out on the emulator and show on a GPU only. So both are compared with CuTe, where
its headers are installed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import emulator
import pytest

pytestmark = pytest.mark.skipif(not emulator.supported(), reason="the emulator runs on x86-64 only")

COLUMNS = (64, 96, 128, 192, 256)  # of the tiles that kernels are made for
ROWS = 32
VALUES = {"a": 8, "b": 4, "c": 4}  # that a lane holds of each operand
SHAPES = {"a": (16, 16), "b": (16, 8), "c": (16, 8)}

EXPORTS = """
#define EXPORT extern "C" __attribute__((visibility("default")))

// Places are row * 16 + col.
EXPORT int fragment(char operand, int lane, int value) {
  return operand == 'a' ? fragment_a(lane, value) : operand == 'b' ? fragment_b(lane, value) : fragment_c(lane, value);
}

// Of a warpgroup's product m64n128k16: row * 128 + col of what a thread holds.
EXPORT int sums(int thread, int value) { return fragment_sums(thread, value); }

// The descriptor, but for its address, of 16 columns of a K-major tile of 64 x 64, or of 128 rows and 16 columns of an
// MN-major one of 128 x 64 whose 64 columns lie in two panels.
EXPORT uint64_t descriptor(bool mn_major) { return mn_major ? descriptor_mn() : descriptor_k(); }

// Where an element of that MN-major tile lies.
EXPORT int mn_address(int row, int col) { return address_mn(row, col); }

EXPORT int address(int cols, int row, int col, int down, int right) {
  switch (cols) {
    case 64: return tile_address<64>(row, col, down, right);
    case 96: return tile_address<96>(row, col, down, right);
    case 128: return tile_address<128>(row, col, down, right);
    case 192: return tile_address<192>(row, col, down, right);
    default: return tile_address<256>(row, col, down, right);
  }
}

// The element, row * 8 + col of four matrices' 32 rows, that a lane gets.
EXPORT int loaded(bool transposed, int lane, int value) {
  return transposed ? load<true>(lane, value) : load<false>(lane, value);
}
"""

OURS = """
#include "emulator/prim.h"
#include "cuda/prim_hopper.cuh"
#include "cuda/tile.cuh"

int place(emulator::Element e) { return e.row * 16 + e.col; }
int fragment_a(int lane, int value) { return place(emulator::fragment_a(lane, value / 2, value % 2)); }
int fragment_b(int lane, int value) { return place(emulator::fragment_b(lane, value / 2, value % 2)); }
int fragment_c(int lane, int value) { return place(emulator::fragment_c(lane, value)); }

template <int cols>
int tile_address(int row, int col, int down, int right) {
  return SharedTile<ROWS_OF_TILE, cols>{0}.cursor(row, col).at(down, right);
}

int fragment_sums(int thread, int value) {
  const emulator::Element e = emulator::fragment_sums(thread % 32, value);
  return (thread / 32 * 16 + e.row) * 128 + e.col;
}
uint64_t descriptor_k() { return prim::operand(0, 16, 1024); }
uint64_t descriptor_mn() { return prim::operand(0, 64 * 128, 1024); }
int address_mn(int row, int col) { return emulator::Operand(descriptor_mn(), true).at(row, col); }

uint32_t registers[32][4];

template <bool transposed>
void load_all(const void*) {
  const uint32_t l = lane();
  prim::Words row;
  for (uint32_t i = 0; i < 4; ++i) row.w[i] = (8 * l + 2 * i) | (8 * l + 2 * i + 1) << 16;
  prim::store_shared(16 * l, row);
  prim::sync();
  prim::load_matrices_as<transposed>(registers[l], 16 * l);
}

template <bool transposed>
int load(int lane, int value) {
  if (emulator::run(load_all<transposed>, nullptr, 1, 32, 512, false, 0)) return -1;
  return registers[lane][value / 2] >> 16 * (value % 2) & 0xffff;
}
"""

THEIRS = """
#include <cute/tensor.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

// A layout's coordinates are (lane, value), and it numbers a matrix's elements by columns; b is [N, K] there.
using Multiply = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
int fragment_a(int lane, int value) {
  const int i = Multiply::ALayout{}(lane, value);
  return i % 16 * 16 + i / 16;
}
int fragment_b(int lane, int value) {
  const int i = Multiply::BLayout{}(lane, value);
  return i / 8 * 16 + i % 8;
}
int fragment_c(int lane, int value) {
  const int i = Multiply::CLayout{}(lane, value);
  return i % 16 * 16 + i / 16;
}

template <int cols>
int tile_address(int row, int col, int down, int right) {
  using namespace cute;
  using Atom = conditional_t<cols % 64 == 0, GMMA::Layout_K_SW128_Atom<half_t>, GMMA::Layout_K_SW64_Atom<half_t>>;
  const auto tile = tile_to_shape(Atom{}, make_shape(Int<ROWS_OF_TILE>{}, Int<cols>{}));
  return as_position_independent_swizzle_layout(tile)(row + down, col + right) * int(sizeof(half_t));
}

int fragment_sums(int thread, int value) {
  using namespace cute;
  using Product = MMA_Traits<SM90_64x128x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>>;
  const int i = Product::CLayout{}(thread, value);
  return i % 64 * 128 + i / 64;
}

auto mn_tile() {
  using namespace cute;
  return tile_to_shape(GMMA::Layout_MN_SW128_Atom<half_t>{}, make_shape(Int<128>{}, Int<64>{}), Step<_2, _1>{});
}

uint64_t descriptor_k() {
  using namespace cute;
  const auto layout = tile_to_shape(GMMA::Layout_K_SW128_Atom<half_t>{}, make_shape(Int<64>{}, Int<64>{}));
  const auto tile = make_tensor(make_smem_ptr(static_cast<half_t*>(nullptr)), layout);
  return SM90::GMMA::make_gmma_desc<GMMA::Major::K>(
      local_tile(tile, make_shape(Int<64>{}, Int<16>{}), make_coord(0, 0)));
}

uint64_t descriptor_mn() {
  using namespace cute;
  const auto tile = make_tensor(make_smem_ptr(static_cast<half_t*>(nullptr)), mn_tile());
  return SM90::GMMA::make_gmma_desc<GMMA::Major::MN>(
      local_tile(tile, make_shape(Int<128>{}, Int<16>{}), make_coord(0, 0)));
}

int address_mn(int row, int col) {
  return cute::as_position_independent_swizzle_layout(mn_tile())(row, col) * int(sizeof(cute::half_t));
}

template <bool transposed>
int load(int lane, int value) {
  using namespace cute;
  using Copy = Copy_Traits<conditional_t<transposed, SM75_U16x8_LDSM_T, SM75_U32x4_LDSM_N>>;
  static_assert(typename Copy::SrcLayout{}(1, 0) == 128, "lane l gives the address of row l, of 128 bits");
  return typename Copy::DstLayout{}(lane, value * 16) / 16;
}
"""

HEADERS = {
    "cute/tensor.hpp": "nvidia-cutlass",
    "cuda_runtime_api.h": "nvidia-cuda-runtime",
    "crt/host_defines.h": "nvidia-cuda-crt",
    "cuda/std/tuple": "nvidia-cuda-cccl",
}


def build(source, options=""):
    source = f"#define ROWS_OF_TILE {ROWS}\n{source}{EXPORTS}"
    options = f"{emulator.COMPILE} {options}"
    texts = [emulator._texts(folder) for folder in (emulator.EMULATOR, emulator.ROOT / "csrc" / "cuda")]
    path = emulator.BUILD / f"fragments-{emulator._hash(source, options, texts)}.so"
    library = ctypes.CDLL(str(emulator._build(path, source, options)))
    library.fragment.argtypes = (ctypes.c_char, ctypes.c_int, ctypes.c_int)
    library.descriptor.restype = ctypes.c_uint64
    return library


@functools.cache
def ours():
    return build("".join(f"#define {name} 1\n" for name in emulator.SHAPES + emulator.FLAGS) + OURS)


@functools.cache
def theirs():
    """Of CuTe; skips the test where its headers, or those of CUDA that they include, are not installed."""
    folders = []
    for package, patterns in {"cutlass_library": ["source/include"], "nvidia": ["*/include", "*/include/cccl"]}.items():
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            folders += [folder for pattern in patterns for folder in Path(place).glob(pattern)]
    missing = [package for header, package in HEADERS.items() if not any((x / header).exists() for x in folders)]
    if missing:
        pytest.skip(f"needs CuTe's headers: pip install --no-deps {' '.join(missing)}")
    return build(THEIRS, " ".join(f"-isystem {folder}" for folder in folders))


def fragments(library, operand):
    """Where lane and value lie in the matrix."""
    pairs = [(lane, value) for lane in range(32) for value in range(VALUES[operand])]
    return {pair: divmod(library.fragment(operand.encode(), *pair), 16) for pair in pairs}


def chunks(library, cols):
    """The address, in a tile, of each row's 8 elements from each column on."""
    pairs = [(row, col) for row in range(ROWS) for col in range(0, cols, 8)]
    return {pair: library.address(cols, *pair, 0, 0) for pair in pairs}


def loads(library, transposed):
    pairs = [(lane, value) for lane in range(32) for value in range(8)]
    return {pair: library.loaded(transposed, *pair) for pair in pairs}


@pytest.mark.parametrize("operand", VALUES)
def test_each_element_is_held_once(operand):
    held = sorted(fragments(ours(), operand).values())
    rows, cols = SHAPES[operand]
    assert held == [(row, col) for row in range(rows) for col in range(cols)]


@pytest.mark.parametrize("transposed", [False, True])
def test_each_element_is_loaded_once(transposed):
    assert sorted(loads(ours(), transposed).values()) == list(range(32 * 8))


@pytest.mark.parametrize("cols", COLUMNS)
def test_chunks_fill_a_tile(cols):
    assert sorted(chunks(ours(), cols).values()) == list(range(0, ROWS * cols * 2, 16))


@pytest.mark.parametrize("cols", COLUMNS)
def test_eight_rows_lie_in_different_banks(cols):
    at = chunks(ours(), cols)
    for first, col in at:
        if first + 8 <= ROWS:
            assert len({at[row, col] // 16 % 8 for row in range(first, first + 8)}) == 8


@pytest.mark.parametrize("cols", COLUMNS)
def test_a_cursor_moves_as_it_says(cols):
    """Down by 8 rows; right by 16 columns from columns 0 and 8, by panels from any."""
    panel = 32 if cols % 64 else 64
    for (row, col), address in chunks(ours(), cols).items():
        for first_col in (col % 16, col % panel):
            assert ours().address(cols, row % 8, first_col, row - row % 8, col - first_col) == address


@pytest.mark.parametrize("operand", VALUES)
def test_fragments_are_those_of_cute(operand):
    assert fragments(ours(), operand) == fragments(theirs(), operand)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_as_in_cute(transposed):
    assert loads(ours(), transposed) == loads(theirs(), transposed)


@pytest.mark.parametrize("cols", COLUMNS)
def test_tiles_are_those_of_cute(cols):
    """With the permutations that wgmma and TMA know as 128-byte and 64-byte swizzles."""
    assert chunks(ours(), cols) == chunks(theirs(), cols)


def test_each_sum_of_a_warpgroup_is_held_once():
    held = sorted(ours().sums(thread, value) for thread in range(128) for value in range(64))
    assert held == list(range(64 * 128))


def test_the_sums_of_a_warpgroup_are_those_of_cute():
    pairs = [(thread, value) for thread in range(128) for value in range(64)]
    assert [ours().sums(*pair) for pair in pairs] == [theirs().sums(*pair) for pair in pairs]


@pytest.mark.parametrize("mn_major", [False, True])
def test_operands_are_described_as_by_cute(mn_major):
    """Strides and swizzle; of K-major operands the leading one is ignored."""
    ignored = 0 if mn_major else 0x3FFF << 16
    assert ours().descriptor(mn_major) & ~ignored == theirs().descriptor(mn_major) & ~ignored


def test_elements_of_an_mn_major_operand_lie_where_cute_has_them():
    """In the first 16 columns, which one product reads."""
    pairs = [(row, col) for row in range(128) for col in range(16)]
    assert [ours().mn_address(*pair) for pair in pairs] == [theirs().mn_address(*pair) for pair in pairs]
