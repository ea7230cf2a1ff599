// The activations that a linear layer's epilogue applies; a NaN stays a NaN. Errors are measured against float64 by the
// tests, as a share of max(1, |x|).
#pragma once

#include "exp.inl"

namespace {

// x Phi(x), with Phi(x) - 1/2 = x P(u) for |x| <= 5.2, u = 2 x^2 / 5.2^2 - 1: the minimax fit of the product, 6.5e-7,
// and with rounding 7.4e-7. Beyond 5.2 Phi stays at its end, so that the result is x, or at most 6e-7 below zero.
inline F gelu(F x) {
  constexpr float kEnd = 5.2f;
  constexpr float kP[] = {0x1.166cecp-3f,  -0x1.157a20p-4f, 0x1.99d8d2p-5f,  -0x1.473250p-5f, 0x1.056318p-5f,
                          -0x1.92f8bep-6f, 0x1.2d3c38p-6f,  -0x1.ad2ba8p-7f, 0x1.ef58d2p-8f,  -0x1.cc940cp-9f,
                          0x1.765198p-9f,  -0x1.47a61ap-9f, 0x1.c13552p-11f};
  F left = max(set1(-kEnd), x);  // in this order a NaN stays
  F inside = neg(max(set1(-kEnd), neg(left)));
  F u = fma(mul(inside, inside), set1(2.0f / (kEnd * kEnd)), set1(-1.0f));
  F p = set1(kP[12]);
#pragma GCC unroll 12
  for (int i = 11; i >= 0; --i) p = fma(p, u, set1(kP[i]));
  return mul(left, fma(inside, p, set1(0.5f)));
}

// x / (1 + e^-z), by an exponential of -|z|, which cannot overflow: 1 / (1 + e) for z >= 0, else e / (1 + e).
inline F times_sigmoid(F x, F z) {
  F zero = set1(0.0f), one = set1(1.0f);
  F e = exponential(neg(max(neg(z), z)), Exp(1.0f));
  F numerator = add(e, zero_below(z, zero, sub(one, e)));
  return div(mul(x, numerator), add(one, e));
}

inline F silu(F x) { return times_sigmoid(x, x); }

// x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, where (1 + tanh(y)) / 2 is the sigmoid of 2 y.
inline F gelu_tanh(F x) {
  constexpr float kTwice = 1.5957691216f;  // 2 sqrt(2/pi)
  return times_sigmoid(x, mul(x, fma(mul(x, x), set1(0.044715f * kTwice), set1(kTwice))));
}

template <Activation A>
F activate(F x) {
  if constexpr (A == Activation::relu) return max(set1(0.0f), x);
  if constexpr (A == Activation::gelu) return gelu(x);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (A == Activation::silu) return silu(x);
  return x;
}

// Calls f<activation>().
template <class Body>
void with_activation(Activation activation, const Body& f) {
  switch (activation) {
    case Activation::none:
      return f.template operator()<Activation::none>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
  }
}

// Where a linear layer's results go, and what they become on the way. A copy of its own in every loop that writes: what
// lies in memory would be read again after each store.
template <class T>
struct Output {
  T* y;
  const T* residual;
  FloatPtr bias;
  int64_t n;

  template <class Args>
  explicit Output(const Args& a)
      : y(static_cast<T*>(a.y.data)), residual(static_cast<const T*>(a.residual.data)), bias(a.bias), n(a.n) {}

  // Writes the first `lanes` of a vector of outputs of a row.
  template <Activation A>
  void write(int64_t row, int64_t column, int lanes, F v) const {
    v = activate<A>(add_bias(v, bias, column, lanes));
    int64_t at = row * n + column;
    if (residual != nullptr) v = add(v, load_n(residual + at, lanes, 0.0f));
    lanes == kLanes ? store(y + at, v) : store_n(y + at, v, lanes);
  }
};

}  // namespace
