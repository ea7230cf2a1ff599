// Sparse weights as the kernels read them: one block of memory, the same for every ISA.
//
// A block of weights is 4 consecutive inputs of one output. Only blocks that are not all zero are stored, each as an
// index and four values, in one of two orders:
//
//   many rows  Strips of kStrip outputs; the inputs in chunks, so that a tile of activations stays in L1. In a chunk a
//              strip's outputs are sorted by how many blocks they have there, and each kGroup neighbours take their
//              blocks in step: slot [step][output of the group]. An index counts blocks in its chunk.
//   few rows   Panels of kPanel outputs, one for each lane, and windows of kWindow blocks: in a window every output
//              takes its blocks in step: slot [step][output of the panel]. An index counts blocks in its window.
//
// Slots that an output has no block for are zeros. Whatever the bytes say, kernels stay inside: an index is a byte, and
// the activations are followed by as many more as it can name; numbers of steps are cut to the slots there are.
//
//   int64 x 8        magic, order, n, k, slots, bytes of a value
//   int64            first[parts + 1]: the first slot of each strip and chunk, or of each panel
//   int32            sums of the outputs' weights, of int8: [strips * kStrip] or [panels * kPanel]
//   uint8            steps: [strips][chunks][groups] or [panels][windows]
//   uint8            outputs, many rows only: [strips][chunks][kStrip], those of the groups in turn
//   uint8            index[slots]
//   int8 or float    values: [slots][4]; floats for few rows [steps][4][kPanel]
//
// Every part begins at a multiple of 64 bytes.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "table.h"

constexpr int64_t kSparseMagic = 0x3173706b73746f70;
constexpr int kStrip = 128;
constexpr int kGroup = 4;
constexpr int kWindow = 32;
constexpr int64_t kMostIndex = 256;  // blocks that an index can name

// Blocks in a chunk: 24 KiB of activations of kTileRows rows.
constexpr int64_t chunk_blocks(size_t value_bytes) { return value_bytes == 1 ? 192 : 48; }
constexpr int64_t parts_of(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Reads the parts of `bytes` of memory for n outputs, k inputs and values of this size. Returns what is wrong, or null.
inline const char* read_sparse(const void* data, int64_t bytes, int64_t n, int64_t k, size_t value_bytes,
                               SparseWeight& w) {
  auto head = static_cast<const int64_t*>(data);
  if (bytes < 64 || head[0] != kSparseMagic || head[1] < 0 || head[1] > 1) return "is no packed sparse weight";
  if (head[5] != static_cast<int64_t>(value_bytes)) return "has values of another dtype";
  if (head[2] != n || head[3] != k) return "is for another number of outputs or inputs";
  int64_t slots = head[4];
  if (slots < 0 || slots > bytes) return "is cut off";
  bool few = head[1] == 1;
  w = {few, n, k, slots, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  int64_t blocks = w.blocks(), chunks = parts_of(blocks, chunk_blocks(value_bytes)), strips = parts_of(n, kStrip);
  int64_t panels = packed_panels(n), parts = few ? panels : strips * chunks;
  int64_t at = 64;
  auto part = [&](int64_t size) {
    const char* p = static_cast<const char*>(data) + at;
    at += parts_of(size, 64) * 64;
    return p;
  };
  w.first = reinterpret_cast<const int64_t*>(part((parts + 1) * 8));
  w.sums = reinterpret_cast<const int32_t*>(part(value_bytes == 1 ? (few ? panels * kPanel : strips * kStrip) * 4 : 0));
  w.steps = reinterpret_cast<const uint8_t*>(part(few ? panels * parts_of(blocks, kWindow) : parts * kStrip / kGroup));
  w.outputs = reinterpret_cast<const uint8_t*>(part(few ? 0 : parts * kStrip));
  w.index = reinterpret_cast<const uint8_t*>(part(slots));
  w.values = part(slots * 4 * static_cast<int64_t>(value_bytes));
  if (at != bytes) return "is cut off, or longer than it says";
  if (w.first[0] != 0 || w.first[parts] != slots) return "has slots that no output owns";
  for (int64_t i = 0; i < parts; ++i) {
    if (w.first[i] > w.first[i + 1]) return "has slots out of order";
  }
  return nullptr;
}
