// Hinton, Vinyals, Dean 2015: alpha T^2 KL(softmax(t/T) || softmax(s/T)) + (1 - alpha) CE(s, label), and its gradient
//   d/ds_i = w (alpha T (q_i - p_i) + (1 - alpha) (q1_i - (1 - eps) [i == label] - eps / v))
// with q, p, q1 the softmaxes of s/T, t/T and s, eps the label smoothing, w the row's weight.
//
// A row is read from memory once, in blocks that stay in L1: first a block's largest logits m_s and m_t, then its sums
//   z_s = sum e^((s-m_s)/T)   z_t = sum e^((t-m_t)/T)   z_1 = sum e^(s-m_s)
//   a = sum e^((t-m_t)/T) ((t-m_t) - (s-m_s)).
// Centring on the maxima keeps a accurate when all logits share a large offset. With M_s, M_t the row's largest logits
// and f_s = e^((m_s-M_s)/T), f_t, f_1 alike, the row's sums are those over its blocks
//   Z = sum f z   A = sum f_t (a + z_t ((m_t-M_t) - (m_s-M_s)))   so that   KL = A / (T Z_t) - ln Z_t + ln Z_s.
// For the gradient the exponentials wait in the thread's scratch until f / Z is known. e^(s-m_s) is the T-th power of
// e^((s-m_s)/T) for T = 1, 2, 4, and else an exponential of its own, which waits as well.
//
// Bounds: two reads and a write per logit at the memory's bandwidth; 22 vector instructions of exponentials and about
// 20 others per kLanes logits. The next block is prefetched while one is computed, so that the two overlap.
#include <math.h>

#include "exp.inl"

namespace {

// With its exponentials a block takes at most 16 KiB; its float sums have at most 128 terms per lane before they are
// added up in double.
constexpr int64_t kBlock = kLanes < 8 ? 128 * kLanes : 1024;
constexpr int64_t kLogitsPerTask = 1 << 13;        // some microseconds
constexpr int64_t kMinLogitsForThreads = 1 << 14;  // about 10 us of one core; a fork and join take about 2
constexpr float kLowest = -__FLT_MAX__;            // finite, because -inf - (-inf) is a NaN
constexpr float kSmallest = __FLT_MIN__;

// e^s as a power of e^(s/T); not needed; or an exponential of its own.
enum Hard { kNone = 0, kPower1 = 1, kPower2 = 2, kPower4 = 4, kOwn = -1 };

template <class T>
float value(const T* p) {
  return sum(load_n(p, 1, 0.0f));
}

template <class T>
float largest(const T* x, int64_t n) {
  F m0 = set1(kLowest), m1 = m0;  // a NaN leaves them alone: the sums carry it
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    m0 = max(load(x + i), m0);
    m1 = max(load(x + i + kLanes), m1);
  }
  for (; i < n; i += kLanes) m0 = max(load_n(x + i, static_cast<int>(smaller(n - i, kLanes)), kLowest), m0);
  return top(max(m0, m1));
}

template <class T>
float centred_sum(const T* x, int64_t n, float centre) {
  F c = set1(centre), total = set1(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    total = add(total, sub(load_n(x + i, static_cast<int>(smaller(n - i, kLanes)), centre), c));
  }
  return sum(total);
}

template <Hard H>
F hard_exponential(F soft, F x, const Exp& hard) {
  if constexpr (H == kOwn) return exponential(x, hard);
  if constexpr (H == kPower1) return soft;
  F square = mul(soft, soft);
  return H == kPower2 ? square : mul(square, square);
}

// What a thread keeps of a row: its exponentials, and for each block what the row's sums are made of.
struct RowScratch {
  float *exp_s, *exp_t, *exp_1;
  float *max_s, *max_t, *z_s, *z_t, *z_1, *a;

  static int64_t blocks(int64_t v) { return (v + kBlock - 1) / kBlock; }
  static int64_t padded(int64_t n) { return round_up(n, 16); }
  static int64_t floats(int64_t v) { return 3 * padded(v) + 6 * padded(blocks(v)); }

  RowScratch(float* p, int64_t v) {
    float** per_logit[] = {&exp_s, &exp_t, &exp_1};
    float** per_block[] = {&max_s, &max_t, &z_s, &z_t, &z_1, &a};
    for (float** row : per_logit) *row = p, p += padded(v);
    for (float** row : per_block) *row = p, p += padded(blocks(v));
  }
};

struct RowSums {
  double m_s = 0, z_s = 0, z_t = 0, z_1 = 0, a = 0;
};

struct Factors {  // of the exponentials in the gradient, and its constant
  float s, t, one, constant;
};

template <Hard H>
F gradient(F e_s, F e_t, F e_1, const Factors& f) {
  F g = fma(e_s, set1(f.s), mul(e_t, set1(f.t)));
  return H == kNone ? g : fma(e_1, set1(f.one), add(g, set1(f.constant)));
}

template <class S, class T, Hard H>
class Rows {
 public:
  Rows(const KdLoss& call, float* scratch) : k_(call), r_(scratch, call.v), soft_(call.temperature), hard_(1.0f) {}

  void operator()(int64_t row) const {
    int64_t label = k_.target == nullptr ? 0 : k_.target[row];
    S* g = k_.grad.data == nullptr ? nullptr : static_cast<S*>(k_.grad.data) + row * k_.v;
    if (k_.target != nullptr && label == k_.ignore_index) {
      k_.loss[row] = 0.0f;
      if (g != nullptr) memset(g, 0, static_cast<size_t>(k_.v) * sizeof(S));
      return;
    }
    const S* s = static_cast<const S*>(k_.student.data) + row * k_.student_stride;
    const T* t = static_cast<const T*>(k_.teacher.data) + row * k_.teacher_stride;
    double total = 0;  // of the student's logits, for label smoothing
    for (int64_t b = 0; b < RowScratch::blocks(k_.v); ++b) {
      int64_t n = smaller(kBlock, k_.v - b * kBlock);
      block(s + b * kBlock, t + b * kBlock, n, b, g != nullptr);
      if (H != kNone && k_.label_smoothing > 0.0f) {
        total += centred_sum(s + b * kBlock, n, r_.max_s[b]) + static_cast<double>(n) * r_.max_s[b];
      }
    }
    RowSums sums = merge();
    k_.loss[row] = static_cast<float>(loss(sums, H == kNone ? 0.0f : value(s + label), total / k_.v));
    if (g != nullptr) write_gradient(g, label, sums);
  }

 private:
  void block(const S* s, const T* t, int64_t n, int64_t b, bool keep) const {
    const Exp soft = soft_, hard = hard_;  // copies, which the stores below cannot change
    F m_s = set1(r_.max_s[b] = largest(s, n)), m_t = set1(r_.max_t[b] = largest(t, n));
    F z_s = set1(0.0f), z_t = z_s, z_1 = z_s, a = z_s;
    int64_t at = keep ? b * kBlock : 0;  // without a gradient all blocks share one place in L1
    float *exp_s = r_.exp_s + at, *exp_t = r_.exp_t + at, *exp_1 = r_.exp_1 + at;
    auto step = [&](int64_t i, F x, F y) {
      x = sub(x, m_s);
      y = sub(y, m_t);
      F e_s = exponential(x, soft), e_t = exponential(y, soft);
      store(exp_s + i, e_s);
      store(exp_t + i, e_t);
      z_s = add(z_s, e_s);
      z_t = add(z_t, e_t);
      a = add(a, zero_below(e_t, set1(kSmallest), mul(e_t, sub(y, x))));  // where e_t is 0, y - x may be infinite
      if constexpr (H != kNone) {
        F e_1 = hard_exponential<H>(e_s, x, hard);
        z_1 = add(z_1, e_1);
        if constexpr (H == kOwn) store(exp_1 + i, e_1);
      }
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      __builtin_prefetch(s + i + kBlock);
      __builtin_prefetch(t + i + kBlock);
      step(i, load(s + i), load(t + i));
    }
    constexpr float kNothing = -__builtin_inff();
    int tail = static_cast<int>(n - i);
    if (tail > 0) step(i, load_n(s + i, tail, kNothing), load_n(t + i, tail, kNothing));
    r_.z_s[b] = sum(z_s);
    r_.z_t[b] = sum(z_t);
    r_.z_1[b] = sum(z_1);
    r_.a[b] = sum(a);
  }

  // The row's sums; leaves the blocks' factors f_s, f_t, f_1 in place of their sums.
  RowSums merge() const {
    int64_t blocks = RowScratch::blocks(k_.v);
    float m_s = largest(r_.max_s, blocks), m_t = largest(r_.max_t, blocks);
    RowSums all;
    all.m_s = m_s;
    if (blocks == 1) {  // most rows of a classifier: no factors to compute
      all.z_s = r_.z_s[0], all.z_t = r_.z_t[0], all.z_1 = r_.z_1[0], all.a = r_.a[0];
      r_.z_s[0] = r_.z_t[0] = r_.z_1[0] = 1.0f;
      return all;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      float x = r_.max_s[b] - m_s, y = r_.max_t[b] - m_t;
      F soft = exponential(set1(x), soft_);
      float f_s = top(soft), f_t = top(exponential(set1(y), soft_));
      float f_1 = top(hard_exponential<H>(soft, set1(x), hard_));
      all.z_s += static_cast<double>(f_s) * r_.z_s[b];
      all.z_t += static_cast<double>(f_t) * r_.z_t[b];
      all.z_1 += static_cast<double>(f_1) * r_.z_1[b];
      if (f_t > 0.0f) all.a += f_t * (r_.a[b] + r_.z_t[b] * (static_cast<double>(y) - x));
      r_.z_s[b] = f_s;
      r_.z_t[b] = f_t;
      r_.z_1[b] = f_1;
    }
    return all;
  }

  double loss(const RowSums& r, double label_logit, double mean_logit) const {
    double temperature = k_.temperature, alpha = k_.alpha, smoothing = k_.label_smoothing;
    double soft = r.a / (temperature * r.z_t) - log(r.z_t) + log(r.z_s);
    double result = alpha * temperature * temperature * soft;
    if (H == kNone) return result;
    double log_z = r.m_s + log(r.z_1);
    double hard = (1.0 - smoothing) * (log_z - label_logit);
    if (smoothing > 0.0) hard += smoothing * (log_z - mean_logit);
    return result + (1.0 - alpha) * hard;
  }

  void write_gradient(S* g, int64_t label, const RowSums& r) const {
    double soft = static_cast<double>(k_.row_weight) * k_.alpha * k_.temperature;
    double hard = static_cast<double>(k_.row_weight) * (1.0 - k_.alpha);
    auto factors = [&](int64_t b) {
      return Factors{static_cast<float>(soft / r.z_s * r_.z_s[b]), static_cast<float>(-soft / r.z_t * r_.z_t[b]),
                     static_cast<float>(hard / r.z_1 * r_.z_1[b]),
                     static_cast<float>(-hard * k_.label_smoothing / static_cast<double>(k_.v))};
    };
    auto at = [&](int64_t i, const Factors& f) {
      F e_s = load(r_.exp_s + i);
      F e_1 = H == kOwn ? load(r_.exp_1 + i) : hard_exponential<H>(e_s, e_s, hard_);
      return gradient<H>(e_s, load(r_.exp_t + i), e_1, f);
    };
    for (int64_t b = 0; b < RowScratch::blocks(k_.v); ++b) {
      Factors f = factors(b);
      int64_t i = b * kBlock, end = smaller(i + kBlock, k_.v);
      for (; i + kLanes <= end; i += kLanes) store(g + i, at(i, f));
      if (i < end) store_n(g + i, at(i, f), static_cast<int>(end - i));
    }
    if (H == kNone) return;
    float one_hot = static_cast<float>(hard * (1.0 - k_.label_smoothing));
    F e_s = set1(r_.exp_s[label]), e_t = set1(r_.exp_t[label]), e_1 = set1(H == kOwn ? r_.exp_1[label] : 0.0f);
    if (H != kOwn) e_1 = hard_exponential<H>(e_s, e_s, hard_);
    store_n(g + label, sub(gradient<H>(e_s, e_t, e_1, factors(label / kBlock)), set1(one_hot)), 1);
  }

  const KdLoss& k_;
  RowScratch r_;
  Exp soft_, hard_;
};

template <class S, class T, Hard H>
void kd_loss_rows(const KdLoss& k) {
  int64_t grain = k.v < kLogitsPerTask ? kLogitsPerTask / k.v : 1;
  parallel_for((k.rows + grain - 1) / grain, k.rows * k.v >= kMinLogitsForThreads, [&](int64_t task) {
    Rows<S, T, H> rows(k, static_cast<float*>(k.scratch) + thread_index() * RowScratch::floats(k.v));
    for (int64_t row = task * grain; row < smaller(k.rows, (task + 1) * grain); ++row) rows(row);
  });
}

template <class S, class T>
void kd_loss_of(const KdLoss& k) {
  if (k.alpha == 1.0f) return kd_loss_rows<S, T, kNone>(k);
  if (k.temperature == 1.0f) return kd_loss_rows<S, T, kPower1>(k);
  if (k.temperature == 2.0f) return kd_loss_rows<S, T, kPower2>(k);
  if (k.temperature == 4.0f) return kd_loss_rows<S, T, kPower4>(k);
  kd_loss_rows<S, T, kOwn>(k);
}

void kd_loss(const KdLoss& call) {
  if (call.rows == 0) return;
  KdLoss k = call;
  if (k.alpha == 0.0f) {  // the teacher has no say: a KL of the student with itself is 0
    k.teacher = k.student;
    k.teacher_stride = k.student_stride;
  }
  bool narrow_s = k.student.type == Type::bf16, narrow_t = k.teacher.type == Type::bf16;
  if (narrow_s) return narrow_t ? kd_loss_of<bf16, bf16>(k) : kd_loss_of<bf16, float>(k);
  return narrow_t ? kd_loss_of<float, bf16>(k) : kd_loss_of<float, float>(k);
}

size_t kd_loss_scratch(int64_t, int64_t v) {
  return static_cast<size_t>(max_threads() * RowScratch::floats(v)) * sizeof(float);
}

}  // namespace
