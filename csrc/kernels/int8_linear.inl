// y = activation(scale_x[m] scale_w[n] (xq wq^T) + bias) + residual, with x, times the factors of its inputs if there
// are any, quantised here to xq: per row, symmetric, to [-127, 127] (linear.inl).
//
// Sums are exact int32 for k <= kMaxFeatures, which the caller checks. Bounds: m n k multiply-adds at the ISA's byte
// dot-product rate, n k bytes of weights at the bandwidth of the memory level that holds them.
//
// Tiles of kRows x (kPanelsPerTile * 16) sums stay in registers over all of k. A strip's weights are at most 64 k
// bytes.

#include "activation.inl"

namespace {

// Bytes of a quantised row: whole vectors.
inline int64_t row_bytes(int64_t k) { return round_up(k, kPanel) / 4 * kQuadBytes; }

struct RowScale {
  float scale;
  int32_t sum;  // of |xq| over the row's negative xq
};

// Writes the row's quads `stride` bytes apart.
template <class Row>
RowScale quantise_row(const Row& row, int64_t k, int8_t* q, int64_t stride) {
  RowRange range = row_range(row, k);
  NegativeSum negative;
  if (range.inverse == 0.0f) {
    for (int64_t g = 0; g < packed_groups(k); ++g) memset(q + g * stride, kZeroQuad, kQuadBytes);
  } else {
    for_scaled(row, k, range.inverse,
               [&](int64_t i, F v) { store_quads(q + i / 4 * stride + i % 4, stride, v, negative); });
  }
  return {range.scale, negative.total()};
}

template <class T>
void quantise_block(const T* x, const float* factor, int64_t k, int64_t rows, int8_t* q, RowScale* scales) {
  int64_t stride = rows * kQuadBytes;
  for (int64_t r = 0; r < rows; ++r, x += k, q += kQuadBytes) {
    scales[r] = factor == nullptr ? quantise_row(Plain<T>{x}, k, q, stride)
                                  : quantise_row(Smoothed<T>{x, factor}, k, q, stride);
  }
}

// The unroll pragmas put the sums into registers: without them gcc keeps the array in memory, a third slower.
template <int R, int P>
inline void sums(const int8_t* q, const RowScale* rows, const int8_t* w, int64_t w_stride, int64_t groups, Ahead fetch,
                 I (&acc)[R][P * kVectorsPerPanel]) {
#pragma GCC unroll 64
  for (int v = 0; v < P * kVectorsPerPanel; ++v) {
    const int8_t* tail = w + v / kVectorsPerPanel * w_stride + groups * 4 * kPanel;
    I columns = iload(reinterpret_cast<const int32_t*>(tail) + v % kVectorsPerPanel * kLanes);
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) acc[r][v] = start(columns, rows[r].sum);
  }
  const int8_t* next = w + fetch.start;
  for (int64_t g = 0; g < groups; ++g, next += fetch.step) {
    Weights wv[P * kVectorsPerPanel];
#pragma GCC unroll 64
    for (int v = 0; v < P * kVectorsPerPanel; ++v) {
      wv[v] = weights(w + v / kVectorsPerPanel * w_stride + (g * kPanel + v % kVectorsPerPanel * kLanes) * 4);
    }
#pragma GCC unroll 64
    for (int p = 0; p < P; ++p) __builtin_prefetch(next + p * w_stride);
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) {
      dot(acc[r], wv, q + (g * R + r) * kQuadBytes);
    }
  }
}

// One row reads its weights as one stream, a panel at a time: several streams of cold memory are slower (768 inputs and
// 8192 outputs: 1.35 times the time). Groups are added up in turn by several chains of sums, so that none waits for the
// one before.
constexpr int kRowChains = kVectorsPerPanel < 4 ? 4 / kVectorsPerPanel : 1;

inline void row_sums(const int8_t* q, const RowScale& row, const int8_t* w, int64_t groups, Ahead fetch,
                     I (&acc)[kVectorsPerPanel]) {
  I chains[kRowChains][kVectorsPerPanel];
#pragma GCC unroll 64
  for (int i = 0; i < kRowChains * kVectorsPerPanel; ++i) {
    int c = i / kVectorsPerPanel, v = i % kVectorsPerPanel;
    I columns = iload(reinterpret_cast<const int32_t*>(w + groups * 4 * kPanel) + v * kLanes);
    chains[c][v] = c == 0 ? start(columns, row.sum) : izero();
  }
  auto add_group = [&](int64_t g, I(&chain)[kVectorsPerPanel]) {
    const int8_t* at = w + g * 4 * kPanel;
    Weights wv[kVectorsPerPanel];
#pragma GCC unroll 64
    for (int v = 0; v < kVectorsPerPanel; ++v) wv[v] = weights(at + v * kLanes * 4);
    __builtin_prefetch(at + fetch.start);
    dot(chain, wv, q + g * kQuadBytes);
  };
  int64_t g = 0;
  for (; g + kRowChains <= groups; g += kRowChains) {
#pragma GCC unroll 64
    for (int c = 0; c < kRowChains; ++c) add_group(g + c, chains[c]);
  }
  for (; g < groups; ++g) add_group(g, chains[0]);
#pragma GCC unroll 64
  for (int v = 0; v < kVectorsPerPanel; ++v) {
    acc[v] = chains[0][v];
#pragma GCC unroll 64
    for (int c = 1; c < kRowChains; ++c) acc[v] = iadd(acc[v], chains[c][v]);
  }
}

struct Pass {  // one pass over at most kRowsPerPass rows
  const Int8Linear& a;
  const int8_t* q;  // quantised rows
  const RowScale* scales;
  int64_t first_row;
};

// Multiplication and addition stay separate (and contraction is off), so that every ISA gives the same bits.
template <class T>
void finish(const Pass& s, int64_t row, int rows, int64_t column, int columns, const I* sums) {
  with_activation(s.a.activation, [=, &s]<Activation A>() {
    const Output<T> output(s.a);
    const float* scales = s.a.scale + column;
    const RowScale* of_rows = s.scales + row;
    const I* at = sums;
    int64_t first_row = s.first_row + row;
    int count = rows, width = columns;
    for (int c = 0; c < width; c += kLanes, at += count) {
      int n = static_cast<int>(smaller(width - c, kLanes));
      F scale = load_n(scales + c, n, 0.0f);
      for (int r = 0; r < count; ++r) {
        F y = mul(to_float(at[r]), mul(set1(of_rows[r].scale), scale));
        output.template write<A>(first_row + r, column + c, n, y);
      }
    }
  });
}

// Rows of y lie pages apart: fetched while the sums are made, their lines do not stall the stores (3 % at 3072
// outputs).
template <class T>
void fetch_output(const Pass& s, int64_t row, int rows, int64_t column, int columns) {
  for (int r = 0; r < rows; ++r) {
    const T* out = static_cast<const T*>(s.a.y.data) + (s.first_row + row + r) * s.a.n + column;
    for (int c = 0; c < columns; c += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(out + c, 1);
  }
}

template <class T, int R, int P>
void tile(const Pass& s, int64_t row, int64_t panel, Ahead fetch) {
  constexpr int kVectors = P * kVectorsPerPanel;
  const Int8Linear& a = s.a;
  I acc[R][kVectors];
  fetch_output<T>(s, row, R, panel * kPanel, P * kPanel);
  const int8_t *q = s.q + row * row_bytes(a.k), *w = a.weight + panel * panel_bytes(a.k);
  if constexpr (R == 1 && P == 1) {
    row_sums(q, s.scales[row], w, packed_groups(a.k), fetch, acc[0]);
  } else {
    sums<R, P>(q, s.scales + row, w, panel_bytes(a.k), packed_groups(a.k), fetch, acc);
  }
  I waiting[kVectors * R];  // for one epilogue of all tile sizes: 2 % of the tile's time at 768 inputs
#pragma GCC unroll 64
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) waiting[v * R + r] = acc[r][v];
  }
  int64_t column = panel * kPanel;
  finish<T>(s, row, R, column, static_cast<int>(smaller(a.n - column, P * kPanel)), waiting);
}

template <class T>
void int8_linear_of(const Int8Linear& a) {
  auto scales = static_cast<RowScale*>(a.scratch);
  auto q = reinterpret_cast<int8_t*>(scales + kRowsPerPass);
  for (int64_t first = 0; first < a.m; first += kRowsPerPass) {
    int64_t rows = smaller(kRowsPerPass, a.m - first);
    RowBlocks blocks(rows, kRows);
    parallel_for(blocks.count, rows * a.k >= kMinQuantiseForThreads, [&](int64_t block) {
      int64_t row = blocks.start(block);
      quantise_block(static_cast<const T*>(a.x.data) + (first + row) * a.k, a.factor, a.k, blocks.size(block),
                     q + row * row_bytes(a.k), scales + row);
    });
    Pass pass{a, q, scales, first};
    auto make = [&]<int R, int P>(int64_t row, int64_t panel, Ahead fetch) { tile<T, R, P>(pass, row, panel, fetch); };
    int64_t panels = packed_panels(a.n), bytes = panel_bytes(a.k);
    bool threads = rows * a.n * a.k >= kMinMacsForThreads;
    if (rows == 1) {
      for_tiles<1, 1>(rows, panels, bytes, threads, make);
    } else {
      for_tiles<kRows, kPanelsPerTile>(rows, panels, bytes, threads, make);
    }
  }
}

void int8_linear(const Int8Linear& a) {
  if (a.m == 0 || a.n == 0) return;
  a.x.type == Type::f32 ? int8_linear_of<float>(a) : int8_linear_of<bf16>(a);
}

size_t int8_linear_scratch(int64_t m, int64_t, int64_t k) {
  int64_t rows = smaller(m, kRowsPerPass);
  return static_cast<size_t>(kRowsPerPass * sizeof(RowScale) + rows * row_bytes(k));
}

}  // namespace
