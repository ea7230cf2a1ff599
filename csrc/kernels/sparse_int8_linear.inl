// int8_linear with weights of which only the blocks of 4 inputs that are not all zero are stored: the same integers,
// and so the same bits, as int8_linear of the weights with their zeros.

#include "sparse.inl"

namespace {

constexpr int kFewRows = 4;  // that read the weights together: 8 registers of windows, 8 of sums

struct Int8Cell {
  using Value = int8_t;
  using Lane = int32_t;
  using Sum = I;
  static constexpr int kRowBytes = 4;  // of one row and block
  static Sum start(const SparseWeight& w, int64_t output) { return ::start(iset1(w.sums[output]), 0); }
  static Sum read(const Lane* p) { return iload(p); }
  static void write(Lane* p, Sum a) { istore(p, a); }
  template <int V>
  static void add(Sum (&acc)[kOutputsAtOnce][V], const char* const (&cells)[kOutputsAtOnce], const Value* values) {
    I w[kOutputsAtOnce];
    spread(values, w);
#pragma GCC unroll 64
    for (int o = 0; o < kOutputsAtOnce; ++o) {
      auto x = reinterpret_cast<const int32_t*>(cells[o]);
#pragma GCC unroll 64
      for (int v = 0; v < V; ++v) acc[o][v] = dot_cells(acc[o][v], iload(x + v * kLanes), w[o]);
    }
  }
};

// Bytes of a row of cells that windows are read from: whole ones, and what a last vector is written too far.
inline int64_t cell_row_bytes(int64_t blocks) { return round_up(blocks, kWindow) * 4 + 64; }

template <class Row>
float cell_row(const Row& row, int64_t k, int8_t* cells) {
  RowRange range = row_range(row, k);
  if (range.inverse == 0.0f) {
    memset(cells, kZeroCell, static_cast<size_t>(round_up(k, 4)));
  } else {
    for_scaled(row, k, range.inverse, [&](int64_t i, F v) { store_cells(cells + i, v); });
  }
  return range.scale;
}

template <class T>
RowScale cell_row(const SparseInt8Linear& a, int64_t row, int8_t* cells) {
  auto x = static_cast<const T*>(a.dense.x.data) + row * a.dense.k;
  float scale = a.dense.factor == nullptr ? cell_row(Plain<T>{x}, a.dense.k, cells)
                                          : cell_row(Smoothed<T>{x, a.dense.factor}, a.dense.k, cells);
  return {scale, 0};
}

struct SparseScratch {
  RowScale* scales;   // of a pass
  char* cells;        // tiles, or rows
  char* per_thread;   // rows of cells before they are transposed, and sums
  int64_t row_bytes;  // of a row of cells
  int64_t tile_bytes;

  int64_t thread_bytes() const { return kLanes * row_bytes + kRunSums * 4; }
  char* mine() const { return per_thread + thread_index() * thread_bytes(); }
  int32_t* sums() const { return reinterpret_cast<int32_t*>(mine() + kLanes * row_bytes); }

  SparseScratch(const SparseInt8Linear& a, const Tiles& tiles)
      : row_bytes(cell_row_bytes(a.weight.blocks())), tile_bytes(tile_blocks(a.weight.blocks()) * tiles.width * 4) {
    scales = static_cast<RowScale*>(a.dense.scratch);
    cells = reinterpret_cast<char*>(scales + kRowsPerPass);
    per_thread = cells + (a.weight.few ? tiles.rows * row_bytes : tiles.count() * tile_bytes);
  }
};

size_t sparse_int8_linear_scratch(const SparseInt8Linear& a) {
  SparseScratch s(a, Tiles(smaller(a.dense.m, kRowsPerPass), a.weight));
  return static_cast<size_t>(s.per_thread - static_cast<char*>(a.dense.scratch) + max_threads() * s.thread_bytes());
}

// Quantises kLanes rows, or what is left of them, into their place in a tile.
template <class T>
void fill_tile(const SparseInt8Linear& a, const SparseScratch& s, const Tiles& tiles, int64_t first, int64_t row) {
  auto cells = reinterpret_cast<int8_t*>(s.mine());
  int64_t blocks = a.weight.blocks(), count = smaller(kLanes, tiles.rows - row), tile = row / tiles.width;
  for (int r = 0; r < kLanes; ++r) {
    int8_t* to = cells + r * s.row_bytes;
    r < count ? static_cast<void>(s.scales[row + r] = cell_row<T>(a, first + row + r, to))
              : static_cast<void>(memset(to, kZeroCell, static_cast<size_t>(blocks * 4)));
  }
  int64_t width = tiles.width_of(tile);
  auto out = reinterpret_cast<int32_t*>(s.cells + tile * s.tile_bytes) + row % tiles.width;
  for (int64_t b = 0; b < blocks; b += kLanes) {
    transpose(reinterpret_cast<const int32_t*>(cells) + b, s.row_bytes / 4, out + b * width, width);
  }
}

template <class T, int Rows>
void many_rows(const Pass& pass, const SparseInt8Linear& a, const SparseScratch& s, const Tiles& tiles, int64_t tile,
               int64_t first, int64_t last) {
  const SparseWeight& w = a.weight;
  auto end = [&](int64_t strip, const int32_t* sums) {
    with_activation(a.dense.activation, [&]<Activation A>() {
      const Output<T> output(a.dense);
      const float* scales = a.dense.scale;
      const RowScale* of_rows = pass.scales;
      int64_t first_row = pass.first_row;
      turn_strip<Rows>(sums, output.y + first_row * w.n, w.n, strip, tile * tiles.width, tiles.rows,
                       [=](int64_t row, int64_t column, int lanes, const int32_t* turned) {
                         F scale = mul(set1(of_rows[row].scale), load_n(scales + column, lanes, 0.0f));
                         output.template write<A>(first_row + row, column, lanes, mul(to_float(iload(turned)), scale));
                       });
    });
  };
  tile_of_strips<Int8Cell, Rows>(w, s.cells + tile * s.tile_bytes, first, last, s.sums(), end);
}

template <class T, int R>
void few_rows(const Pass& pass, const SparseInt8Linear& a, const SparseScratch& s, int64_t row, int64_t panel) {
  constexpr int V = kVectorsPerPanel;
  const SparseWeight& w = a.weight;
  struct Windows {
    Window of[R];
  };
  I acc[2][V][R];
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) {
      acc[0][v][r] = start(iload(w.sums + panel * kPanel + v * kLanes), 0);
      acc[1][v][r] = izero();
    }
  }
  auto open = [&](int64_t block) {
    Windows windows;
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) {
      windows.of[r] = window(reinterpret_cast<const int32_t*>(s.cells + (row + r) * s.row_bytes) + block);
    }
    return windows;
  };
  auto values = static_cast<const int8_t*>(w.values);
  for_steps(w, panel, open, [&]<int Chain>(const Windows& windows, int64_t slot) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      I weight = iload(reinterpret_cast<const int32_t*>(values) + slot + v * kLanes);
#pragma GCC unroll 64
      for (int r = 0; r < R; ++r) {
        acc[Chain][v][r] = dot_cells(acc[Chain][v][r], pick(windows.of[r], w.index + slot + v * kLanes), weight);
      }
    }
  });
  I total[V * R];
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) total[v * R + r] = iadd(acc[0][v][r], acc[1][v][r]);
  }
  int64_t column = panel * kPanel;
  finish<T>(pass, row, R, column, static_cast<int>(smaller(kPanel, w.n - column)), total);
}

template <class T>
void sparse_int8_linear_of(const SparseInt8Linear& a) {
  const Int8Linear& dense = a.dense;
  for (int64_t first = 0; first < dense.m; first += kRowsPerPass) {
    int64_t rows = smaller(kRowsPerPass, dense.m - first);
    Tiles tiles(rows, a.weight);
    SparseScratch s(a, tiles);
    Pass pass{dense, nullptr, s.scales, first};
    if (a.weight.few) {
      parallel_for(rows, rows * dense.k >= kMinQuantiseForThreads, [&](int64_t row) {
        s.scales[row] = cell_row<T>(a, first + row, reinterpret_cast<int8_t*>(s.cells) + row * s.row_bytes);
      });
      for_panels<kFewRows>(a.weight, rows,
                           [&]<int R>(int64_t row, int64_t panel) { few_rows<T, R>(pass, a, s, row, panel); });
    } else {
      for_strips(
          a.weight, tiles, [&](int64_t row) { fill_tile<T>(a, s, tiles, first, row); },
          [&]<int Rows>(int64_t tile, int64_t from, int64_t to) {
            many_rows<T, Rows>(pass, a, s, tiles, tile, from, to);
          });
    }
  }
}

void sparse_int8_linear(const SparseInt8Linear& a) {
  if (a.dense.m == 0 || a.dense.n == 0) return;
  a.dense.x.type == Type::f32 ? sparse_int8_linear_of<float>(a) : sparse_int8_linear_of<bf16>(a);
}

}  // namespace
