// Where each number of a 2:4 layer lies: in the registers of mma.sp m16n8k64 (s8), in a packed weight, in shared
// memory. Functions of indices alone, so that tests/csrc/int8_24.cpp runs them on the CPU.
//
// The registers are those of PTX ISA 9.0, "Matrix Fragments for sparse mma.m16n8k64" and its figures of the metadata: A
// is the weight [16 outputs, 64 inputs], of which two in each group of four inputs are kept, B [64 inputs, 8 rows of
// x], C [16 outputs, 8 rows of x]. The sparsity selector is 0: every lane gives metadata.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define POTSTILL_HOST_DEVICE __host__ __device__
#else
#define POTSTILL_HOST_DEVICE
#endif

namespace int8_24 {

struct Place {
  int row, column;
};

constexpr int kLanes = 32;
constexpr int kStep = 64;         // inputs of one mma.sp
constexpr int kKept = kStep / 2;  // those of an output whose weights are kept

// Byte 0..3 of register 0..3: which of the kept weights [16, 32].
constexpr POTSTILL_HOST_DEVICE Place place_in_a(int lane, int reg, int byte) {
  return {lane / 4 + 8 * (reg % 2), 4 * (lane % 4) + 16 * (reg / 2) + byte};
}

// Byte 0..3 of register 0..3: which of B [64, 8].
constexpr POTSTILL_HOST_DEVICE Place place_in_b(int lane, int reg, int byte) {
  return {16 * reg + 4 * (lane % 4) + byte, lane / 4};
}

// Register 0..3: which sum of C [16, 8].
constexpr POTSTILL_HOST_DEVICE Place place_in_c(int lane, int reg) {
  return {lane / 4 + 8 * (reg / 2), 2 * (lane % 4) + reg % 2};
}

// Bits 4 nibble to 4 nibble + 3 of the metadata: which group of four inputs [16, 16]. Two bits are the place in the
// group of the first weight kept, the next two that of the second.
constexpr POTSTILL_HOST_DEVICE Place place_in_metadata(int lane, int nibble) {
  return {lane / 4 + 8 * (lane % 2), 8 * (lane % 4 / 2) + nibble};
}

// ---- a packed weight: blocks of 64 outputs, each cut into steps of 64 inputs ----
//
// The bytes of a block's step are in the order in which a warp takes them, 16 a lane: A of each 16 outputs, then the
// metadata of all 64. So a warp reads both without a gap, and copies of whole steps are copies of consecutive bytes.

constexpr int kTiles = 4;  // of 16 outputs in a block
constexpr int kBlock = 16 * kTiles;
constexpr int kTileBytes = 16 * kKept;
constexpr int kValueBytes = kTiles * kTileBytes;
constexpr int kStepBytes = kValueBytes + kBlock * kStep / 8;

constexpr POTSTILL_HOST_DEVICE int value_offset(int tile, int lane) { return tile * kTileBytes + 16 * lane; }
constexpr POTSTILL_HOST_DEVICE int metadata_offset(int lane) { return kValueBytes + 16 * lane; }

// Which of the kept weights [64, 32] byte 0..kValueBytes - 1 of a step is.
constexpr POTSTILL_HOST_DEVICE Place kept_at(int byte) {
  Place place = place_in_a(byte / 16 % kLanes, byte / 4 % 4, byte % 4);
  return {16 * (byte / kTileBytes) + place.row, place.column};
}

// Which byte of the indices [64, 8], each for two groups of four inputs, byte 0..kBlock * kStep / 8 - 1 of a step's
// metadata is.
constexpr POTSTILL_HOST_DEVICE Place indices_at(int byte) {
  Place place = place_in_metadata(byte / 16, 2 * (byte % 4));
  return {16 * (byte / 4 % 4) + place.row, place.column / 2};
}

// ---- the tile of x in shared memory: rows of 128 bytes ----

// Where 16 bytes of a row lie. Of 8 rows the same 16 bytes lie in different banks, and so do the 128 bytes of a row.
constexpr POTSTILL_HOST_DEVICE int swizzled(int row, int sixteen) { return 128 * row + 16 * (sixteen ^ row % 8); }

// Of ldmatrix for B of one mma.sp: matrix r, of 8 rows of x and 16 bytes, becomes register r, and its row i is where
// lane 8r + i points.
constexpr POTSTILL_HOST_DEVICE Place place_of_matrix_row(int lane) { return {lane % 8, lane / 8}; }

}  // namespace int8_24
