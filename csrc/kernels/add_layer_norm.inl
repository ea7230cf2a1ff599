// y = (z - mean(z)) / sqrt(var(z) + eps) weight + bias over each row of z = x + residual.
//
// A row is read from memory once and stays in L1 for three visits, each of which adds x and residual again: that is
// cheaper than a copy of z, and spares bf16 a rounding. The variance is computed in the second visit from the mean of
// the first, m, with d = z - m, and so is the rounding error of m:  mean = m + sum(d) / n,  var = sum(d^2) / n. So a
// row whose mean is far from 0 loses nothing but what rounding z itself does. (By that error squared var is too large:
// less than 1e-12 of the mean's square.) All in float32; a row with a NaN or an infinity is all NaN.
//
// Bounds: two reads and a write of a row at the bandwidth of the level that holds them; 4 + 6 + 6 vector instructions
// per kLanes values besides loads.
#include <math.h>

namespace {

constexpr int64_t kValuesPerTask = 1 << 13;            // some microseconds
constexpr int64_t kMinNormalisedForThreads = 1 << 14;  // about 3 us of one core; a fork and join take about 2

// What of a row is added: with a residual, or x alone.
template <class T, bool kResidual>
struct Row {
  const T *x, *residual;
  F at(int64_t i) const {
    F z = load(x + i);
    if constexpr (kResidual) z = add(z, load(residual + i));
    return z;
  }
  F at_n(int64_t i, int n, float fill) const {  // `fill` in the lanes from n on
    F z = load_n(x + i, n, fill);
    if constexpr (kResidual) z = add(z, load_n(residual + i, n, 0.0f));
    return z;
  }
};

struct Moments {
  float centre, shift, inverse;  // the mean is centre + shift; inverse is 1 / sqrt(var + eps)
};

// The sums over a row of what `step` adds to them; four chains, to hide the latency of an addition.
template <class R, class Step>
void visit(const R& row, int64_t n, float fill, const Step& step) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 64
    for (int c = 0; c < 4; ++c) step(c, row.at(i + c * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) step(0, row.at(i));
  if (i < n) step(0, row.at_n(i, static_cast<int>(n - i), fill));
}

inline float sum_of(const F (&chains)[4]) { return sum(add(add(chains[0], chains[1]), add(chains[2], chains[3]))); }

template <class R>
Moments moments(const R& row, int64_t n, float eps) {
  F total[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  visit(row, n, 0.0f, [&](int c, F z) { total[c] = add(total[c], z); });
  float centre = sum_of(total) / static_cast<float>(n);
  F m = set1(centre), first[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  F second[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  visit(row, n, centre, [&](int c, F z) {
    F d = sub(z, m);
    first[c] = add(first[c], d);
    second[c] = fma(d, d, second[c]);
  });
  float shift = sum_of(first) / static_cast<float>(n);
  return {centre, shift, 1.0f / sqrtf(sum_of(second) / static_cast<float>(n) + eps)};
}

// A weight or bias as floats: its own memory, or `copy` with its n values or with `absent` where there is none.
inline const float* parameters(FloatPtr p, int64_t n, float absent, float* copy) {
  if (p.data != nullptr && p.type == Type::f32) return static_cast<const float*>(p.data);
  auto narrow = static_cast<const bf16*>(p.data);
  for (int64_t i = 0; i < n; i += kLanes) {
    int count = static_cast<int>(smaller(n - i, kLanes));
    store_n(copy + i, narrow == nullptr ? set1(absent) : load_n(narrow + i, count, 0.0f), count);
  }
  return copy;
}

template <class T, bool kResidual>
void normalise_row(const AddLayerNorm& a, const float* weight, const float* bias, int64_t index) {
  Row<T, kResidual> row{static_cast<const T*>(a.x.data) + index * a.n, nullptr};
  if constexpr (kResidual) row.residual = static_cast<const T*>(a.residual.data) + index * a.n;
  T* y = static_cast<T*>(a.y.data) + index * a.n;
  Moments m = moments(row, a.n, a.eps);
  F centre = set1(m.centre), inverse = set1(m.inverse), shift = set1(-m.shift * m.inverse);
  auto normalised = [&](F z, int64_t i, int n) {
    F unit = fma(sub(z, centre), inverse, shift);
    return n == kLanes ? fma(unit, load(weight + i), load(bias + i))
                       : fma(unit, load_n(weight + i, n, 0.0f), load_n(bias + i, n, 0.0f));
  };
  int64_t i = 0;
  for (; i + kLanes <= a.n; i += kLanes) store(y + i, normalised(row.at(i), i, kLanes));
  int tail = static_cast<int>(a.n - i);
  if (tail > 0) store_n(y + i, normalised(row.at_n(i, tail, 0.0f), i, tail), tail);
}

template <class T>
void add_layer_norm_of(const AddLayerNorm& a) {
  auto scratch = static_cast<float*>(a.scratch);
  const float* weight = parameters(a.weight, a.n, 1.0f, scratch);
  const float* bias = parameters(a.bias, a.n, 0.0f, scratch + a.n);
  int64_t grain = a.n < kValuesPerTask ? kValuesPerTask / a.n : 1;
  parallel_for((a.rows + grain - 1) / grain, a.rows * a.n >= kMinNormalisedForThreads, [&](int64_t task) {
    for (int64_t row = task * grain; row < smaller(a.rows, (task + 1) * grain); ++row) {
      a.residual.data == nullptr ? normalise_row<T, false>(a, weight, bias, row)
                                 : normalise_row<T, true>(a, weight, bias, row);
    }
  });
}

void add_layer_norm(const AddLayerNorm& a) {
  if (a.rows == 0 || a.n == 0) return;
  a.x.type == Type::f32 ? add_layer_norm_of<float>(a) : add_layer_norm_of<bf16>(a);
}

size_t add_layer_norm_scratch(int64_t n) { return static_cast<size_t>(2 * n) * sizeof(float); }

}  // namespace
