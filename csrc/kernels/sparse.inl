// What the sparse linear kernels share: activations in the form that blocks of weights meet, and the loops over the
// weights of sparse_layout.h.
//
// Many rows. A tile is Rows rows of activations as [block][Rows] of four inputs each, so that a block of weights, which
// all rows share, is broadcast and multiplied with vectors of rows. Each product needs a load of activations, one per
// cycle on Zen 4 with 512 bits, so that other loads are what costs: an index and a block each for every Rows / kLanes
// products would be a third more. The sums of the outputs
// lie transposed, [output][Rows], between the chunks of inputs and before the epilogue.
//
// Few rows. The lanes are outputs; each picks its own block of the row's window of kWindow blocks, which AVX-512 holds
// in two registers. Bound by the bytes of the slots: 5 for a block of int8, times the share of slots that are padding
// (16 outputs wait for the one with most blocks: 1.6 at 80 % sparsity, where a dense panel reads 5 times the blocks).

#pragma once

#include "sparse_layout.h"

namespace {

constexpr int kTileRows = 32;
constexpr int kSmallTileRows = 16;

// Rows as tiles of kTileRows, the last one maybe small; or all of them small, if every thread can then have one of its
// own. Threads that share a tile fetch k / 4 lines of it from one another's cache, 20 to 50 cycles each (Zen 4); small
// tiles take 0.2 cycles more for each slot, by the loads of add_group. Two threads, 32 rows of 768 x 768 at 90 %: 12.6
// us instead of 15.1; of 768 x 3072 at 80 % it would be 70 instead of 66.
struct Tiles {
  int64_t rows, width;
  Tiles(int64_t total, const SparseWeight& w)
      : rows(total),
        width(total <= kSmallTileRows * max_threads() && w.slots <= 48 * w.k ? kSmallTileRows : kTileRows) {}
  int64_t count() const { return parts_of(rows, width); }
  int64_t width_of(int64_t tile) const { return rows - tile * width <= kSmallTileRows ? kSmallTileRows : width; }
};

// Blocks of a tile with those that any index can name behind the last chunk, and what transpose() writes too far.
inline int64_t tile_blocks(int64_t blocks) { return round_up(blocks, kLanes) + kMostIndex; }

// The steps of a part: no more than there are slots.
inline int64_t take(int64_t steps, int64_t& left) {
  int64_t taken = smaller(steps, left);
  left -= taken;
  return taken;
}

// Adds blocks to the sums of kOutputsAtOnce outputs, each of Rows rows; Cell says what a block does to vectors of rows.
// `start` is where the sums of a first chunk begin, or null.
template <class Cell, int Rows>
void add_group(const char* tile, const uint8_t* index, const typename Cell::Value* values, int64_t steps,
               const typename Cell::Sum* start, typename Cell::Lane* const* sums) {
  constexpr int V = Rows / kLanes;
  typename Cell::Sum acc[kOutputsAtOnce][V];
#pragma GCC unroll 64
  for (int o = 0; o < kOutputsAtOnce; ++o) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) acc[o][v] = start != nullptr ? start[o] : Cell::read(sums[o] + v * kLanes);
  }
  for (int64_t step = 0; step < steps; ++step, index += kGroup, values += 4 * kGroup) {
    uint32_t places = 0;
    memcpy(&places, index, kOutputsAtOnce);
    const char* cells[kOutputsAtOnce];
#pragma GCC unroll 64
    for (int o = 0; o < kOutputsAtOnce; ++o) {
      cells[o] = tile + (places >> (8 * o) & 255) * int64_t{Cell::kRowBytes * Rows};
    }
    Cell::template add<V>(acc, cells, values);
  }
#pragma GCC unroll 64
  for (int o = 0; o < kOutputsAtOnce; ++o) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) Cell::write(sums[o] + v * kLanes, acc[o][v]);
  }
}

// Adds a chunk of inputs to a strip's sums [output][Rows].
template <class Cell, int Rows>
void add_chunk(const SparseWeight& w, const char* tile, int64_t strip, int64_t chunk, int64_t chunks,
               typename Cell::Lane* sums) {
  constexpr int kGroups = kStrip / kGroup;
  int64_t part = strip * chunks + chunk, slot = w.first[part], left = (w.first[part + 1] - slot) / kGroup;
  const uint8_t *steps = w.steps + part * kGroups, *outputs = w.outputs + part * kStrip;
  tile += chunk * chunk_blocks(sizeof(typename Cell::Value)) * Cell::kRowBytes * Rows;
  for (int group = 0; group < kGroups; ++group, outputs += kGroup) {
    int64_t taken = take(steps[group], left);
    if (taken == 0 && chunk > 0) continue;
    auto values = static_cast<const typename Cell::Value*>(w.values) + slot * 4;
    for (int half = 0; half < kGroup; half += kOutputsAtOnce) {
      typename Cell::Lane* of[kOutputsAtOnce];
      typename Cell::Sum start[kOutputsAtOnce];
      for (int o = 0; o < kOutputsAtOnce; ++o) {
        int64_t output = outputs[half + o] % kStrip;
        of[o] = sums + output * Rows;
        start[o] = Cell::start(w, strip * kStrip + output);
      }
      add_group<Cell, Rows>(tile, w.index + slot + half, values + 4 * half, taken, chunk == 0 ? start : nullptr, of);
    }
    slot += taken * kGroup;
  }
}

// Makes the sums [output][Rows] of the strips from `first` to `last`, and calls finish(strip, sums) for each.
template <class Cell, int Rows, class Finish>
void tile_of_strips(const SparseWeight& w, const char* tile, int64_t first, int64_t last, typename Cell::Lane* sums,
                    const Finish& finish) {
  int64_t chunks = parts_of(w.blocks(), chunk_blocks(sizeof(typename Cell::Value)));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t strip = first; strip < last; ++strip) {
      typename Cell::Lane* own = sums + (strip - first) * kStrip * Rows;
      add_chunk<Cell, Rows>(w, tile, strip, chunk, chunks, own);
      if (chunk + 1 == chunks) finish(strip, own);
    }
  }
}

// Calls emit(row, output, lanes, vector of outputs) for a strip's sums, which are turned for it, row by row. What it
// will write to y is fetched meanwhile. `emit` comes by value: what lies in memory would be read again after each
// store.
template <int Rows, class T, class Emit>
inline void turn_strip(const void* sums, T* y, int64_t n, int64_t strip, int64_t first_row, int64_t rows, Emit emit) {
  alignas(64) int32_t turned[kLanes * kStrip];
  int64_t column = strip * kStrip;
  int outputs = static_cast<int>(smaller(kStrip, n - column));
  for (int64_t part = 0; part < smaller(Rows, rows - first_row); part += kLanes) {
    int64_t last = smaller(part + kLanes, rows - first_row);
    for (int output = 0; output < outputs; output += kLanes) {
      const T* out = y + (first_row + part) * n + column + output;
      for (int64_t row = part; row < last; ++row, out += n) __builtin_prefetch(out, 1);
      transpose(static_cast<const int32_t*>(sums) + output * Rows + part, Rows, turned + output, kStrip);
    }
    for (int64_t row = part; row < last; ++row) {
      const int32_t* of_row = turned + (row - part) * kStrip;
      int output = 0;
      for (; output + kLanes <= outputs; output += kLanes) {
        emit(first_row + row, column + output, kLanes, of_row + output);
      }
      if (output < outputs) emit(first_row + row, column + output, outputs - output, of_row + output);
    }
  }
}

// Runs of strips that one task takes: its sums, kRunStrips * kStrip * kTileRows, stay in L2.
constexpr int64_t kRunStrips = 4;
constexpr int64_t kRunSums = kRunStrips * kStrip * kTileRows;

// Calls fill(first row) for every kLanes rows of tiles, then make<Rows>(tile, first strip, behind the last) for every
// tile and run of strips, tile by tile: a thread then finds in its cache the activations that it brought there itself.
template <class Fill, class Make>
void for_strips(const SparseWeight& w, const Tiles& tiles, const Fill& fill, const Make& make) {
  int64_t strips = parts_of(w.n, kStrip);
  int64_t wanted = parts_of(4 * max_threads(), tiles.count());  // enough tasks for threads of uneven speed
  int64_t runs = smaller(strips, wanted > parts_of(strips, kRunStrips) ? wanted : parts_of(strips, kRunStrips));
  auto fill_part = [&](int64_t part) { fill(part * kLanes); };
  auto make_part = [&](int64_t task) {
    int64_t tile = task / runs, run = task % runs;
    int64_t first = run * strips / runs, last = (run + 1) * strips / runs;
    tiles.width_of(tile) == kTileRows ? make.template operator()<kTileRows>(tile, first, last)
                                      : make.template operator()<kSmallTileRows>(tile, first, last);
  };
  // To fill in an input takes about as long as 4 multiply-adds.
  bool threads = tiles.rows * (w.slots + w.k) * 4 >= kMinMacsForThreads;
  parallel_for_after(parts_of(tiles.rows, kLanes), fill_part, tiles.count() * runs, threads, make_part);
}

// Calls make<R>(first row, panel) for every panel and at most Most rows at a time, which read the weights together.
template <int Most, class Make>
void for_panels(const SparseWeight& w, int64_t rows, const Make& make) {
  int64_t panels = packed_panels(w.n), runs = smaller(panels, 16 * max_threads());
  RowBlocks blocks(rows, Most);
  parallel_for(runs, rows * w.slots * 4 >= kMinMacsForThreads, [&](int64_t run) {
    for (int64_t panel = run * panels / runs; panel < (run + 1) * panels / runs; ++panel) {
      for (int64_t b = 0; b < blocks.count; ++b) {
        with_sizes<Most, 1>(blocks.size(b), 1,
                            [&]<int R, int>() { make.template operator()<R>(blocks.start(b), panel); });
      }
    }
  });
}

// Calls add<chain>(windows, slot) for the steps of a panel, in turn for two chains of sums, so that none need wait for
// the one before; `windows` is what open(first block) returns.
template <class Open, class Add>
inline void for_steps(const SparseWeight& w, int64_t panel, const Open& open, const Add& add) {
  int64_t windows = parts_of(w.blocks(), kWindow);
  int64_t slot = w.first[panel], left = (w.first[panel + 1] - slot) / kPanel;
  for (int64_t i = 0; i < windows; ++i) {
    auto opened = open(i * kWindow);
    int64_t steps = take(w.steps[panel * windows + i], left);
    for (; steps >= 2; steps -= 2, slot += 2 * kPanel) {
      add.template operator()<0>(opened, slot);
      add.template operator()<1>(opened, slot + kPanel);
    }
    if (steps == 1) {
      add.template operator()<0>(opened, slot);
      slot += kPanel;
    }
  }
}

}  // namespace
