// y = activation(scale_x[m] scale_w[n] (xq wq^T) + bias) + residual, with xq quantised here: per row, symmetric, to
// [-127, 127].
//
// A row's scale is max|x| / 127, and xq = round_even(x * (127 / max|x|)). A row with a NaN or an infinity gives NaN
// outputs; one whose values are all below 2^-100 counts as zero. Sums are exact int32 for k <=
// kMaxFeatures, which the caller checks. Bounds: m n k multiply-adds at the ISA's byte dot-product rate, n k bytes of
// weights at the bandwidth of the memory level that holds them.
//
// Tiles of kRows x (kPanelsPerTile * 16) sums stay in registers over all of k. A task owns a tile's panels and walks
// down the rows, so that its weights (at most 64 k bytes) stay in L2 while the rows stream by.

#include "activation.inl"

namespace {

constexpr int kVectorsPerPanel = kPanel / kLanes;
constexpr int64_t kRowsPerPass = 1024;               // bounds the scratch memory
constexpr int64_t kMinMacsForThreads = 1 << 18;      // about 10 us of one core; a fork and join take about 2
constexpr int64_t kMinQuantiseForThreads = 1 << 16;  // also about 10 us
constexpr float kSmallestRow = 0x1p-100f;

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Bytes of a quantised row: whole vectors.
inline int64_t row_bytes(int64_t k) { return round_up(k, kPanel) / 4 * kQuadBytes; }

struct RowScale {
  float scale;
  int32_t sum;  // of |xq| over the row's negative xq
};

// Writes the row's quads `stride` bytes apart.
template <class T>
RowScale quantise_row(const T* x, int64_t k, int8_t* q, int64_t stride) {
  I bits = izero();
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) bits = magnitude_max(bits, load(x + i));
  if (i < k) bits = magnitude_max(bits, load_n(x + i, static_cast<int>(k - i), 0.0f));
  int32_t top_bits = itop(bits);
  float largest;
  memcpy(&largest, &top_bits, 4);
  bool finite = top_bits < 0x7f800000;
  if (!finite || largest < kSmallestRow) {
    for (int64_t g = 0; g < packed_groups(k); ++g) memset(q + g * stride, kZeroQuad, kQuadBytes);
    return {finite ? 0.0f : __builtin_nanf(""), 0};
  }
  F inverse = set1(127.0f / largest);
  NegativeSum negative;
  for (i = 0; i + kLanes <= k; i += kLanes) {
    store_quads(q + i / 4 * stride + i % 4, stride, mul(load(x + i), inverse), negative);
  }
  for (; i < round_up(k, 4); i += kLanes) {  // the tail, filled up with zeros
    F v = load_n(x + i, static_cast<int>(k - i), 0.0f);
    store_quads(q + i / 4 * stride + i % 4, stride, mul(v, inverse), negative);
  }
  return {largest / 127.0f, negative.total()};
}

// Rows are cut into blocks that differ by at most one row: 8 rows are 4 + 4, not 6 + 2. In memory the quads of a block
// are interleaved, [k/4][rows of the block], so that a tile reads one stream.
inline int64_t row_blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }
inline int64_t block_start(int64_t block, int64_t rows) { return block * rows / row_blocks(rows); }

template <class T>
void quantise_block(const T* x, int64_t k, int64_t rows, int8_t* q, RowScale* scales) {
  for (int64_t r = 0; r < rows; ++r) scales[r] = quantise_row(x + r * k, k, q + r * kQuadBytes, rows * kQuadBytes);
}

// What of the weights a tile prefetches: `start` bytes from its own, `step` bytes per group.
struct Ahead {
  int64_t start, step;
};

// A strip of weights is used by `blocks` tiles in turn. Each fetches its share of the next strip, so that the strip's
// bytes are spread over all the time that the multiplications take (cold weights, 8 rows: 1.2 times the speed). A strip
// that is used once is fetched just ahead, past the page where the hardware prefetcher stops.
inline Ahead ahead(int64_t block, int64_t blocks, int64_t panel) {
  if (blocks == 1) return {2048, 4 * kPanel};
  return {kPanelsPerTile * panel + block * panel / blocks, 4 * kPanel / blocks};
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
  int64_t first_row, rows;
};

// Multiplication and addition stay separate (and contraction is off), so that every ISA gives the same bits.
template <class T, Activation A>
void finish(const Pass& s, int64_t row, int rows, int64_t column, int columns, const I* sums) {
  const Int8Linear& a = s.a;
  for (int c = 0; c < columns; c += kLanes, sums += rows) {
    int n = static_cast<int>(smaller(columns - c, kLanes));
    F scale = load_n(a.scale + column + c, n, 0.0f);
    F bias = set1(0.0f);
    if (a.bias.data != nullptr) {
      bias = a.bias.type == Type::f32 ? load_n(static_cast<const float*>(a.bias.data) + column + c, n, 0.0f)
                                      : load_n(static_cast<const bf16*>(a.bias.data) + column + c, n, 0.0f);
    }
    for (int r = 0; r < rows; ++r) {
      F y = mul(to_float(sums[r]), mul(set1(s.scales[row + r].scale), scale));
      if (a.bias.data != nullptr) y = add(y, bias);
      y = activate<A>(y);
      int64_t at = (s.first_row + row + r) * a.n + column + c;
      if (a.residual.data != nullptr) y = add(y, load_n(static_cast<const T*>(a.residual.data) + at, n, 0.0f));
      T* out = static_cast<T*>(a.y.data) + at;
      n == kLanes ? store(out, y) : store_n(out, y, n);
    }
  }
}

template <class T>
void finish(const Pass& s, int64_t row, int rows, int64_t column, int columns, const I* sums) {
  switch (s.a.activation) {
    case Activation::none:
      return finish<T, Activation::none>(s, row, rows, column, columns, sums);
    case Activation::relu:
      return finish<T, Activation::relu>(s, row, rows, column, columns, sums);
    case Activation::gelu:
      return finish<T, Activation::gelu>(s, row, rows, column, columns, sums);
    case Activation::gelu_tanh:
      return finish<T, Activation::gelu_tanh>(s, row, rows, column, columns, sums);
    case Activation::silu:
      return finish<T, Activation::silu>(s, row, rows, column, columns, sums);
  }
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
  sums<R, P>(s.q + row * row_bytes(a.k), s.scales + row, a.weight + panel * panel_bytes(a.k), panel_bytes(a.k),
             packed_groups(a.k), fetch, acc);
  I waiting[kVectors * R];  // for one epilogue of all tile sizes: 2 % of the tile's time at 768 inputs
#pragma GCC unroll 64
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) waiting[v * R + r] = acc[r][v];
  }
  int64_t column = panel * kPanel;
  finish<T>(s, row, R, column, static_cast<int>(smaller(a.n - column, P * kPanel)), waiting);
}

template <class T, int P, int R = kRows>
void tile_rows(const Pass& s, int64_t row, int rows, int64_t panel, Ahead fetch) {
  if constexpr (R > 0) {
    if (rows == R) return tile<T, R, P>(s, row, panel, fetch);
    tile_rows<T, P, R - 1>(s, row, rows, panel, fetch);
  }
}

template <class T, int P = kPanelsPerTile>
void tile_panels(const Pass& s, int64_t row, int rows, int64_t panel, int64_t panels, Ahead fetch) {
  if constexpr (P > 0) {
    if (panels >= P) return tile_rows<T, P>(s, row, rows, panel, fetch);
    tile_panels<T, P - 1>(s, row, rows, panel, panels, fetch);
  }
}

template <class T>
void multiply(const Pass& s) {
  const Int8Linear& a = s.a;
  int64_t panels = packed_panels(a.n);
  int64_t strips = (panels + kPanelsPerTile - 1) / kPanelsPerTile;
  int64_t blocks = row_blocks(s.rows);
  int64_t wanted = 4 * max_threads();  // enough tasks for threads of uneven speed
  int64_t cuts = smaller(blocks, strips >= wanted ? 1 : (wanted + strips - 1) / strips);
  parallel_for(strips * cuts, s.rows * a.n * a.k >= kMinMacsForThreads, [&](int64_t task) {
    int64_t panel = task / cuts * kPanelsPerTile;
    int64_t first = task % cuts * blocks / cuts, last = (task % cuts + 1) * blocks / cuts;
    for (int64_t b = first; b < last; ++b) {
      int64_t row = block_start(b, s.rows);
      int rows = static_cast<int>(block_start(b + 1, s.rows) - row);
      tile_panels<T>(s, row, rows, panel, panels - panel, ahead(b - first, last - first, panel_bytes(a.k)));
    }
  });
}

template <class T>
void int8_linear_of(const Int8Linear& a) {
  auto scales = static_cast<RowScale*>(a.scratch);
  auto q = reinterpret_cast<int8_t*>(scales + kRowsPerPass);
  for (int64_t first = 0; first < a.m; first += kRowsPerPass) {
    int64_t rows = smaller(kRowsPerPass, a.m - first);
    parallel_for(row_blocks(rows), rows * a.k >= kMinQuantiseForThreads, [&](int64_t block) {
      int64_t row = block_start(block, rows);
      quantise_block(static_cast<const T*>(a.x.data) + (first + row) * a.k, a.k, block_start(block + 1, rows) - row,
                     q + row * row_bytes(a.k), scales + row);
    });
    multiply<T>({a, q, scales, first, rows});
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
