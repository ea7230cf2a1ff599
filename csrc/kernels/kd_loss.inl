// alpha T^2 D(t, s) + (1 - alpha) CE(s, label) of each row, and its gradient. With q, p, q1 the softmaxes of s/T, t/T
// and s, w the row's weight, eps the label smoothing and v the student's classes the cross-entropy's gradient is
//   w (1 - alpha) (q1_i - (1 - eps) [i == label] - eps / v)
// and the divergences' are those of python/potstill/ops/divergence.py. kd_row.inl says how a row is computed.
//
// Bounds: two reads and a write per logit at the memory's bandwidth; 22 vector instructions of exponentials and about
// 20 others per kLanes logits (jsd: twice that). The next block is prefetched while one is computed, so that the two
// overlap.
#include "kd_row.inl"

namespace {

constexpr int64_t kLogitsPerTask = 1 << 13;        // some microseconds
constexpr int64_t kMinLogitsForThreads = 1 << 14;  // about 10 us of one core; a fork and join take about 2

template <Divergence D, Hard H>
class KdRows {
  static constexpr bool kLogits = D != Divergence::top_k;  // of the teacher
  static constexpr bool kTwoPasses = D == Divergence::jsd || D == Divergence::tv;
  static constexpr bool kSoft = D != Divergence::mse;
  static constexpr bool kExponentials = kSoft || H != kNone;

 public:
  KdRows(const KdLoss& call, float* scratch)
      : k_(call),
        r_(scratch, call.student_classes),
        blocks_(columns(call), H == kNone ? columns(call) : call.student_classes),
        top_k_(scratch + RowScratch::floats(call.student_classes), call.teacher_classes),
        soft_(call.temperature),
        hard_(1.0f) {}

  static int64_t columns(const KdLoss& k) {
    return kLogits ? smaller(k.student_classes, k.teacher_classes) : k.student_classes;
  }

  void operator()(int64_t row) {
    bool ignored = k_.target != nullptr && k_.target[row] == k_.ignore_index;
    weight_ = k_.row_weight == nullptr ? 1.0 : k_.row_weight[row];
    if (ignored || weight_ == 0.0) {
      k_.loss[row] = 0.0f;
      return clear(row, 0);
    }
    row_ = row;
    s_ = at(k_.student, row * k_.student_stride);
    t_ = at(k_.teacher, row * k_.teacher_stride);
    label_ = k_.target == nullptr ? -1 : k_.target[row];
    label_logit_ = label_ < 0 ? 0.0 : value(s_, label_);  // read now: the gradient may overwrite it
    masked_ = D == Divergence::dkd && label_ >= 0 && label_ < blocks_.columns;
    double total = scan();
    RowSums sums = merge();
    double hard = H == kNone ? 0.0 : cross_entropy(sums, total);
    Soft soft = divergence(sums);
    k_.loss[row] = static_cast<float>(weight_ * (k_.alpha * soft.value + (1.0 - k_.alpha) * hard));
    if (k_.grad.data == nullptr) return;
    if (k_.grad.type == Type::f32) write(static_cast<float*>(k_.grad.data) + row * k_.grad_stride, soft, sums);
    if (k_.grad.type == Type::bf16) write(static_cast<bf16*>(k_.grad.data) + row * k_.grad_stride, soft, sums);
    clear(row, blocks_.classes);
  }

 private:
  static FloatPtr at(const FloatPtr& x, int64_t i) {
    int64_t bytes = x.type == Type::f32 ? 4 : 2;
    return {static_cast<char*>(x.data) + i * bytes, x.type};
  }

  // The gradient from column `first` on is 0.
  void clear(int64_t row, int64_t first) const {
    if (k_.grad.data == nullptr || first == k_.student_classes) return;
    int64_t bytes = k_.grad.type == Type::f32 ? 4 : 2;
    memset(at(k_.grad, row * k_.grad_stride + first).data, 0,
           static_cast<size_t>((k_.student_classes - first) * bytes));
  }

  // Computes all blocks; returns the sum of the student's logits if label smoothing needs it.
  double scan() const {
    double total = 0;
    for (int64_t b = 0; b < blocks_.all; ++b) {
      int64_t i = blocks_.begin(b), n = blocks_.end(b) - i;
      const float* s = floats(s_, i, n, r_.student);
      if (H != kNone && k_.label_smoothing > 0.0f) {
        float centre = largest(s, n);
        total += centred_sum(s, n, centre) + static_cast<double>(n) * centre;
      }
      if (b >= blocks_.common) {
        scan_extra(s, n, b);
        continue;
      }
      const float* t = kLogits ? floats(t_, i, n, r_.teacher) : s;
      if (masked_ && label_ >= i && label_ < i + n) {
        s = masked(s, n, r_.student);
        t = masked(t, n, r_.teacher);
      }
      scan_block(s, t, n, b);
    }
    return total;
  }

  // A copy without the label.
  const float* masked(const float* x, int64_t n, float* buffer) const {
    if (x != buffer) memcpy(buffer, x, static_cast<size_t>(n) * sizeof(float));
    buffer[label_ % kBlock] = kMinusInfinity;
    return buffer;
  }

  void scan_block(const float* s, const float* t, int64_t n, int64_t b) const {
    const Exp soft = soft_, hard = hard_;  // copies, which the stores below cannot change
    float max_s = kExponentials ? largest(s, n) : 0.0f;
    float max_t = kLogits && kSoft ? largest(t, n) : 0.0f;
    F m_s = set1(r_.max_s[b] = max_s), m_t = set1(r_.max_t[b] = max_t);
    F z_s = set1(0.0f), z_t = z_s, z_1 = z_s, a = z_s;
    // Without a gradient all blocks share one place in L1, unless there is a second pass.
    int64_t at = k_.grad.data != nullptr || kTwoPasses || !kLogits ? b * kBlock : 0;
    float *exp_s = r_.exp_s + at, *pull = r_.pull + at, *exp_1 = r_.exp_1 + at, *difference = r_.difference + at;
    auto step = [&](int64_t i, F x, F y) {
      if constexpr (D == Divergence::mse) {
        F lowest = set1(kLowest);  // both -inf: no difference
        F d = sub(max(lowest, x), max(lowest, y));
        store(pull + i, d);
        a = fma(d, d, a);
      }
      if constexpr (!kExponentials) return;
      x = sub(x, m_s);
      F e_s = exponential(x, soft);
      store(exp_s + i, e_s);
      z_s = add(z_s, e_s);
      if constexpr (kLogits && kSoft) {
        y = sub(y, m_t);
        F e_t = exponential(y, soft);
        z_t = add(z_t, e_t);
        a = add(a, own_term(i, x, y, e_s, e_t, pull, difference));
      }
      if constexpr (!kLogits) store(pull + i, set1(0.0f));
      if constexpr (H != kNone) {
        F e_1 = hard_exponential<H>(e_s, x, hard);
        z_1 = add(z_1, e_1);
        if constexpr (H == kOwn) store(exp_1 + i, e_1);
      }
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      __builtin_prefetch(s + i + kBlock);
      if constexpr (kLogits) __builtin_prefetch(t + i + kBlock);
      step(i, load(s + i), load(t + i));
    }
    int tail = static_cast<int>(n - i);
    if (tail > 0) step(i, load_n(s + i, tail, kMinusInfinity), load_n(t + i, tail, kMinusInfinity));
    r_.z_s[b] = sum(z_s);
    r_.z_t[b] = sum(z_t);
    r_.z_1[b] = sum(z_1);
    r_.a[b] = sum(a);
  }

  // Keeps what the gradient needs of an element, and returns its term of a. Where an exponential is 0, x or y may be
  // infinite.
  static F own_term(int64_t i, F x, F y, F e_s, F e_t, float* pull, float* difference) {
    F smallest = set1(kSmallest);
    if constexpr (D == Divergence::reverse_kl) {
      F term = zero_below(e_s, smallest, mul(e_s, sub(x, y)));
      store(pull + i, term);
      return term;
    }
    store(pull + i, e_t);
    if constexpr (D == Divergence::jsd) store(difference + i, sub(y, x));
    if constexpr (kTwoPasses) return set1(0.0f);
    if constexpr (D == Divergence::soft_ce) return zero_below(e_t, smallest, neg(mul(e_t, x)));
    return zero_below(e_t, smallest, mul(e_t, sub(y, x)));
  }

  void scan_extra(const float* s, int64_t n, int64_t b) const {
    float max_s = r_.max_s[b] = largest(s, n);
    F z_1 = set1(0.0f);
    int64_t at = k_.grad.data != nullptr || kTwoPasses || !kLogits ? blocks_.place(blocks_.begin(b)) : 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      F x = sub(load_n(s + i, static_cast<int>(smaller(n - i, kLanes)), kMinusInfinity), set1(max_s));
      F e_s = exponential(x, soft_), e_1 = hard_exponential<H>(e_s, x, hard_);
      int count = static_cast<int>(smaller(n - i, kLanes));
      store_n(r_.exp_s + at + i, e_s, count);
      store_n(r_.pull + at + i, set1(0.0f), count);
      if constexpr (H == kOwn) store_n(r_.exp_1 + at + i, e_1, count);
      z_1 = add(z_1, e_1);
    }
    r_.z_s[b] = r_.z_t[b] = r_.a[b] = 0.0f;
    r_.max_t[b] = kLowest;
    r_.z_1[b] = sum(z_1);
  }

  // The row's sums; leaves the blocks' factors f_s, f_t, f_1 and the gaps between their centres in the scratch.
  RowSums merge() const {
    RowSums all;
    float m_s = largest(r_.max_s, blocks_.common), m_t = largest(r_.max_t, blocks_.common);
    float m_1 = blocks_.all == blocks_.common ? m_s : largest(r_.max_s, blocks_.all);
    all.m_s = m_s, all.m_t = m_t, all.m_1 = m_1;
    if (blocks_.all == 1) {  // most rows of a classifier: no factors to compute
      all.z_s = r_.z_s[0], all.z_t = r_.z_t[0], all.z_1 = r_.z_1[0], all.a = r_.a[0];
      r_.z_s[0] = r_.z_t[0] = r_.f_1[0] = 1.0f;
      r_.gap[0] = 0.0f;
      return all;
    }
    for (int64_t b = 0; b < blocks_.all; ++b) {
      bool common = b < blocks_.common;
      double x = static_cast<double>(r_.max_s[b]) - m_s, y = static_cast<double>(r_.max_t[b]) - m_t;
      float f_s = common && kExponentials ? factor(x, soft_) : 0.0f;
      float f_t = common && kLogits && kSoft ? factor(y, soft_) : 0.0f;
      r_.f_1[b] = H == kNone ? 0.0f : factor(static_cast<double>(r_.max_s[b]) - m_1, hard_);
      all.z_s += static_cast<double>(f_s) * r_.z_s[b];
      all.z_t += static_cast<double>(f_t) * r_.z_t[b];
      all.z_1 += static_cast<double>(r_.f_1[b]) * r_.z_1[b];
      all.a += own_sum(b, x, y, f_s, f_t);
      r_.z_s[b] = f_s;
      r_.z_t[b] = f_t;
      r_.gap[b] = static_cast<float>(x - y);
    }
    return all;
  }

  static float factor(double x, const Exp& e) { return top(exponential(set1(static_cast<float>(x)), e)); }

  // A block's a, centred on the row's largest logits.
  double own_sum(int64_t b, double x, double y, double f_s, double f_t) const {
    if (D == Divergence::mse) return r_.a[b];
    if (D == Divergence::reverse_kl) return f_s > 0.0 ? f_s * (r_.a[b] + r_.z_s[b] * (x - y)) : 0.0;
    if (D == Divergence::soft_ce) return f_t > 0.0 ? f_t * (r_.a[b] - r_.z_t[b] * x) : 0.0;
    return f_t > 0.0 ? f_t * (r_.a[b] + r_.z_t[b] * (y - x)) : 0.0;
  }

  double cross_entropy(RowSums& r, double total) const {
    double smoothing = k_.label_smoothing;
    double log_z = r.m_1 + log(r.z_1);
    r.log_z_1 = masked_ ? log_add(log_z, label_logit_) : log_z;
    double hard = (1.0 - smoothing) * (r.log_z_1 - label_logit_);
    return smoothing > 0.0 ? hard + smoothing * (r.log_z_1 - total / static_cast<double>(k_.student_classes)) : hard;
  }

  static double log_add(double a, double b) {
    double high = a > b ? a : b, low = a > b ? b : a;
    return low == kMinusInfinity ? high : high + log1p(exp(low - high));
  }

  Soft divergence(const RowSums& r) {
    double temperature = k_.temperature, squared = temperature * temperature;
    double scale = weight_ * k_.scale * k_.alpha * temperature;  // of the gradient
    Soft soft;
    if constexpr (D == Divergence::forward_kl || D == Divergence::soft_ce) {
      double log_z = D == Divergence::soft_ce ? log(r.z_s) : log(r.z_s / r.z_t);
      soft.value = squared * (r.a / (temperature * r.z_t) + log_z);
      soft.s = scale / r.z_s;
      soft.pull = -scale / r.z_t;
    }
    if constexpr (D == Divergence::reverse_kl) {
      double log_z = log(r.z_t / r.z_s), kl = r.a / (temperature * r.z_s) + log_z;
      soft.value = squared * kl;
      soft.s = scale / r.z_s * (log_z - kl);
      soft.pull = scale / (r.z_s * temperature);
    }
    if constexpr (D == Divergence::mse) {
      double columns = static_cast<double>(blocks_.columns);
      soft.value = r.a / columns;
      soft.pull = weight_ * k_.scale * k_.alpha * 2.0 / columns;
    }
    if constexpr (D == Divergence::dkd) soft = decoupled(r, scale, squared);
    if constexpr (D == Divergence::jsd) soft = jensen_shannon(r, scale, squared);
    if constexpr (D == Divergence::tv) soft = total_variation(r, scale, squared);
    if constexpr (D == Divergence::top_k) soft = top_classes(r, scale, squared);
    return soft;
  }

  // The sums are those of the classes but the label.
  Soft decoupled(const RowSums& r, double scale, double squared) const {
    double temperature = k_.temperature, beta = k_.beta;
    Soft soft;
    double rest = r.a / (temperature * r.z_t) + log(r.z_s / r.z_t), target = 0, pull = 0;
    if (masked_) {
      double own_q = label_logit_ / temperature, own_p = value(t_, label_) / temperature;
      double rest_q = r.m_s / temperature + log(r.z_s), rest_p = r.m_t / temperature + log(r.z_t);
      double log_q = log_add(own_q, rest_q), log_p = log_add(own_p, rest_p);
      double p = exp(own_p - log_p), others = exp(rest_p - log_p);
      if (p > 0.0) target += p * ((own_p - log_p) - (own_q - log_q));
      if (others > 0.0) target += others * ((rest_p - log_p) - (rest_q - log_q));
      pull = p > 0.5 ? exp(rest_q - log_q) - others : p - exp(own_q - log_q);  // near 1 both lose their last digits
    }
    soft.value = squared * (target + beta * rest);
    soft.s = scale * (pull + beta) / r.z_s;
    soft.pull = -scale * beta / r.z_t;
    soft.label = -scale * pull;
    return soft;
  }

  // With d = ln p - ln q and h = -log1p(b expm1(d)) for d <= 0, -log1p((1-b) expm1(-d)) for d > 0, which neither
  // cancels nor overflows, m = b p + (1-b) q has ln q - ln m = h - max(d, 0) and ln p - ln m = h - max(-d, 0).
  Soft jensen_shannon(const RowSums& r, double scale, double squared) const {
    const Exp one = hard_;
    F zero = set1(0.0f), smallest = set1(kSmallest), beta = set1(k_.beta), rest = set1(1.0f - k_.beta);
    F by_t = set1(1.0f / k_.temperature);
    double to_p = 0, to_q = 0, log_z = log(r.z_s / r.z_t);
    for (int64_t b = 0; b < blocks_.common; ++b) {
      F c_q = set1(static_cast<float>(r_.z_s[b] / r.z_s)), c_p = set1(static_cast<float>(r_.z_t[b] / r.z_t));
      F shift = set1(static_cast<float>(log_z - r_.gap[b] / static_cast<double>(k_.temperature)));
      F sum_p = zero, sum_q = zero;
      each(b, [&](int64_t i) {
        F q = mul(load(r_.exp_s + i), c_q), p = mul(load(r_.pull + i), c_p);
        F d = fma(load(r_.difference + i), by_t, shift), minus = neg(d);
        F weight = add(zero_below(d, zero, rest), zero_below(minus, zero, beta));
        F h = neg(log1p_of(mul(weight, exponential_minus_one(neg(max(d, minus)), one))));
        F q_term = zero_below(q, smallest, mul(q, sub(h, max(d, zero))));
        sum_q = add(sum_q, q_term);
        sum_p = add(sum_p, zero_below(p, smallest, mul(p, sub(h, max(minus, zero)))));
        return q_term;
      });
      to_p += sum(sum_p);
      to_q += sum(sum_q);
    }
    Soft soft;
    double share = 1.0 - static_cast<double>(k_.beta);
    soft.value = squared * (static_cast<double>(k_.beta) * to_p + share * to_q);
    soft.s = -scale * share * to_q / r.z_s;
    soft.pull = scale * share;
    return soft;
  }

  Soft total_variation(const RowSums& r, double scale, double squared) const {
    double distance = 0, balance = 0;
    for (int64_t b = 0; b < blocks_.common; ++b) {
      F c_q = set1(static_cast<float>(r_.z_s[b] / r.z_s)), c_p = set1(static_cast<float>(r_.z_t[b] / r.z_t));
      F apart = set1(0.0f), sum_q = apart;
      each(b, [&](int64_t i) {
        F q = mul(load(r_.exp_s + i), c_q), p = mul(load(r_.pull + i), c_p), d = sub(q, p);
        F signed_q = sub(zero_below(q, p, q), zero_below(p, q, q));
        apart = add(apart, max(d, neg(d)));
        sum_q = add(sum_q, signed_q);
        return signed_q;
      });
      distance += sum(apart);
      balance += sum(sum_q);
    }
    if (distance != distance) balance = distance;  // the sign of a NaN is none
    Soft soft;
    soft.value = squared * 0.5 * distance;
    soft.s = -scale * 0.5 * balance / r.z_s;
    soft.pull = scale * 0.5;
    return soft;
  }

  // Replaces each pull of a block by what f makes of it. Beyond the block's last logit the scratch has exponentials of
  // -inf: zeros.
  template <class Function>
  void each(int64_t b, const Function& f) const {
    int64_t end = blocks_.end(b);
    for (int64_t i = blocks_.begin(b); i < end; i += kLanes) store(r_.pull + i, f(i));
  }

  // The formulas are in python/potstill/ops/topk.py. A class that is given leaves exp_s and has its gradient in `pull`:
  // where the student's other classes have next to no probability the factor of exp_s is huge.
  Soft top_classes(const RowSums& r, double scale, double squared) {
    TopK& top = top_k_;
    int64_t k = k_.teacher_classes;
    double given = top.gather(static_cast<const float*>(t_.data), k_.indices + row_ * k, k, r_.pull);
    double by = k_.rest == Rest::renormalize ? given : 1.0, value_of = 0, own = 0;
    for (int64_t u = 0; u < top.count; ++u) {
      int64_t i = top.classes[u];
      double log_q = (value(s_, i) - r.m_s) / k_.temperature - log(r.z_s);
      top.p[u] /= by;
      top.q[u] = exp(log_q);
      value_of += top.p[u] * ((k_.entropy ? log(top.p[u]) : 0.0) - log_q);
      own += top.q[u];
      r_.exp_s[i] = 0.0f;
    }
    double rest = k_.rest == Rest::tail && given < 1.0 ? 1.0 - given : 0.0, outside = 0;
    if (rest > 0.0) outside = own < 0.5 ? 1.0 - own : others(r);
    if (!(outside > 0.0)) rest = 0.0;  // the student has no other class
    if (rest > 0.0) value_of += rest * ((k_.entropy ? log(rest) : 0.0) - log(outside));
    double ratio = rest > 0.0 ? rest / outside : 0.0, total = given / by + rest;
    for (int64_t u = 0; u < top.count; ++u) {
      r_.pull[top.classes[u]] = static_cast<float>(scale * (total * top.q[u] - top.p[u]));
    }
    Soft soft;
    soft.value = given == given ? squared * value_of : given;
    soft.s = scale * (total - ratio) / r.z_s;
    soft.pull = 1.0;
    return soft;
  }

  // The student's probability of the classes that are not given. They are summed up: where it is small, 1 minus the
  // others' would have no digit left.
  double others(const RowSums& r) const {
    double total = 0;
    for (int64_t b = 0; b < blocks_.common; ++b) {
      F z = set1(0.0f);
      for (int64_t i = blocks_.begin(b); i < blocks_.end(b); i += kLanes) z = add(z, load(r_.exp_s + i));
      total += static_cast<double>(sum(z)) * r_.z_s[b];
    }
    return total / r.z_s;
  }

  template <class S>
  void write(S* g, const Soft& soft, const RowSums& r) const {
    double hard = weight_ * k_.scale * (1.0 - k_.alpha), constant = 0, by_z1 = 0;
    if (H != kNone) {
      constant = -hard * k_.label_smoothing / static_cast<double>(k_.student_classes);
      by_z1 = masked_ ? exp(r.m_1 - r.log_z_1) : 1.0 / r.z_1;
    }
    auto factors = [&](int64_t b) {
      bool common = b < blocks_.common;
      double s = common ? soft.s * r_.z_s[b] : 0.0, pull = soft.pull;
      if (D == Divergence::forward_kl || D == Divergence::soft_ce || D == Divergence::dkd) pull *= r_.z_t[b];
      if (D == Divergence::reverse_kl && common) {
        double gap = r_.z_s[b] > 0.0f ? r_.gap[b] : 0.0;
        s = r_.z_s[b] * (soft.s + soft.pull * gap);
        pull *= r_.z_s[b];
      }
      return Factors{static_cast<float>(s), static_cast<float>(pull), static_cast<float>(hard * by_z1 * r_.f_1[b]),
                     static_cast<float>(constant)};
    };
    for (int64_t b = 0; b < blocks_.all; ++b) {
      int64_t i = blocks_.begin(b);
      write_block<H, kSoft>(g + i, blocks_.end(b) - i, r_, blocks_.place(i), factors(b), hard_);
    }
    if (H == kNone && !masked_) return;
    double more = soft.label;
    if (H != kNone) more -= hard * (1.0 - k_.label_smoothing);
    if (H != kNone && masked_) more += hard * exp(label_logit_ - r.log_z_1);
    int64_t place = blocks_.place(label_);
    F e_s = kSoft ? load(r_.exp_s + place) : set1(0.0f);
    F at_label =
        gradient<H, kSoft>(e_s, load(r_.pull + place), kept_hard<H>(r_, place, hard_), factors(blocks_.of(label_)));
    store_n(g + label_, add(at_label, set1(static_cast<float>(more))), 1);
  }

  const KdLoss& k_;
  RowScratch r_;
  Blocks blocks_;
  TopK top_k_;
  Exp soft_, hard_;
  FloatPtr s_{}, t_{};
  int64_t row_ = 0, label_ = -1;
  double label_logit_ = 0.0;
  bool masked_ = false;  // the label is no part of the row's sums
  double weight_ = 1.0;
};

template <Divergence D, Hard H>
void kd_rows(const KdLoss& k) {
  int64_t v = k.student_classes, floats = RowScratch::floats(v) + TopK::floats(k.teacher_classes);
  int64_t grain = v < kLogitsPerTask ? kLogitsPerTask / v : 1;
  parallel_for((k.rows + grain - 1) / grain, k.rows * v >= kMinLogitsForThreads, [&](int64_t task) {
    KdRows<D, H> rows(k, static_cast<float*>(k.scratch) + thread_index() * floats);
    for (int64_t row = task * grain; row < smaller(k.rows, (task + 1) * grain); ++row) rows(row);
  });
}

template <Divergence D>
void kd_loss_of(const KdLoss& k) {
  if (k.alpha == 1.0f) return kd_rows<D, kNone>(k);
  if constexpr (D != Divergence::top_k) {  // which takes classes out of exp_s
    if (k.temperature == 1.0f) return kd_rows<D, kPower1>(k);
  }
  if constexpr (D == Divergence::forward_kl) {  // the others can spare the code more than an exponential
    if (k.temperature == 2.0f) return kd_rows<D, kPower2>(k);
    if (k.temperature == 4.0f) return kd_rows<D, kPower4>(k);
  }
  kd_rows<D, kOwn>(k);
}

void kd_loss(const KdLoss& call) {
  if (call.rows == 0) return;
  KdLoss k = call;
  if (k.alpha == 0.0f) {  // the teacher has no say: a KL of the student with itself is 0
    k.divergence = Divergence::forward_kl;
    k.teacher = k.student;
    k.teacher_classes = k.student_classes;
    k.teacher_stride = k.student_stride;
  }
  if (k.divergence == Divergence::mse) k.temperature = 1.0f;  // it means nothing, and 1 saves an exponential
  switch (k.divergence) {
    case Divergence::forward_kl:
      return kd_loss_of<Divergence::forward_kl>(k);
    case Divergence::reverse_kl:
      return kd_loss_of<Divergence::reverse_kl>(k);
    case Divergence::jsd:
      return kd_loss_of<Divergence::jsd>(k);
    case Divergence::tv:
      return kd_loss_of<Divergence::tv>(k);
    case Divergence::dkd:
      return kd_loss_of<Divergence::dkd>(k);
    case Divergence::soft_ce:
      return kd_loss_of<Divergence::soft_ce>(k);
    case Divergence::mse:
      return kd_loss_of<Divergence::mse>(k);
    case Divergence::top_k:
      return kd_loss_of<Divergence::top_k>(k);
  }
}

// With alpha = 0 the student stands in for the teacher.
size_t kd_loss_scratch(int64_t student_classes, int64_t teacher_classes) {
  int64_t most = student_classes > teacher_classes ? student_classes : teacher_classes;
  return static_cast<size_t>(max_threads() * (RowScratch::floats(student_classes) + TopK::floats(most))) *
         sizeof(float);
}

}  // namespace
