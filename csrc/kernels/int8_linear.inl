// y = scale_x[m] scale_w[n] (xq wq^T) + bias, with xq quantised here: per row, symmetric, to [-127, 127] (linear.inl).
//
// Sums are exact int32 for k <= kMaxFeatures, which the caller checks. Bounds: m n k multiply-adds at the ISA's byte
// dot-product rate, n k bytes of weights at the bandwidth of the memory level that holds them.
//
// Tiles of kRows x (kPanelsPerTile * 16) sums stay in registers over all of k. A strip's weights are at most 64 k
// bytes.

namespace {

// Bytes of a quantised row: whole vectors.
inline int64_t row_bytes(int64_t k) { return round_up(k, kPanel) / 4 * kQuadBytes; }

struct RowScale {
  float scale;
  int32_t sum;  // of |xq| over the row's negative xq
};

// Writes the row's quads `stride` bytes apart.
template <class T>
RowScale quantise_row(const T* x, int64_t k, int8_t* q, int64_t stride) {
  RowRange range = row_range(x, k);
  NegativeSum negative;
  if (range.inverse == 0.0f) {
    for (int64_t g = 0; g < packed_groups(k); ++g) memset(q + g * stride, kZeroQuad, kQuadBytes);
  } else {
    for_scaled(x, k, range.inverse,
               [&](int64_t i, F v) { store_quads(q + i / 4 * stride + i % 4, stride, v, negative); });
  }
  return {range.scale, negative.total()};
}

template <class T>
void quantise_block(const T* x, int64_t k, int64_t rows, int8_t* q, RowScale* scales) {
  for (int64_t r = 0; r < rows; ++r) scales[r] = quantise_row(x + r * k, k, q + r * kQuadBytes, rows * kQuadBytes);
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

struct Pass {  // one pass over at most kRowsPerPass rows
  const Int8Linear& a;
  const int8_t* q;  // quantised rows
  const RowScale* scales;
  int64_t first_row;
};

// Multiplication and addition stay separate (and contraction is off), so that every ISA gives the same bits.
template <class T, int R, int P>
void tile(const Pass& s, int64_t row, int64_t panel, Ahead fetch) {
  const Int8Linear& a = s.a;
  I acc[R][P * kVectorsPerPanel];
  sums<R, P>(s.q + row * row_bytes(a.k), s.scales + row, a.weight + panel * panel_bytes(a.k), panel_bytes(a.k),
             packed_groups(a.k), fetch, acc);
#pragma GCC unroll 64
  for (int v = 0; v < P * kVectorsPerPanel; ++v) {
    int64_t column = panel * kPanel + v * kLanes;
    int n = static_cast<int>(smaller(a.n - column, kLanes));
    if (n <= 0) return;
    F scale = load_n(a.scale + column, n, 0.0f);
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) {
      F y = add_bias(mul(to_float(acc[r][v]), mul(set1(s.scales[row + r].scale), scale)), a.bias, column, n);
      T* out = static_cast<T*>(a.y.data) + (s.first_row + row + r) * a.n + column;
      n == kLanes ? store(out, y) : store_n(out, y, n);
    }
  }
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
      quantise_block(static_cast<const T*>(a.x.data) + (first + row) * a.k, a.k, blocks.size(block),
                     q + row * row_bytes(a.k), scales + row);
    });
    Pass pass{a, q, scales, first};
    for_tiles<kRows, kPanelsPerTile>(
        rows, packed_panels(a.n), panel_bytes(a.k), rows * a.n * a.k >= kMinMacsForThreads,
        [&]<int R, int P>(int64_t row, int64_t panel, Ahead fetch) { tile<T, R, P>(pass, row, panel, fetch); });
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
