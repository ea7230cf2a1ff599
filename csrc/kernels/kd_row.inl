// What the distillation losses share: a row's exponentials and sums, the cross-entropy, and the gradient's last pass.
//
// A row is read from memory once, in blocks that stay in L1: first a block's largest logits m_s and m_t, then its sums
//   z_s = sum e^((s-m_s)/T)   z_t = sum e^((t-m_t)/T)   z_1 = sum e^(s-m_s)
// and a divergence's own sum a. With M_s, M_t the row's largest logits and f_s = e^((m_s-M_s)/T), f_t, f_1 alike, the
// row's sums are Z = sum f z over its blocks. The exponentials wait in the thread's scratch until the row's sums are
// known, beside one more number per logit, `pull`, so that every divergence's gradient is
//   g_i = s_b e_s,i + t_b pull_i + h_b e_1,i + constant, and something more at the label,
// with factors s_b, t_b, h_b for each block b. e^(s-m_s) is the T-th power of e^((s-m_s)/T) for T = 1, 2, 4, and else
// an exponential of its own, which waits as well.
//
// Columns that the teacher lacks have blocks of their own, of which only z_1 counts.
#include <math.h>

#include "log.inl"

namespace {

// With its exponentials a block takes at most 16 KiB; its float sums have at most 128 terms per lane before they are
// added up in double.
constexpr int64_t kBlock = kLanes < 8 ? 128 * kLanes : 1024;
constexpr float kLowest = -__FLT_MAX__;  // finite, because -inf - (-inf) is a NaN
constexpr float kSmallest = __FLT_MIN__;
constexpr float kMinusInfinity = -__builtin_inff();

// e^s as a power of e^(s/T); not needed; or an exponential of its own.
enum Hard { kNone = 0, kPower1 = 1, kPower2 = 2, kPower4 = 4, kOwn = -1 };

inline float largest(const float* x, int64_t n) {
  F m0 = set1(kLowest), m1 = m0;  // a NaN leaves them alone: the sums carry it
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    m0 = max(load(x + i), m0);
    m1 = max(load(x + i + kLanes), m1);
  }
  for (; i < n; i += kLanes) m0 = max(load_n(x + i, static_cast<int>(smaller(n - i, kLanes)), kLowest), m0);
  return top(max(m0, m1));
}

inline float centred_sum(const float* x, int64_t n, float centre) {
  F c = set1(centre), total = set1(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    total = add(total, sub(load_n(x + i, static_cast<int>(smaller(n - i, kLanes)), centre), c));
  }
  return sum(total);
}

inline float value(const FloatPtr& x, int64_t i) {
  if (x.type == Type::f32) return static_cast<const float*>(x.data)[i];
  return sum(load_n(static_cast<const bf16*>(x.data) + i, 1, 0.0f));
}

// Numbers i ... i + n of a row as floats: where they are, or widened to `buffer`.
inline const float* floats(const FloatPtr& x, int64_t i, int64_t n, float* buffer) {
  if (x.type == Type::f32) return static_cast<const float*>(x.data) + i;
  const bf16* p = static_cast<const bf16*>(x.data) + i;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    __builtin_prefetch(p + j + kBlock);
    store(buffer + j, load(p + j));
  }
  if (j < n) store_n(buffer + j, load_n(p + j, static_cast<int>(n - j), 0.0f), static_cast<int>(n - j));
  return buffer;
}

template <Hard H>
F hard_exponential(F soft, F x, const Exp& hard) {
  if constexpr (H == kOwn) return exponential(x, hard);
  if constexpr (H == kPower1) return soft;
  F square = mul(soft, soft);
  return H == kPower2 ? square : mul(square, square);
}

// The blocks of a row: those of the columns that both sides have, then those of the student's others. In the scratch
// the latter start a whole vector after the former, which may be read and written beyond their last logit.
struct Blocks {
  int64_t common, all, columns, classes;

  Blocks(int64_t columns_, int64_t classes_)
      : common((columns_ + kBlock - 1) / kBlock),
        all(common + (classes_ - columns_ + kBlock - 1) / kBlock),
        columns(columns_),
        classes(classes_) {}
  int64_t begin(int64_t b) const { return b < common ? b * kBlock : columns + (b - common) * kBlock; }
  int64_t end(int64_t b) const { return smaller(begin(b) + kBlock, b < common ? columns : classes); }
  int64_t of(int64_t i) const { return i < columns ? i / kBlock : common + (i - columns) / kBlock; }
  int64_t place(int64_t i) const { return i < columns ? i : i - columns + round_up(columns, 16); }
};

// What a thread keeps of a row.
struct RowScratch {
  float *exp_s, *pull, *exp_1, *difference;                // per logit
  float *max_s, *max_t, *z_s, *z_t, *z_1, *a, *f_1, *gap;  // per block; z_s and z_t become f_s and f_t
  float *student, *teacher;                                // one block, widened or masked

  static int64_t padded(int64_t n) { return round_up(n, 16); }
  static int64_t most_blocks(int64_t v) { return v / kBlock + 2; }
  static int64_t logits(int64_t v) { return padded(v) + 16; }
  static int64_t floats(int64_t v) { return 4 * logits(v) + 8 * padded(most_blocks(v)) + 2 * kBlock; }

  RowScratch(float* p, int64_t v) {
    float** per_logit[] = {&exp_s, &pull, &exp_1, &difference};
    float** per_block[] = {&max_s, &max_t, &z_s, &z_t, &z_1, &a, &f_1, &gap};
    float** one_block[] = {&student, &teacher};
    for (float** row : per_logit) *row = p, p += logits(v);
    for (float** row : per_block) *row = p, p += padded(most_blocks(v));
    for (float** row : one_block) *row = p, p += kBlock;
  }
};

// A row's sums. z_1 is without the label where it is masked; log_z_1 has it.
struct RowSums {
  double z_s = 0, z_t = 0, z_1 = 0, a = 0;
  double m_s = 0, m_t = 0, m_1 = 0;
  double log_z_1 = 0;
};

// What a divergence makes of a row's sums: its value, and its terms of the gradient, those of Factors and at the label.
struct Soft {
  double value = 0, s = 0, pull = 0, label = 0;
};

// The gradient's factors for one block.
struct Factors {
  float s, pull, one, constant;
};

// kSoft, kPull: whether the divergence's gradient has a term of either kind.
template <Hard H, bool kSoft>
F gradient(F e_s, F pull, F e_1, const Factors& f) {
  F g = mul(pull, set1(f.pull));
  if constexpr (kSoft) g = fma(e_s, set1(f.s), g);
  return H == kNone ? g : fma(e_1, set1(f.one), add(g, set1(f.constant)));
}

// e_1 of logit i, from what the scratch keeps.
template <Hard H>
F kept_hard(const RowScratch& r, int64_t i, const Exp& hard) {
  if constexpr (H == kNone) return set1(0.0f);
  if constexpr (H == kOwn) return load(r.exp_1 + i);
  F e_s = load(r.exp_s + i);
  return hard_exponential<H>(e_s, e_s, hard);
}

// n gradients, from those whose exponentials are at `place` in the scratch.
template <Hard H, bool kSoft, class S>
void write_block(S* g, int64_t n, const RowScratch& r, int64_t place, const Factors& f, const Exp& hard) {
  auto at = [&](int64_t i) {
    F e_s = kSoft ? load(r.exp_s + i) : set1(0.0f);
    return gradient<H, kSoft>(e_s, load(r.pull + i), kept_hard<H>(r, i, hard), f);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(g + i, at(place + i));
  if (i < n) store_n(g + i, at(place + i), static_cast<int>(n - i));
}

// A teacher's likeliest classes, each once, with its and the student's probabilities.
struct TopK {
  int64_t* classes;
  double *p, *q;
  int64_t count = 0;

  static int64_t floats(int64_t k) { return 6 * round_up(k, 16); }
  TopK(float* at, int64_t k)
      : classes(reinterpret_cast<int64_t*>(at)),
        p(reinterpret_cast<double*>(classes + round_up(k, 16))),
        q(p + round_up(k, 16)) {}

  // Returns the sum of all probabilities; `sums`, all zero, then holds each class's: of one that is given twice, both.
  double gather(const float* log_probs, const int64_t* indices, int64_t k, float* sums) {
    double given = 0;
    count = 0;
    for (int64_t j = 0; j < k; ++j) {
      float probability = expf(log_probs[j]);
      given += probability;
      if (!(probability > 0.0f)) continue;
      if (sums[indices[j]] == 0.0f) classes[count++] = indices[j];
      sums[indices[j]] += probability;
    }
    for (int64_t u = 0; u < count; ++u) p[u] = sums[classes[u]];
    return given;
  }
};

}  // namespace
