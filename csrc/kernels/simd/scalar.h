// The primitives in plain C++: the fallback of every machine, and the yardstick of the SIMD headers.
//
// Every header in this folder defines the same names:
//   kLanes                     floats (and int32s) in one vector
//   F, I                       vectors of kLanes floats / int32s
//   load load_n store store_n  float and bf16 memory; *_n touch only the first n lanes, load_n fills the rest
//   load load_n                also of int8 memory, widened to floats
//   set1 add sub mul div fma neg round_even sum top
//   max                        the larger; if either is a NaN, the second
//   exp2i                      its argument's bits shifted left by 23: 2^n from 1.5 * 2^23 + 127 + n, -126 <= n <= 127;
//                              0 for n = -127
//   exponent                   e with x = m 2^e and 3/4 <= m < 3/2; x is normal and positive
//   zero_below                 a < b ? 0 : x, lane by lane: 0 even where x is a NaN, x where a or b is one
//   to_float                   I -> F, rounded to nearest even
//   magnitude_max              unsigned maximum of |x|'s bits: a NaN or inf wins over every finite number
//   store_quads                rounds kLanes activations to integers (in [-127, 127]) and writes every four of them in
//                              the form that quad() reads, kQuadBytes at each `stride`; adds the magnitudes of the
//                              negative ones to a NegativeSum, if this ISA needs it; kZeroQuad fills a row of zeros
//   Weights weights            one vector of weights: kLanes outputs by four inputs
//   store_bytes                rounds kLanes activations as store_quads does, and writes every four as signed bytes
//   low_nibbles high_nibbles   one vector of int4 weights, 0..15: those in the low, or the high, halves of its bytes
//   broadcast_quad             four signed activations, in all lanes
//   NibbleSum nibble_start dot_nibbles fold total
//                              the exact sum of a start and of dot products with nibbles; fold() at least after every
//                              eighth
//   iset1 load_bytes mul16     the same int32 in all lanes; kLanes unsigned bytes; a product of factors of 16 bits
//   start dot                  start(column_sums, row_sum), then dot() of every quad: the exact sums of products;
//                              row_sum is NegativeSum's total
//   Quad quad dot_floor        the fewest instructions of any 8-bit dot product of this ISA: what peak.inl measures
//   kOutputsAtOnce             outputs whose sums the sparse kernels keep in registers: a divisor of kGroup
//   store_cells kZeroCell      rounds kLanes activations to bytes, side by side, in the form that dot_cells() takes
//   dot_cells                  adds the products of four activations and four weights, lane by lane; sums begin with
//                              start(the lane's sum of weights, 0)
//   spread                     N consecutive int32, each in all lanes of a vector of its own; N is 1, 2 or 4
//   Window window pick         32 lanes of memory; those that kLanes indices name, each modulo 32
//   transpose                  a square of kLanes x kLanes int32; strides in int32
//   istore from_bits           an I to memory; its bits as floats
//   opaque                     hides a value from the optimiser
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../types.h"

namespace {

constexpr int kLanes = 1;
constexpr int kQuadBytes = 4;
constexpr uint8_t kZeroQuad = 0;
constexpr int kRows = 2;  // rows and panels of the int8 micro-kernel's tile
constexpr int kPanelsPerTile = 1;
constexpr int kNibbleRows = 2;  // likewise of the int4 micro-kernel
constexpr int kNibblePanels = 1;

struct F {
  float v;
};
struct I {
  int32_t v;
};

inline F set1(float x) { return {x}; }
inline F load(const float* p) { return {*p}; }
inline F load_n(const float* p, int n, float fill) { return {n > 0 ? *p : fill}; }
inline void store(float* p, F a) { *p = a.v; }
inline void store_n(float* p, F a, int n) {
  if (n > 0) *p = a.v;
}
inline F load(const bf16* p) {
  uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  F r;
  memcpy(&r.v, &bits, 4);
  return r;
}
inline F load_n(const bf16* p, int n, float fill) { return n > 0 ? load(p) : F{fill}; }
inline F load(const int8_t* p) { return {static_cast<float>(*p)}; }
inline F load_n(const int8_t* p, int n, float fill) { return n > 0 ? load(p) : F{fill}; }
inline void store(bf16* p, F a) {
  uint32_t bits;
  memcpy(&bits, &a.v, 4);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void store_n(bf16* p, F a, int n) {
  if (n > 0) store(p, a);
}
inline F add(F a, F b) { return {a.v + b.v}; }
inline F sub(F a, F b) { return {a.v - b.v}; }
inline F mul(F a, F b) { return {a.v * b.v}; }
inline F div(F a, F b) { return {a.v / b.v}; }
inline F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
inline F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
inline F neg(F a) { return {-a.v}; }
inline F round_even(F a) { return {nearbyintf(a.v)}; }
inline F exp2i(F n) {
  uint32_t bits;
  memcpy(&bits, &n.v, 4);
  bits <<= 23;
  F r;
  memcpy(&r.v, &bits, 4);
  return r;
}
inline F exponent(F x, F& m) {
  uint32_t bits;
  memcpy(&bits, &x.v, 4);
  int32_t e = static_cast<int32_t>(bits - 0x3f400000u) >> 23;
  bits -= static_cast<uint32_t>(e) << 23;
  memcpy(&m.v, &bits, 4);
  return {static_cast<float>(e)};
}
inline F zero_below(F a, F b, F x) { return a.v < b.v ? F{0.0f} : x; }
inline float sum(F a) { return a.v; }
inline float top(F a) { return a.v; }

inline I izero() { return {0}; }
inline I iadd(I a, I b) { return {a.v + b.v}; }
inline I iload(const int32_t* p) { return {*p}; }
inline I magnitude_max(I acc, F a) {
  int32_t bits;
  memcpy(&bits, &a.v, 4);
  bits &= 0x7fffffff;
  return {bits > acc.v ? bits : acc.v};
}
inline int32_t itop(I a) { return a.v; }
inline F to_float(I a) { return {static_cast<float>(a.v)}; }

struct NegativeSum {
  int32_t total() const { return 0; }
};
inline void store_quads(int8_t* p, int64_t, F a, NegativeSum&) { *p = static_cast<int8_t>(nearbyintf(a.v)); }
inline I start(I, int32_t) { return izero(); }
struct Weights {
  int8_t w[4];
};
inline Weights weights(const int8_t* p) {
  Weights r;
  memcpy(r.w, p, 4);
  return r;
}
struct Quad {
  int8_t x[4];
};
inline Quad quad(const int8_t* p) {
  Quad r;
  memcpy(r.x, p, 4);
  return r;
}
inline I dot_floor(I acc, Weights w, Quad x) {
  for (int i = 0; i < 4; ++i) acc.v += static_cast<int32_t>(w.w[i]) * x.x[i];
  return acc;
}
template <int V>
inline void dot(I (&acc)[V], const Weights (&w)[V], const int8_t* p) {
  Quad x = quad(p);
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) acc[v] = dot_floor(acc[v], w[v], x);
}
inline void opaque(Quad& x) { asm volatile("" : "+m"(x)); }

inline I iset1(int32_t x) { return {x}; }
inline I load_bytes(const uint8_t* p) { return {*p}; }
inline I mul16(I a, int32_t b) { return {a.v * b}; }
inline void store_bytes(int8_t* p, int64_t, F a) { *p = static_cast<int8_t>(nearbyintf(a.v)); }
inline Weights low_nibbles(const uint8_t* p) {
  Weights r;
  for (int i = 0; i < 4; ++i) r.w[i] = static_cast<int8_t>(p[i] & 15);
  return r;
}
inline Weights high_nibbles(const uint8_t* p) {
  Weights r;
  for (int i = 0; i < 4; ++i) r.w[i] = static_cast<int8_t>(p[i] >> 4);
  return r;
}
inline I broadcast_quad(const int8_t* p) {
  I r;
  memcpy(&r.v, p, 4);
  return r;
}
struct NibbleSum {
  I sum;
};
inline NibbleSum nibble_start(I a) { return {a}; }
inline void dot_nibbles(NibbleSum& acc, Weights w, I x) {
  Quad q;
  memcpy(q.x, &x.v, 4);
  acc.sum = dot_floor(acc.sum, w, q);
}
inline void fold(NibbleSum&) {}
inline I total(NibbleSum a) { return a.sum; }

constexpr int kOutputsAtOnce = 1;
constexpr uint8_t kZeroCell = 0;
inline void istore(int32_t* p, I a) { *p = a.v; }
inline F from_bits(I a) {
  F r;
  memcpy(&r.v, &a.v, 4);
  return r;
}
inline void store_cells(int8_t* p, F a) { *p = static_cast<int8_t>(nearbyintf(a.v)); }
inline I dot_cells(I acc, I x, I w) {
  Weights weight;
  Quad quads;
  memcpy(weight.w, &w.v, 4);
  memcpy(quads.x, &x.v, 4);
  return dot_floor(acc, weight, quads);
}
template <int N>
inline void spread(const void* p, I (&to)[N]) {
  for (int i = 0; i < N; ++i) memcpy(&to[i].v, static_cast<const char*>(p) + 4 * i, 4);
}
struct Window {
  const int32_t* p;
};
inline Window window(const int32_t* p) { return {p}; }
inline I pick(const Window& from, const uint8_t* index) { return {from.p[*index % 32]}; }
inline void transpose(const int32_t* from, int64_t, int32_t* to, int64_t) { *to = *from; }

}  // namespace
