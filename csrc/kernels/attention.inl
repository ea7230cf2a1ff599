// y = softmax(scale q k^T + mask) v for each head, in float32.
//
// A tile of kRows queries makes its scores with all keys, turns them into weights and adds up the values, all of it in
// L1 and L2: rows of scores are never in memory for more than one tile. Keys are packed first, [keys/16][d][16], so
// that products are vectors over keys; values are used as they lie. With few queries packing would cost more than the
// products, which are then vectors over d.
//
// Weights are exp(score - max), exact to 2 ulp, and divided by their sum at the end. A query that sees no key gives
// zeros; a NaN or +inf among its scores gives NaN.
//
// Bounds: 2 queries keys (d + dv) operations per head at the rate of fused multiply-adds.
#include <math.h>

#include "exp.inl"

namespace {

constexpr int kTileVectors = kPanelsPerTile * kVectorsPerPanel;
constexpr int64_t kFewQueries = 4;
constexpr int64_t kMinAttentionForThreads = 1 << 18;  // multiply-adds; about 5 us of one core

// acc[r][v] += sum over i < n of a[r * a_row + i] b(i, v)
template <int R, int V, class B>
inline void add_products(const float* a, int64_t a_row, int64_t n, const B& b, F (&acc)[R][V]) {
  for (int64_t i = 0; i < n; ++i) {
    F bv[V];
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) bv[v] = b(i, v);
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) {
      F x = set1(a[r * a_row + i]);
#pragma GCC unroll 64
      for (int v = 0; v < V; ++v) acc[r][v] = fma(x, bv[v], acc[r][v]);
    }
  }
}

template <int R, int V>
inline void clear(F (&acc)[R][V]) {
#pragma GCC unroll 64
  for (int i = 0; i < R * V; ++i) acc[i / V][i % V] = set1(0.0f);
}

template <class T>
struct Head {
  const T *q, *k, *v;
  T* y;
  const float* packed;  // keys, or null
  const float* mask;    // of the first query, or null
  const uint8_t* allowed;
};

template <class T>
Head<T> head_of(const Attention& a, int64_t index, const float* packed) {
  int64_t b = index / a.heads, h = index % a.heads, kv = h * a.kv_heads / a.heads;
  auto at = [&](FloatPtr p, Strides s, int64_t head) { return static_cast<T*>(p.data) + b * s.batch + head * s.head; };
  int64_t masked = b * a.mask_strides.batch + h * a.mask_strides.head;
  return {at(a.q, a.q_strides, h),
          at(a.k, a.k_strides, kv),
          at(a.v, a.v_strides, kv),
          at(a.y, a.y_strides, h),
          packed == nullptr ? nullptr : packed + (b * a.kv_heads + kv) * packed_panels(a.keys) * kPanel * a.d,
          a.mask == nullptr ? nullptr : a.mask + masked,
          a.allowed == nullptr ? nullptr : a.allowed + masked};
}

// Keys from `first` on, at most kPanel of them, as [d][kPanel]; those that are not there as zeros.
template <class T>
void pack_keys(const T* k, int64_t stride, int64_t count, int64_t d, float* out) {
  float values[kLanes];
  for (int64_t key = 0; key < kPanel; ++key) {
    for (int64_t i = 0; i < d; i += kLanes) {
      int n = static_cast<int>(smaller(d - i, kLanes));
      store(values, key < count ? load_n(k + key * stride + i, n, 0.0f) : set1(0.0f));
      for (int j = 0; j < n; ++j) out[(i + j) * kPanel + key] = values[j];
    }
  }
}

struct Tile {
  int64_t row;     // of the first query
  int64_t keys;    // that any of them sees
  int64_t stride;  // of the rows of scores
  const float* q;  // [rows, d], times the scale
  float* scores;
};

template <int R, int P>
void score_panels(const Attention& a, const float* packed, const Tile& t, int64_t panel) {
  constexpr int V = P * kVectorsPerPanel;
  const float* k = packed + panel * kPanel * a.d;
  F acc[R][V];
  clear(acc);
  add_products(
      t.q, a.d, a.d,
      [&](int64_t i, int v) {
        return load(k + (v / kVectorsPerPanel * a.d + i) * kPanel + v % kVectorsPerPanel * kLanes);
      },
      acc);
#pragma GCC unroll 64
  for (int i = 0; i < R * V; ++i)
    store(t.scores + i / V * t.stride + panel * kPanel + i % V * kLanes, acc[i / V][i % V]);
}

// One query's scores, a dot product each.
template <class T>
void score_row(const Attention& a, const Head<T>& h, const Tile& t) {
  for (int64_t key = 0; key < t.keys; ++key) {
    const T* k = h.k + key * a.k_strides.row;
    F total = set1(0.0f);
    for (int64_t i = 0; i < a.d; i += kLanes) {
      int n = static_cast<int>(smaller(a.d - i, kLanes));
      total = fma(load_n(t.q + i, n, 0.0f), load_n(k + i, n, 0.0f), total);
    }
    t.scores[key] = sum(total);
  }
}

// The row's scores with its mask; -inf beyond its n keys, up to the end of the tile's rows.
template <class T>
void mask_row(const Attention& a, const Head<T>& h, const Tile& t, int64_t row, float* scores, int64_t n) {
  int64_t at = row * a.mask_strides.row;
  if (h.mask != nullptr) {
    const float* mask = h.mask + at;
    for (int64_t i = 0; i < n; i += kLanes) {
      int lanes = static_cast<int>(smaller(n - i, kLanes));
      store_n(scores + i, add(load_n(scores + i, lanes, 0.0f), load_n(mask + i, lanes, 0.0f)), lanes);
    }
  }
  if (h.allowed != nullptr) {
    const uint8_t* allowed = h.allowed + at;
    for (int64_t i = 0; i < n; ++i) {
      if (allowed[i] == 0) scores[i] = -INFINITY;
    }
  }
  for (int64_t i = n; i < t.stride; ++i) scores[i] = -INFINITY;
}

// Turns a row of scores into weights; returns the factor that makes their sum 1.
inline float exponentials(float* scores, int64_t stride) {
  F most = set1(-INFINITY);
  for (int64_t i = 0; i < stride; i += kLanes) most = max(most, load(scores + i));
  float largest = top(most);
  if (largest == -INFINITY) {  // no key is seen, or one with a NaN, which max may have passed over
    bool nan = false;
    for (int64_t i = 0; i < stride; ++i) {
      nan |= scores[i] != -INFINITY;
      scores[i] = 0.0f;
    }
    return nan ? NAN : 0.0f;
  }
  Exp e(1.0f);
  F shift = set1(largest), total = set1(0.0f);
  for (int64_t i = 0; i < stride; i += kLanes) {
    F weight = exponential(sub(load(scores + i), shift), e);
    total = add(total, weight);
    store(scores + i, weight);
  }
  return 1.0f / sum(total);
}

template <class T, int R, int V>
void values(const Attention& a, const Head<T>& h, const Tile& t, const float* factors, int64_t column) {
  const T* v = h.v + column;
  int64_t columns = a.dv - column;
  int tail = static_cast<int>(smaller(columns - (V - 1) * kLanes, kLanes));
  F acc[R][V];
  clear(acc);
  auto whole = [&](int64_t key, int i) { return load(v + key * a.v_strides.row + i * kLanes); };
  auto part = [&](int64_t key, int i) {
    return i < V - 1 ? whole(key, i) : load_n(v + key * a.v_strides.row + i * kLanes, tail, 0.0f);
  };
  tail == kLanes ? add_products(t.scores, t.stride, t.keys, whole, acc)
                 : add_products(t.scores, t.stride, t.keys, part, acc);
#pragma GCC unroll 64
  for (int r = 0; r < R; ++r) {
    T* y = h.y + (t.row + r) * a.y_strides.row + column;
#pragma GCC unroll 64
    for (int i = 0; i < V; ++i) {
      store_n(y + i * kLanes, mul(acc[r][i], set1(factors[r])), i < V - 1 ? kLanes : tail);
    }
  }
}

template <class T, int R>
void attend(const Attention& a, const Head<T>& h, int64_t row, float* memory) {
  int64_t keys = a.causal ? smaller(a.keys, row + R) : a.keys;
  Tile t{row, keys, round_up(keys, kPanel), memory, memory + R * a.d};
  for (int r = 0; r < R; ++r) {
    const T* q = h.q + (row + r) * a.q_strides.row;
    for (int64_t i = 0; i < a.d; i += kLanes) {
      int n = static_cast<int>(smaller(a.d - i, kLanes));
      store_n(memory + r * a.d + i, mul(load_n(q + i, n, 0.0f), set1(a.scale)), n);
    }
  }
  if (h.packed == nullptr) {
    for (int r = 0; r < R; ++r) score_row(a, h, {row + r, keys, t.stride, t.q + r * a.d, t.scores + r * t.stride});
  } else {
    int64_t panels = packed_panels(keys);
    for (int64_t p = 0; p < panels; p += kPanelsPerTile) {
      with_sizes<1, kPanelsPerTile>(1, panels - p, [&]<int, int P>() { score_panels<R, P>(a, h.packed, t, p); });
    }
  }
  float factors[R];
  for (int r = 0; r < R; ++r) {
    float* scores = t.scores + r * t.stride;
    mask_row(a, h, t, row + r, scores, a.causal ? smaller(keys, row + r + 1) : keys);
    factors[r] = exponentials(scores, t.stride);
  }
  int64_t vectors = (a.dv + kLanes - 1) / kLanes;
  for (int64_t i = 0; i < vectors; i += kTileVectors) {
    with_sizes<1, kTileVectors>(1, vectors - i, [&]<int, int V>() { values<T, R, V>(a, h, t, factors, i * kLanes); });
  }
}

inline int64_t tile_floats(const Attention& a) { return kRows * (a.d + round_up(a.keys, kPanel)); }
inline int64_t packed_floats(const Attention& a) {
  return a.queries < kFewQueries ? 0 : a.batch * a.kv_heads * packed_panels(a.keys) * kPanel * a.d;
}

template <class T>
void attention_of(const Attention& a) {
  auto packed = static_cast<float*>(a.scratch), memory = packed + packed_floats(a);
  int64_t heads = a.batch * a.heads, panels = packed_panels(a.keys);
  bool threads = heads * a.queries * a.keys * (a.d + a.dv) >= kMinAttentionForThreads;
  if (packed_floats(a) > 0) {
    parallel_for(a.batch * a.kv_heads * panels, threads, [&](int64_t task) {
      int64_t head = task / panels, first = task % panels * kPanel;
      const T* k = static_cast<const T*>(a.k.data) + head / a.kv_heads * a.k_strides.batch +
                   head % a.kv_heads * a.k_strides.head + first * a.k_strides.row;
      pack_keys(k, a.k_strides.row, a.keys - first, a.d, packed + task * kPanel * a.d);
    });
  }
  RowBlocks blocks(a.queries, kRows);
  int64_t cuts = smaller(blocks.count, (4 * max_threads() + heads - 1) / heads);
  parallel_for(heads * cuts, threads, [&](int64_t task) {
    Head<T> head = head_of<T>(a, task / cuts, packed_floats(a) > 0 ? packed : nullptr);
    float* own = memory + thread_index() * tile_floats(a);
    int64_t cut = task % cuts;
    for (int64_t b = cut * blocks.count / cuts; b < (cut + 1) * blocks.count / cuts; ++b) {
      with_sizes<kRows, 1>(blocks.size(b), 1, [&]<int R, int>() { attend<T, R>(a, head, blocks.start(b), own); });
    }
  });
}

void attention(const Attention& a) {
  if (a.batch * a.heads * a.queries * a.dv == 0) return;
  a.q.type == Type::f32 ? attention_of<float>(a) : attention_of<bf16>(a);
}

size_t attention_scratch(const Attention& a) {
  return static_cast<size_t>(packed_floats(a) + max_threads() * tile_floats(a)) * sizeof(float);
}

}  // namespace
