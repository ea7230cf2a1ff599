// exp(x) - 1 and log(1 + x) for x <= 0, accurate also near 0.
//
// log(m) = f - f^2/2 + f^3 q(f) with f = m - 1 and -1/4 <= f < 1/2; q has degree 6, a minimax fit of the relative
// error: 4e-8, with its coefficients and steps rounded 1.1e-7.
#pragma once

#include "exp.inl"

namespace {

inline F log_of(F x) {  // x normal and positive
  F m;
  F e = exponent(x, m);
  F f = sub(m, set1(1.0f));
  F q = fma(f, set1(0x1.c772b6p-5f), set1(-0x1.f03174p-4f));
  q = fma(q, f, set1(0x1.313e30p-3f));
  q = fma(q, f, set1(-0x1.57d5c8p-3f));
  q = fma(q, f, set1(0x1.993ce8p-3f));
  q = fma(q, f, set1(-0x1.ffececp-3f));
  q = fma(q, f, set1(0x1.5555b2p-2f));
  F log_m = fma(mul(f, f), fma(q, f, set1(-0.5f)), f);
  return fma(e, set1(0x1.62e430p-1f), log_m);
}

// -1 < x <= 0. What rounding 1 + x loses is added to the logarithm: exact where x is small, and where it is not the
// loss is a last bit of the result.
inline F log1p_of(F x) {
  F one = set1(1.0f), y = add(one, x);
  return add(log_of(y), sub(x, sub(y, one)));
}

}  // namespace
