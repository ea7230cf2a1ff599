// exp(x / t) for x <= 0 and one t > 0, as 2^n 2^r with n the integer nearest to x log2(e) / t and |r| <= 1/2.
//
// 2^r = 1 + r (c1 + ... + c5 r^4) is the minimax fit of the relative error: 9.1e-8, with its coefficients and Horner's
// steps rounded 1.6e-7 (2 ulp). That log2(e) / t is rounded changes t by 2^-25 of itself, and an fma that is not fused
// adds as much: relative errors of 2^-25 |x / t|, but less than 2^-25 of exp(0) because |y| exp(-|y|) < 1/2.
// Below exp(-87.7), where 2^n leaves the normal numbers, the result is exactly 0, also for -inf; NaN stays NaN.
#pragma once

namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kExp2Shift = 0x1.8p23f + 127.0f;  // see exp2i
constexpr double kExpFloor = -127.25 / kLog2E;    // n = -127, of which exp2i makes 0

struct Exp {
  F scale, floor;
  explicit Exp(float t) : scale(set1(static_cast<float>(kLog2E / t))), floor(set1(static_cast<float>(kExpFloor * t))) {}
};

struct Power {  // exp(x / t) = (1 + r c) 2^n
  F r, c, two_n;
};

inline Power power(F x, const Exp& e) {
  x = max(e.floor, x);  // in this order a NaN stays
  F shift = set1(kExp2Shift);
  F shifted = fma(x, e.scale, shift);  // so large that its last bit counts ones: the sum rounds to an integer
  F r = fma(x, e.scale, sub(shift, shifted));
  F c = fma(r, set1(0x1.5bda7ap-10f), set1(0x1.3ce8b0p-7f));
  c = fma(c, r, set1(0x1.c6b6d8p-5f));
  c = fma(c, r, set1(0x1.ebf9c2p-3f));
  c = fma(c, r, set1(0x1.62e42ap-1f));
  return {r, c, exp2i(shifted)};
}

inline F exponential(F x, const Exp& e) {
  Power p = power(x, e);
  return mul(fma(p.c, p.r, set1(1.0f)), p.two_n);
}

// exp(x / t) - 1: the polynomial's own error near 0 is 5e-7 of the result.
inline F exponential_minus_one(F x, const Exp& e) {
  Power p = power(x, e);
  return fma(mul(p.c, p.r), p.two_n, sub(p.two_n, set1(1.0f)));
}

}  // namespace
