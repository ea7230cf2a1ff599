// y = scale_x[m] (sum over groups g of scale[n, g] sum over i in g of (w[n, i] - zero[n, g]) xq[m, i]) + bias,
// with w and zero in 0..15 (a zero of 8 where none are given) and xq quantised here, per row (linear.inl).
//
// The inner sums are exact integers; the outer one is taken in float32 in the order of the groups, a multiplication and
// an addition each, so that every ISA gives the same bits. sum((w - zero) xq) is computed as sum(w xq) - zero sum(xq):
// an unsigned by a signed byte is what x86 multiplies, and sum(xq) is known before a weight is read.
//
// Bounds: k n / 2 bytes of weights and 2 k n / group of scales at the bandwidth of the memory that holds them (one row:
// 4.5 bits a weight for groups of 32, against 8 of int8_linear); m n k multiply-adds at the ISA's byte dot-product
// rate, plus one multiplication per group. A loaded vector of weights takes two ANDs and a shift to become two
// operands, which run beside the dot products: weights are unpacked in registers for any number of rows, nothing is
// stored unpacked.

namespace {

constexpr int kOctets = kInt4Block / 8;  // vectors of nibbles in a block, per output

inline int64_t block_quads(int64_t k) { return packed_blocks(k) * kInt4Block / 4; }

// A block of rows in memory: their quads interleaved, [k/4][rows], then -sum(xq) of each group, [groups][rows].
inline int64_t nibble_row_bytes(int64_t k, int64_t group) { return (block_quads(k) + packed_scales(k, group)) * 4; }

template <class T>
float quantise_nibble_row(const T* x, int64_t k, int64_t group, int8_t* q, int32_t* sums, int64_t rows) {
  int64_t groups = packed_scales(k, group), stride = rows * 4;
  for (int64_t i = 0; i < block_quads(k); ++i) memset(q + i * stride, 0, 4);
  for (int64_t g = 0; g < groups; ++g) sums[g * rows] = 0;
  Plain<T> row{x};
  RowRange range = row_range(row, k);
  if (range.inverse != 0.0f) {
    for_scaled(row, k, range.inverse, [&](int64_t i, F v) {
      F rounded = round_even(v);
      store_bytes(q + i / 4 * stride + i % 4, stride, rounded);
      sums[i / group * rows] -= static_cast<int32_t>(sum(rounded));
    });
  }
  return range.scale;
}

// Where vector v of a tile of panels lies in an array with `stride` elements per panel and `width` per output.
inline int64_t vector_at(int v, int64_t stride, int64_t width) {
  return v / kVectorsPerPanel * stride + v % kVectorsPerPanel * kLanes * width;
}

// Adds the products of four inputs of R rows at `q` and of the vectors weights(0), weights(1) ..
template <int R, int V, class GetWeights>
inline void dot_quads(NibbleSum (&acc)[R][V], const int8_t* q, const GetWeights& weights) {
  Weights w[V];
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) w[v] = weights(v);
#pragma GCC unroll 64
  for (int r = 0; r < R; ++r) {
    I x = broadcast_quad(q + r * 4);
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) dot_nibbles(acc[r][v], w[v], x);
  }
}

// Adds the products of a block of inputs; `q` points to its quads of R rows, `w` to its weights in the first panel.
// With two chains of sums the high nibbles have their own.
template <int C, int R, int V>
inline void dot_block(NibbleSum (&acc)[C][R][V], const int8_t* q, const uint8_t* w, int64_t w_stride) {
#pragma GCC unroll 64
  for (int o = 0; o < kOctets; ++o) {
    dot_quads(acc[0], q + 2 * o * R * 4,
              [&](int v) { return low_nibbles(w + o * 4 * kPanel + vector_at(v, w_stride, 4)); });
    dot_quads(acc[C - 1], q + (2 * o + 1) * R * 4,
              [&](int v) { return high_nibbles(w + o * 4 * kPanel + vector_at(v, w_stride, 4)); });
  }
#pragma GCC unroll 64
  for (int i = 0; i < C * R * V; ++i) fold(acc[i / (R * V)][i / V % R][i % V]);
}

// y[r][v]: the outer sum of a tile of R rows and P panels.
template <int R, int P, bool kZeros, int V>
inline void scaled_sums(const Int4Linear& a, const int8_t* q, int64_t panel, Ahead fetch, F (&y)[R][V]) {
  int64_t blocks = packed_blocks(a.k), groups = packed_scales(a.k, a.group), blocks_of_group = a.group / kInt4Block;
  int64_t w_stride = blocks * kInt4BlockBytes, s_stride = groups * kPanel;
  const uint8_t* w = a.weight + panel * w_stride;
  const uint8_t* next = w + fetch.start;
  const bf16* scales = a.scale + panel * s_stride;
  const uint8_t* zeros = kZeros ? a.zero + panel * s_stride : nullptr;
  auto row_sums = reinterpret_cast<const int32_t*>(q + block_quads(a.k) * R * 4);
  constexpr int kInt4Chains = R * V < 4 ? 2 : 1;  // few sums would wait for each other
#pragma GCC unroll 64
  for (int i = 0; i < R * V; ++i) y[i / V][i % V] = set1(0.0f);
  for (int64_t left = blocks; left > 0; left -= blocks_of_group) {
    NibbleSum acc[kInt4Chains][R][V];
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      I zero = kZeros ? load_bytes(zeros + vector_at(v, s_stride, 1)) : iset1(8);
#pragma GCC unroll 64
      for (int r = 0; r < R; ++r) {
        acc[kInt4Chains - 1][r][v] = nibble_start(izero());
        acc[0][r][v] = nibble_start(mul16(zero, row_sums[r]));
      }
    }
    for (int64_t b = smaller(left, blocks_of_group); b > 0; --b) {
#pragma GCC unroll 64
      for (int i = 0; i < P * kOctets; ++i) __builtin_prefetch(next + i % P * w_stride + i / P * fetch.step);
      dot_block(acc, q, w, w_stride);
      q += kInt4Block * R;
      w += kInt4BlockBytes;
      next += kOctets * fetch.step;
    }
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      F scale = load(scales + vector_at(v, s_stride, 1));
#pragma GCC unroll 64
      for (int r = 0; r < R; ++r) {
        I sum = total(acc[0][r][v]);
        if (kInt4Chains > 1) sum = iadd(sum, total(acc[kInt4Chains - 1][r][v]));
        y[r][v] = add(y[r][v], mul(to_float(sum), scale));
      }
    }
    row_sums += R;
    scales += kPanel;
    if (kZeros) zeros += kPanel;
  }
}

struct NibblePass {  // one pass over at most kRowsPerPass rows
  const Int4Linear& a;
  const int8_t* q;  // quantised rows
  const float* scales;
  int64_t first_row;
};

template <class T, bool kZeros, int R, int P>
void nibble_tile(const NibblePass& s, int64_t row, int64_t panel, Ahead fetch) {
  const Int4Linear& a = s.a;
  F sums[R][P * kVectorsPerPanel];
  scaled_sums<R, P, kZeros>(a, s.q + row * nibble_row_bytes(a.k, a.group), panel, fetch, sums);
#pragma GCC unroll 64
  for (int v = 0; v < P * kVectorsPerPanel; ++v) {
    int64_t column = panel * kPanel + v * kLanes;
    int n = static_cast<int>(smaller(a.n - column, kLanes));
    if (n <= 0) return;
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) {
      F y = add_bias(mul(sums[r][v], set1(s.scales[row + r])), a.bias, column, n);
      T* out = static_cast<T*>(a.y.data) + (s.first_row + row + r) * a.n + column;
      n == kLanes ? store(out, y) : store_n(out, y, n);
    }
  }
}

template <class T, bool kZeros>
void int4_linear_of(const Int4Linear& a) {
  auto scales = static_cast<float*>(a.scratch);
  auto q = reinterpret_cast<int8_t*>(scales + kRowsPerPass);
  int64_t row_bytes = nibble_row_bytes(a.k, a.group);
  for (int64_t first = 0; first < a.m; first += kRowsPerPass) {
    int64_t rows = smaller(kRowsPerPass, a.m - first);
    RowBlocks blocks(rows, kNibbleRows);
    parallel_for(blocks.count, rows * a.k >= kMinQuantiseForThreads, [&](int64_t block) {
      int64_t row = blocks.start(block), size = blocks.size(block);
      int8_t* begin = q + row * row_bytes;
      auto sums = reinterpret_cast<int32_t*>(begin + block_quads(a.k) * size * 4);
      for (int64_t r = 0; r < size; ++r) {
        scales[row + r] = quantise_nibble_row(static_cast<const T*>(a.x.data) + (first + row + r) * a.k, a.k, a.group,
                                              begin + r * 4, sums + r, size);
      }
    });
    NibblePass pass{a, q, scales, first};
    auto tile = [&]<int R, int P>(int64_t row, int64_t panel, Ahead fetch) {
      nibble_tile<T, kZeros, R, P>(pass, row, panel, fetch);
    };
    int64_t panels = packed_panels(a.n), panel_bytes = packed_blocks(a.k) * kInt4BlockBytes;
    bool threads = rows * a.n * a.k >= kMinMacsForThreads;
    if (rows == 1) {
      for_tiles<1, 1>(rows, panels, panel_bytes, threads, tile);
    } else {
      for_tiles<kNibbleRows, kNibblePanels>(rows, panels, panel_bytes, threads, tile);
    }
  }
}

void int4_linear(const Int4Linear& a) {
  if (a.m == 0 || a.n == 0) return;
  if (a.x.type == Type::f32) {
    a.zero == nullptr ? int4_linear_of<float, false>(a) : int4_linear_of<float, true>(a);
  } else {
    a.zero == nullptr ? int4_linear_of<bf16, false>(a) : int4_linear_of<bf16, true>(a);
  }
}

size_t int4_linear_scratch(int64_t m, int64_t, int64_t k, int64_t group) {
  int64_t rows = smaller(m, kRowsPerPass);
  return static_cast<size_t>(kRowsPerPass * sizeof(float) + rows * nibble_row_bytes(k, group));
}

}  // namespace
