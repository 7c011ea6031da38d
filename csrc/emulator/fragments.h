// Which element of a matrix a thread of a warp holds, for m16n8k16 with 16-bit operands (PTX ISA, "Matrix fragments for
// mma.m16n8k16") and for wgmma. tests/test_fragments.py compares them with those of CuTe.
#pragma once

namespace emulator {

struct Element {
  int row, col;
};

// a [16, 16], in register r (0 to 3), half h; b [16, 8], register r (0, 1); c [16, 8], register r (0 to 3).
inline Element fragment_a(int lane, int r, int h) { return {lane / 4 + r % 2 * 8, lane % 4 * 2 + h + r / 2 * 8}; }
inline Element fragment_b(int lane, int r, int h) { return {lane % 4 * 2 + h + r * 8, lane / 4}; }
inline Element fragment_c(int lane, int r) { return {lane / 4 + r / 2 * 8, lane % 4 * 2 + r % 2}; }

// sums [64, N] of a warpgroup's product (wgmma.m64nNk16): of a warp's 16 rows, register r (0 to N / 2 - 1). Its left
// operand [64, 16] in registers is, a warp, that of m16n8k16.
inline Element fragment_sums(int lane, int r) { return {lane / 4 + r / 2 % 2 * 8, r / 4 * 8 + lane % 4 * 2 + r % 2}; }

}  // namespace emulator
