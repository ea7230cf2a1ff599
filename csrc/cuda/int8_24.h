// A linear layer with a 2:4 int8 weight: y = (x w^T) * (x_scale * scale) + bias, where x [m, k] and w [n, k] are int8
// and the sums int32. One block of threads computes a tile of y: it copies tiles of x and w to shared memory some steps
// ahead, multiplies them with mma.sp, and brings the result into rows.
//
// Written over a Block (how its threads run) and a Thread (what one can do), which int8_24.cu has for GPUs and
// tests/csrc/int8_24.cpp for CPUs, so that both run these lines.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "fragments.h"

#ifdef __CUDACC__
#define POTSTILL_THREAD __device__ __forceinline__
#define POTSTILL_UNROLL _Pragma("unroll")
#else
#define POTSTILL_THREAD inline
#define POTSTILL_UNROLL
#endif

namespace int8_24 {

enum class Float { f32, bf16, f16 };

// `weight` is [n rounded up to kOutputs, k rounded up to kInputs] as fragments.h packs it. k and x_stride are multiples
// of 16, and x is aligned to 16 bytes.
struct Linear {
  const int8_t* x;
  const float* x_scale;
  const uint8_t* weight;
  const float* scale;
  const void* bias;  // may be null
  void* y;           // [m, n]
  int64_t x_stride;
  int m, n, k;
  Float bias_type, y_type;
};

constexpr int kOutputs = 128, kRows = 128, kInputs = 128;  // a tile
constexpr int kStages = 3;                                 // tiles in shared memory
constexpr int kSteps = kInputs / kStep;
constexpr int kBlocks = kOutputs / kBlock;
constexpr int kThreads = 256;
constexpr int kWarpRows = kRows / (kThreads / kLanes / kBlocks);  // a warp computes a block's outputs of so many rows
constexpr int kWarpTiles = kWarpRows / 8;

constexpr int kWeightBytes = kBlocks * kSteps * kStepBytes;
constexpr int kStageBytes = kWeightBytes + kRows * kInputs;
constexpr int kSharedBytes = kStages * kStageBytes;
static_assert(kSharedBytes <= 101376);  // of a block on sm_86 and sm_89

// A row of y in shared memory: 16 bytes more than its numbers, so that the rows which a warp writes to at once begin in
// different banks.
constexpr POTSTILL_HOST_DEVICE int row_bytes(int width) { return kOutputs * width + 16; }
static_assert(kRows * row_bytes(sizeof(float)) <= kSharedBytes);

// Sums of k / 2 products of at most 2^14 fit 32 bits.
constexpr int kMaxInputs = (1 << 18) - 16;

struct Tile {
  int row, output;  // the first of each
};

constexpr POTSTILL_HOST_DEVICE int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// The order of the tiles: down 8 tiles of rows, then on to the next outputs, so that tiles which run at the same time
// share x and w in L2.
constexpr POTSTILL_HOST_DEVICE Tile tile_at(int index, int m, int n) {
  constexpr int kTogether = 8;
  int below = tiles_of(m, kRows), across = tiles_of(n, kOutputs);
  int first = index / (kTogether * across) * kTogether, within = index % (kTogether * across);
  int height = below - first < kTogether ? below - first : kTogether;
  return {(first + within % height) * kRows, within / height * kOutputs};
}

// What a thread has for one mma.sp of each of its tiles.
struct Fragments {
  uint32_t a[kTiles][4], b[kWarpTiles][4], metadata[kTiles];
};

struct Registers {
  Fragments fragments[2];  // one is loaded while the other is multiplied
  int32_t sums[kTiles][kWarpTiles][4];
};

constexpr POTSTILL_HOST_DEVICE int block_of(int thread) { return thread / kLanes % kBlocks; }
constexpr POTSTILL_HOST_DEVICE int row_of(int thread) { return thread / kLanes / kBlocks * kWarpRows; }

// Starts the copies of the index-th tile along k. Rows and inputs that x does not have are zeros.
template <class Thread>
POTSTILL_THREAD void copy(Thread& t, const Linear& p, Tile tile, int index) {
  constexpr int kChunks = kSteps * kStepBytes / 16;  // 16 bytes each, in one block
  int stage = index % kStages * kStageBytes;
  int64_t block_bytes = static_cast<int64_t>(tiles_of(p.k, kInputs)) * kSteps * kStepBytes;
  const uint8_t* weight = p.weight + tile.output / kBlock * block_bytes + static_cast<int64_t>(index) * kChunks * 16;
  POTSTILL_UNROLL for (int i = 0; i < kBlocks * kChunks; i += kThreads) {
    int chunk = i + t.index;
    if (chunk < kBlocks * kChunks) {
      t.copy(stage + chunk * 16, weight + chunk / kChunks * block_bytes + chunk % kChunks * 16, 16);
    }
  }
  POTSTILL_UNROLL for (int i = 0; i < kRows * kInputs / 16; i += kThreads) {
    int row = (i + t.index) / (kInputs / 16), sixteen = (i + t.index) % (kInputs / 16);
    int input = index * kInputs + sixteen * 16;
    bool inside = tile.row + row < p.m && input < p.k;
    const int8_t* from = inside ? p.x + (tile.row + row) * p.x_stride + input : p.x;
    t.copy(stage + kWeightBytes + swizzled(row, sixteen), from, inside ? 16 : 0);
  }
}

// Loads what the thread needs of one step of a tile.
template <class Thread>
POTSTILL_THREAD void load(Thread& t, Fragments& f, int index, int step) {
  int stage = index % kStages * kStageBytes;
  int weight = stage + (block_of(t.index) * kSteps + step) * kStepBytes, x = stage + kWeightBytes;
  int lane = t.index % kLanes, row = row_of(t.index);
  POTSTILL_UNROLL for (int i = 0; i < kTiles; ++i) t.read(weight + value_offset(i, lane), f.a[i]);
  t.read(weight + metadata_offset(lane), f.metadata);
  POTSTILL_UNROLL for (int j = 0; j < kWarpTiles; ++j) {
    auto place = [=](int of) {
      Place p = place_of_matrix_row(of);
      return x + swizzled(row + 8 * j + p.row, kStep / 16 * step + p.column);
    };
    t.read_matrices(place, f.b[j]);
  }
}

// Rounds the thread's results and brings them to shared memory, where they lie in rows.
template <Float type, class Thread>
POTSTILL_THREAD void finish(Thread& t, const Linear& p, Tile tile) {
  constexpr int kWidth = type == Float::f32 ? 4 : 2;
  int lane = t.index % kLanes;
  float x_scale[kWarpTiles][2];
  POTSTILL_UNROLL for (int j = 0; j < kWarpTiles * 2; ++j) {
    int row = tile.row + row_of(t.index) + 8 * (j / 2) + place_in_c(lane, j % 2).column;
    x_scale[j / 2][j % 2] = row < p.m ? p.x_scale[row] : 0.0f;
  }
  POTSTILL_UNROLL for (int i = 0; i < kTiles * 2; ++i) {
    int output = kBlock * block_of(t.index) + 16 * (i / 2) + place_in_c(lane, i % 2 * 2).row;
    bool inside = tile.output + output < p.n;
    float scale = inside ? p.scale[tile.output + output] : 0.0f;
    float bias = inside && p.bias != nullptr ? t.number(p.bias, p.bias_type, tile.output + output) : 0.0f;
    POTSTILL_UNROLL for (int j = 0; j < kWarpTiles * 2; ++j) {
      int reg = i % 2 * 2 + j % 2;
      int row = row_of(t.index) + 8 * (j / 2) + place_in_c(lane, reg).column;
      float y = static_cast<float>(t.registers.sums[i / 2][j / 2][reg]) * (x_scale[j / 2][j % 2] * scale);
      t.template write<type>(row * row_bytes(kWidth) + output * kWidth, p.bias != nullptr ? y + bias : y);
    }
  }
}

// Writes the rows in shared memory to y, 16 bytes at a time where that is possible.
template <class Number, class Thread>
POTSTILL_THREAD void store(Thread& t, const Linear& p, Tile tile) {
  constexpr int kNumbers = 16 / sizeof(Number);
  bool aligned = p.n % kNumbers == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  for (int i = t.index; i < kRows * kOutputs / kNumbers; i += kThreads) {
    int row = i / (kOutputs / kNumbers), output = i % (kOutputs / kNumbers) * kNumbers;
    if (tile.row + row >= p.m) break;  // i, and so row, only grows
    union {
      uint32_t words[4];
      Number numbers[kNumbers];
    } line;
    t.read(row * row_bytes(sizeof(Number)) + output * static_cast<int>(sizeof(Number)), line.words);
    Number* to = static_cast<Number*>(p.y) + static_cast<int64_t>(tile.row + row) * p.n + tile.output + output;
    if (aligned && tile.output + output < p.n) {
      t.store(line.words, to);
    } else {
      POTSTILL_UNROLL for (int j = 0; j < kNumbers; ++j) {
        if (tile.output + output + j < p.n) to[j] = line.numbers[j];
      }
    }
  }
}

// One tile of y, from its threads' first instruction to their last. `each` runs a function for every thread;
// `wait<pending>` ends when all but the last so many commits of each thread have arrived and every thread is there;
// `multiply` runs the mma.sp of all warps.
template <class Block>
POTSTILL_THREAD void compute(Block& block, const Linear& p, Tile tile) {
  int count = tiles_of(p.k, kInputs);
  auto begin = [&](int index) {
    block.each([&](auto& t) {
      if (index < count) copy(t, p, tile, index);
      t.commit();
    });
  };
  for (int i = 0; i < kStages - 1; ++i) begin(i);
  block.template wait<kStages - 2>();
  block.each([&](auto& t) { load(t, t.registers.fragments[0], 0, 0); });
  for (int i = 0; i < count; ++i) {
    POTSTILL_UNROLL for (int step = 0; step < kSteps; ++step) {
      bool last = step == kSteps - 1;
      if (last) block.template wait<kStages - 2>();  // so tile i + 1 is there, and no thread needs tile i any more
      if (!last || i + 1 < count) {
        block.each(
            [&](auto& t) { load(t, t.registers.fragments[(step + 1) % 2], last ? i + 1 : i, (step + 1) % kSteps); });
      }
      if (step == 0) begin(i + kStages - 1);  // where tile i - 1 was
      block.multiply(step % 2);
    }
  }
  // Since the last wait no thread has read shared memory, and no copy is under way: there is room for the results.
  block.each([&](auto& t) {
    if (p.y_type == Float::f32) finish<Float::f32>(t, p, tile);
    if (p.y_type == Float::bf16) finish<Float::bf16>(t, p, tile);
    if (p.y_type == Float::f16) finish<Float::f16>(t, p, tile);
  });
  block.template wait<0>();
  block.each([&](auto& t) {
    if (p.y_type == Float::f32) {
      store<uint32_t>(t, p, tile);
    } else {
      store<uint16_t>(t, p, tile);
    }
  });
}

static_assert(kSteps % 2 == 0);  // so that a tile's first step is always in the first of two Fragments

// Launches the kernel on a CUDA stream of the current device; what went wrong, or null.
const char* launch(const Linear& p, void* stream);

}  // namespace int8_24
