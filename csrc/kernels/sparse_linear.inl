// y = activation(x w^T + bias) + residual in floats, with weights of which only the blocks of 4 inputs that are not all
// zero are stored. Sums run over those blocks in the order of the inputs, by fused multiply-adds where the ISA has
// them.
// A row with a NaN or an infinity counts as zeros, and a NaN is added at its end: slots that are padding meet any
// input.

#include "sparse.inl"

namespace {

struct FloatCell {
  using Value = float;
  using Lane = float;
  using Sum = F;
  static constexpr int kRowBytes = 16;  // of one row and block
  static Sum start(const SparseWeight&, int64_t) { return set1(0.0f); }
  static Sum read(const Lane* p) { return load(p); }
  static void write(Lane* p, Sum a) { store(p, a); }
  template <int V>
  static void add(Sum (&acc)[kOutputsAtOnce][V], const char* const (&cells)[kOutputsAtOnce], const Value* values) {
#pragma GCC unroll 64
    for (int o = 0; o < kOutputsAtOnce; ++o) {
      auto x = reinterpret_cast<const float*>(cells[o]);
      I w[4];
      spread(values + 4 * o, w);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 64
        for (int v = 0; v < V; ++v) acc[o][v] = fma(load(x + (i * V + v) * kLanes), from_bits(w[i]), acc[o][v]);
      }
    }
  }
};

struct FloatScratch {
  float* ends;        // of the rows of a pass: 0, or NaN
  float* cells;       // tiles, or rows with the inputs of a window as [4][kWindow]
  float* per_thread;  // kLanes rows before they are transposed, and sums
  int64_t tile_floats, row_floats, thread_floats;

  float* mine() const { return per_thread + thread_index() * thread_floats; }
  float* sums() const { return mine() + kLanes * row_floats; }

  FloatScratch(const SparseLinear& a, const Tiles& tiles)
      : ends(static_cast<float*>(a.scratch)), cells(ends + kRowsPerPass) {
    int64_t blocks = a.weight.blocks();
    tile_floats = tile_blocks(blocks) * tiles.width * 4;
    row_floats = round_up(blocks, kWindow) * 4 + kLanes;
    thread_floats = kLanes * row_floats + kRunSums;
    per_thread = cells + round_up(a.weight.few ? tiles.rows * row_floats : tiles.count() * tile_floats, 16);
  }
};

size_t sparse_linear_scratch(const SparseLinear& a) {
  FloatScratch s(a, Tiles(smaller(a.m, kRowsPerPass), a.weight));
  return static_cast<size_t>(s.per_thread - s.ends + max_threads() * s.thread_floats) * sizeof(float);
}

// A row as float32, with zeros for the inputs that its last block lacks; returns its end.
template <class T>
float float_row(const SparseLinear& a, int64_t row, float* to) {
  Plain<T> x{static_cast<const T*>(a.x.data) + row * a.k};
  I bits = izero();
  for_scaled(x, a.k, 1.0f, [&](int64_t i, F v) {
    bits = magnitude_max(bits, v);
    store(to + i, v);
  });
  if (itop(bits) < 0x7f800000) return 0.0f;
  memset(to, 0, static_cast<size_t>(round_up(a.k, 4)) * sizeof(float));
  return __builtin_nanf("");
}

template <class T>
void fill_tile(const SparseLinear& a, const FloatScratch& s, const Tiles& tiles, int64_t first, int64_t row) {
  int64_t inputs = round_up(a.k, 4), count = smaller(kLanes, tiles.rows - row), tile = row / tiles.width;
  for (int64_t r = 0; r < kLanes; ++r) {
    float* to = s.mine() + r * s.row_floats;
    r < count ? static_cast<void>(s.ends[row + r] = float_row<T>(a, first + row + r, to))
              : static_cast<void>(memset(to, 0, static_cast<size_t>(inputs) * sizeof(float)));
  }
  int64_t width = tiles.width_of(tile);
  auto out = reinterpret_cast<int32_t*>(s.cells + tile * s.tile_floats) + row % tiles.width;
  for (int64_t i = 0; i < inputs; i += kLanes) {
    transpose(reinterpret_cast<const int32_t*>(s.mine()) + i, s.row_floats, out + i * width, width);
  }
}

// The inputs of a window apart: all first ones of its blocks, all second ones, ..
template <class T>
void fill_row(const SparseLinear& a, const FloatScratch& s, int64_t first, int64_t row) {
  float *from = s.mine(), *to = s.cells + row * s.row_floats;
  s.ends[row] = float_row<T>(a, first + row, from);
  for (int64_t i = 0; i < round_up(a.k, 4); ++i) {
    constexpr int64_t kInputs = 4 * kWindow;
    to[i / kInputs * kInputs + i % 4 * kWindow + i % kInputs / 4] = from[i];
  }
}

template <class T>
void finish(const SparseLinear& a, int64_t row, int64_t column, int columns, const F* sums) {
  with_activation(a.activation, [=, &a]<Activation A>() {
    const Output<T> output(a);
    const F* at = sums;
    int width = columns;
    for (int c = 0; c < width; c += kLanes) {
      output.template write<A>(row, column + c, static_cast<int>(smaller(width - c, kLanes)), at[c / kLanes]);
    }
  });
}

template <class T, int Rows>
void many_rows(const SparseLinear& a, const FloatScratch& s, const Tiles& tiles, int64_t first, int64_t tile,
               int64_t from, int64_t to) {
  auto end = [&](int64_t strip, const float* sums) {
    with_activation(a.activation, [&]<Activation A>() {
      const Output<T> output(a);
      int64_t first_row = first;
      const float* ends = s.ends;
      turn_strip<Rows>(sums, output.y + first_row * a.n, a.n, strip, tile * tiles.width, tiles.rows,
                       [=](int64_t row, int64_t column, int lanes, const int32_t* turned) {
                         F y = add(from_bits(iload(turned)), set1(ends[row]));
                         output.template write<A>(first_row + row, column, lanes, y);
                       });
    });
  };
  auto cells = reinterpret_cast<const char*>(s.cells + tile * s.tile_floats);
  tile_of_strips<FloatCell, Rows>(a.weight, cells, from, to, s.sums(), end);
}

template <class T>
void few_rows(const SparseLinear& a, const FloatScratch& s, int64_t first, int64_t row, int64_t panel) {
  constexpr int V = kVectorsPerPanel;
  const SparseWeight& w = a.weight;
  struct Windows {
    Window of[4];
  };
  F acc[2][V];
#pragma GCC unroll 64
  for (int v = 0; v < 2 * V; ++v) acc[v / V][v % V] = set1(0.0f);
  auto open = [&](int64_t block) {
    Windows windows;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      windows.of[i] = window(reinterpret_cast<const int32_t*>(s.cells + row * s.row_floats) + block * 4 + i * kWindow);
    }
    return windows;
  };
  auto values = static_cast<const float*>(w.values);
  for_steps(w, panel, open, [&]<int Chain>(const Windows& windows, int64_t slot) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        F x = from_bits(pick(windows.of[i], w.index + slot + v * kLanes));
        acc[Chain][v] = fma(x, load(values + slot * 4 + i * kPanel + v * kLanes), acc[Chain][v]);
      }
    }
  });
  F total[V];
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) total[v] = add(add(acc[0][v], acc[1][v]), set1(s.ends[row]));
  int64_t column = panel * kPanel;
  finish<T>(a, first + row, column, static_cast<int>(smaller(kPanel, w.n - column)), total);
}

template <class T>
void sparse_linear_of(const SparseLinear& a) {
  for (int64_t first = 0; first < a.m; first += kRowsPerPass) {
    int64_t rows = smaller(kRowsPerPass, a.m - first);
    Tiles tiles(rows, a.weight);
    FloatScratch s(a, tiles);
    if (a.weight.few) {
      parallel_for(rows, rows * a.k >= kMinQuantiseForThreads, [&](int64_t row) { fill_row<T>(a, s, first, row); });
      for_panels<1>(a.weight, rows, [&]<int>(int64_t row, int64_t panel) { few_rows<T>(a, s, first, row, panel); });
    } else {
      for_strips(
          a.weight, tiles, [&](int64_t row) { fill_tile<T>(a, s, tiles, first, row); },
          [&]<int Rows>(int64_t tile, int64_t from, int64_t to) {
            many_rows<T, Rows>(a, s, tiles, first, tile, from, to);
          });
    }
  }
}

void sparse_linear(const SparseLinear& a) {
  if (a.m == 0 || a.n == 0) return;
  a.x.type == Type::f32 ? sparse_linear_of<float>(a) : sparse_linear_of<bf16>(a);
}

}  // namespace
