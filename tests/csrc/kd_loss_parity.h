// Parity of kd_loss, part of parity.cpp: equal up to rounding.
#pragma once

namespace {

struct KdCase {
  int64_t rows, v, teacher_v;  // of top_k the teacher has teacher_v classes given
  Type student, teacher;
  Divergence divergence;
  Rest rest;
  float temperature, alpha, label_smoothing;
  bool gradient, targets, infinity, weights, in_place;
};

// The sums over v are taken in another order by each ISA, so results agree to a few roundings of the terms they are
// sums of: a loss, of the logits' span; a gradient, of the largest probabilities, which may cancel. A bf16 gradient
// agrees to one unit in its last place besides, at most 2^-7 of its value.
constexpr float kTolerance = 2e-6f;
constexpr float kSpan = 10;
constexpr float kScale = 0.37f;
constexpr float kBeta = 0.3f;

bool close(float got, float expected, float tolerance) {
  if (std::isnan(got) || std::isnan(expected)) return std::isnan(got) && std::isnan(expected);
  return got == expected || std::fabs(got - expected) <= tolerance;
}

std::vector<float> logits(int64_t rows, int64_t v, int64_t stride, bool infinity) {
  std::vector<float> values(static_cast<size_t>((rows - 1) * stride + v));
  float offset = uniform(-30, 30);  // of no consequence in exact arithmetic
  for (float& value : values) value = offset + 3 * normal();
  if (infinity) values[static_cast<size_t>(integer(0, static_cast<int>(values.size()) - 1))] = -kInf;
  return values;
}

// The largest value of softmax(row / temperature).
float peak(const Floats& logits, size_t begin, int64_t v, float temperature) {
  size_t end = begin + static_cast<size_t>(v);
  float largest = -kInf;
  for (size_t i = begin; i < end; ++i) largest = std::fmax(largest, logits[i]);
  double sum = 0;
  for (size_t i = begin; i < end; ++i) sum += std::exp(static_cast<double>(logits[i] - largest) / temperature);
  return static_cast<float>(1 / sum);
}

// What the terms of a gradient are at most, in units of the largest probabilities.
float largest_term(Divergence divergence) {
  switch (divergence) {
    case Divergence::forward_kl:
    case Divergence::soft_ce:
    case Divergence::tv:
      return 1;
    default:  // a logarithm of a ratio of probabilities, or a quotient by one
      return kSpan;
  }
}

void compare_gradients(const Floats& got, const Floats& expected, const std::vector<float>& terms, const KdCase& c) {
  for (size_t r = 0; r < terms.size(); ++r) {
    std::string difference;
    for (size_t i = r * static_cast<size_t>(c.v); i < (r + 1) * static_cast<size_t>(c.v) && difference.empty(); ++i) {
      float value = std::fabs(expected[i]);
      float tolerance = kTolerance * (terms[r] + value) + (c.student == Type::bf16 ? value * 0x1p-7f : 0.0f);
      if (!close(got[i], expected[i], tolerance)) difference = "gradient " + at(i, c.v, got[i], expected[i]);
    }
    check(difference.empty(), difference);
  }
}

struct KdInputs {
  explicit KdInputs(const KdCase& c)
      : student_stride(c.in_place ? c.v : c.v + integer(0, 5)),
        teacher_stride(c.divergence == Divergence::top_k ? c.teacher_v : c.teacher_v + integer(0, 5)),
        student(logits(c.rows, c.v, student_stride, c.infinity), c.student),
        teacher(logits(c.rows, c.teacher_v, teacher_stride, c.infinity), c.teacher),
        target(static_cast<size_t>(c.rows) * 8, 8, 0),
        indices(static_cast<size_t>(c.rows * c.teacher_v) * 8, 8, 0),
        weights(static_cast<size_t>(c.rows), Type::f32) {
    for (int64_t r = 0; r < c.rows; ++r) {
      target.as<int64_t>()[r] = integer(0, 4) == 0 ? kIgnored : integer(0, static_cast<int>(c.v) - 1);
      weights.set(static_cast<size_t>(r), integer(0, 3) == 0 ? 0.0f : uniform(0.1f, 2.0f));
    }
    if (c.divergence != Divergence::top_k) return;
    for (int64_t i = 0; i < c.rows * c.teacher_v; ++i) {
      indices.as<int64_t>()[i] = integer(0, static_cast<int>(c.v) - 1);  // some twice
      float log_probability = integer(0, 9) == 0 ? -kInf : -uniform(0.5, 8);
      teacher.set(static_cast<size_t>(i), log_probability);
    }
  }

  static constexpr int64_t kIgnored = -100;
  int64_t student_stride, teacher_stride;
  Floats student, teacher;
  Guarded target, indices;
  Floats weights;
};

// `grad` has the student's logits where the gradient overwrites them.
void run_kd_loss(const Kernels& table, const KdCase& c, const KdInputs& in, int filling, const Floats& loss,
                 const Floats& grad) {
  Guarded scratch(table.kd_loss_scratch(c.v, c.teacher_v), 64, filling);
  KdLoss a{};
  a.student = in.student.pointer();
  a.teacher = in.teacher.pointer();
  a.student_stride = in.student_stride;
  a.teacher_stride = in.teacher_stride;
  if (c.gradient) a.grad = grad.pointer();
  if (c.gradient && c.in_place) {
    memcpy(a.grad.data, a.student.data, static_cast<size_t>(c.rows * c.v) * width(c.student));
    a.student = a.grad;
  }
  a.grad_stride = c.v;
  if (c.targets) a.target = in.target.as<int64_t>();
  if (c.weights) a.row_weight = in.weights.memory.as<float>();
  if (c.divergence == Divergence::top_k) a.indices = in.indices.as<int64_t>();
  a.loss = loss.memory.as<float>();
  a.rows = c.rows;
  a.student_classes = c.v;
  a.teacher_classes = c.teacher_v;
  a.divergence = c.divergence;
  a.rest = c.rest;
  a.entropy = true;
  a.beta = kBeta;
  a.temperature = c.temperature;
  a.alpha = c.alpha;
  a.label_smoothing = c.label_smoothing;
  a.ignore_index = KdInputs::kIgnored;
  a.scale = kScale;
  a.scratch = scratch.as<void>();
  table.kd_loss(a);
}

void kd_loss(const KdCase& c) {
  begin("%s kd_loss %d rows=%d v=%d/%d student=%s teacher=%s T=%g alpha=%g smoothing=%g targets=%d infinity=%d rest=%d",
        tested.name, static_cast<int>(c.divergence), static_cast<int>(c.rows), static_cast<int>(c.v),
        static_cast<int>(c.teacher_v), name(c.student), name(c.teacher), static_cast<double>(c.temperature),
        static_cast<double>(c.alpha), static_cast<double>(c.label_smoothing), c.targets, c.infinity,
        static_cast<int>(c.rest));
  KdInputs in(c);
  auto rows = static_cast<size_t>(c.rows), count = static_cast<size_t>(c.rows * c.v);
  Floats expected_loss(rows, Type::f32, 0x5a), loss(rows, Type::f32, 0xc5);
  Floats expected_grad(count, c.student, 0x5a), grad(count, c.student, 0xc5);
  run_kd_loss(kernels_scalar, c, in, 0x11, expected_loss, expected_grad);
  run_kd_loss(tested, c, in, 0x77, loss, grad);
  for (size_t r = 0; r < rows; ++r) {
    float terms = kSpan * (c.alpha * c.temperature + 1 - c.alpha);  // T^2 KL is a sum over T^2 (t - s) / T
    if (c.divergence == Divergence::jsd || c.divergence == Divergence::tv) terms *= c.temperature;
    float tolerance = 2 * kTolerance * (terms + std::fabs(expected_loss[r]));
    check(close(loss[r], expected_loss[r], tolerance), "loss " + at(r, 1, loss[r], expected_loss[r]));
  }
  if (!c.gradient) return;
  std::vector<float> terms(rows);
  bool own = c.divergence == Divergence::dkd || c.divergence == Divergence::top_k;  // parts of a softmax, renormalised
  for (size_t r = 0; r < rows; ++r) {
    size_t s = r * static_cast<size_t>(in.student_stride), t = r * static_cast<size_t>(in.teacher_stride);
    int64_t common = std::min(c.v, c.teacher_v);
    float soft = own ? 1.0f : peak(in.student, s, common, c.temperature);
    if (!own) soft = std::fmax(soft, peak(in.teacher, t, common, c.temperature));
    soft *= largest_term(c.divergence) * c.alpha * c.temperature;
    terms[r] = 2 * kScale * (soft + (1 - c.alpha) * peak(in.student, s, c.v, 1));
  }
  compare_gradients(grad, expected_grad, terms, c);
}

KdCase random_kd_case(int64_t v, float temperature, float alpha) {
  KdCase c{};
  c.rows = v > 4000 ? 3 : integer(1, 9);
  c.v = c.teacher_v = v;
  c.student = pick<Type>({Type::f32, Type::bf16});
  c.teacher = pick<Type>({Type::f32, Type::bf16});
  c.temperature = temperature;
  c.alpha = alpha;
  c.targets = alpha < 1 || integer(0, 1) == 1;
  c.label_smoothing = integer(0, 1) == 1 ? 0.1f : 0.0f;
  c.infinity = integer(0, 2) == 0;
  c.weights = integer(0, 2) == 0;
  c.in_place = integer(0, 1) == 1;
  return c;
}

void other_divergences(int64_t v, float temperature, float alpha) {
  for (int d = 1; d <= static_cast<int>(Divergence::top_k); ++d) {
    KdCase c = random_kd_case(v, temperature, alpha);
    c.divergence = static_cast<Divergence>(d);
    c.gradient = integer(0, 3) > 0;
    c.teacher_v = integer(1, static_cast<int>(2 * v));
    if (c.divergence == Divergence::reverse_kl) c.infinity = false;  // it may be infinite, and its gradient a NaN
    if (c.divergence == Divergence::dkd) {
      if (v < 4) continue;
      c.targets = true;
      c.infinity = false;  // of three classes two may be left out
      c.teacher_v = std::max(c.teacher_v, int64_t{3});
    }
    if (c.divergence == Divergence::top_k) {
      c.teacher = Type::f32;
      c.teacher_v = integer(1, 40);
      c.rest = pick<Rest>({Rest::tail, Rest::renormalize, Rest::partial});
    }
    kd_loss(c);
  }
}

void kd_loss_cases() {
  for (int64_t v : {1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 100, 1000, 4097, 32003}) {
    for (float temperature : {1.0f, 2.0f, 3.5f, 4.0f}) {
      for (float alpha : {0.0f, 0.5f, 1.0f}) {
        for (bool gradient : {false, true}) {
          KdCase c = random_kd_case(v, temperature, alpha);
          c.gradient = gradient;
          kd_loss(c);
        }
        if (v < 32000) other_divergences(v, temperature, alpha);
      }
    }
  }
}

}  // namespace
