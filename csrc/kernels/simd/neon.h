// The primitives for AArch64 with the dot-product extension (ARMv8.2). Their list and meaning: scalar.h.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "../types.h"

namespace {

constexpr int kLanes = 4;
constexpr int kQuadBytes = 4;
constexpr uint8_t kZeroQuad = 0;
constexpr int kRows = 4;  // 16 sums, 4 vectors of weights, 4 of activations: 24 of the 32 registers
constexpr int kPanelsPerTile = 1;
constexpr int kNibbleRows = 3;  // 12 integer and 12 float sums, 4 vectors of weights, activations, 15: 30 of 32
constexpr int kNibblePanels = 1;

struct F {
  float32x4_t v;
};
struct I {
  int32x4_t v;
};

inline uint32x4_t first(int n) {
  const int32_t lane[4] = {0, 1, 2, 3};
  return vcltq_s32(vld1q_s32(lane), vdupq_n_s32(n));
}
inline F set1(float x) { return {vdupq_n_f32(x)}; }
inline F load(const float* p) { return {vld1q_f32(p)}; }
inline F load_n(const float* p, int n, float fill) {
  float t[4] = {fill, fill, fill, fill};
  for (int i = 0; i < n && i < 4; ++i) t[i] = p[i];
  return load(t);
}
inline void store(float* p, F a) { vst1q_f32(p, a.v); }
inline void store_n(float* p, F a, int n) {
  float t[4];
  store(t, a);
  for (int i = 0; i < n && i < 4; ++i) p[i] = t[i];
}
inline F load(const bf16* p) {
  uint16x4_t h = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vreinterpretq_f32_u32(vshll_n_u16(h, 16))};
}
inline F load_n(const bf16* p, int n, float fill) {
  bf16 t[4] = {};
  for (int i = 0; i < n && i < 4; ++i) t[i] = p[i];
  return {vbslq_f32(first(n), load(t).v, vdupq_n_f32(fill))};
}
inline F load(const int8_t* p) {
  int32_t quad;
  memcpy(&quad, p, 4);
  int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(quad));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))};
}
inline F load_n(const int8_t* p, int n, float fill) {
  float t[4] = {fill, fill, fill, fill};
  for (int i = 0; i < n && i < 4; ++i) t[i] = static_cast<float>(p[i]);
  return load(t);
}
inline void store(bf16* p, F a) {  // nearest even; a NaN stays a (quiet) NaN
  uint32x4_t b = vreinterpretq_u32_f32(a.v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
  uint32x4_t r = vshrq_n_u32(vaddq_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  uint32x4_t q = vorrq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(0x40));
  r = vbslq_u32(vceqq_f32(a.v, a.v), r, q);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(r));
}
inline void store_n(bf16* p, F a, int n) {
  bf16 t[4];
  store(t, a);
  for (int i = 0; i < n && i < 4; ++i) p[i] = t[i];
}
inline F add(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
inline F sub(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
inline F mul(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
inline F div(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline F zero_below(F a, F b, F x) {
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x.v), vcltq_f32(a.v, b.v)))};
}
inline F max(F a, F b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline F neg(F a) { return {vnegq_f32(a.v)}; }
inline F round_even(F a) { return {vrndnq_f32(a.v)}; }
inline F exp2i(F n) { return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(n.v), 23))}; }
inline F exponent(F x, F& m) {
  int32x4_t bits = vreinterpretq_s32_f32(x.v);
  int32x4_t e = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(0x3f400000)), 23);
  m.v = vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(e, 23)));
  return {vcvtq_f32_s32(e)};
}
inline float sum(F a) { return vaddvq_f32(a.v); }
inline float top(F a) { return vmaxvq_f32(a.v); }

inline I izero() { return {vdupq_n_s32(0)}; }
inline I iadd(I a, I b) { return {vaddq_s32(a.v, b.v)}; }
inline I iload(const int32_t* p) { return {vld1q_s32(p)}; }
inline I magnitude_max(I acc, F a) {
  int32x4_t bits = vandq_s32(vreinterpretq_s32_f32(a.v), vdupq_n_s32(0x7fffffff));
  return {vmaxq_s32(acc.v, bits)};
}
inline int32_t itop(I a) { return vmaxvq_s32(a.v); }
inline F to_float(I a) { return {vcvtq_f32_s32(a.v)}; }
struct NegativeSum {
  int32_t total() const { return 0; }
};
inline void store_quads(int8_t* p, int64_t, F a, NegativeSum&) {
  int16x4_t h = vmovn_s32(vcvtnq_s32_f32(a.v));
  int8x8_t b = vmovn_s16(vcombine_s16(h, h));
  int32_t quad = vget_lane_s32(vreinterpret_s32_s8(b), 0);
  memcpy(p, &quad, 4);
}

inline I start(I, int32_t) { return izero(); }
struct Weights {
  int8x16_t v;
};
inline Weights weights(const int8_t* p) { return {vld1q_s8(p)}; }
struct Quad {
  int8x16_t v;
};
inline Quad quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return {vreinterpretq_s8_s32(vdupq_n_s32(x))};
}
inline I dot_floor(I acc, Weights w, Quad x) { return {vdotq_s32(acc.v, w.v, x.v)}; }
template <int V>
inline void dot(I (&acc)[V], const Weights (&w)[V], const int8_t* p) {
  Quad x = quad(p);
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) acc[v] = dot_floor(acc[v], w[v], x);
}
inline void opaque(Quad& x) { asm volatile("" : "+w"(x.v)); }

inline I iset1(int32_t x) { return {vdupq_n_s32(x)}; }
inline I load_bytes(const uint8_t* p) {
  uint32_t x;
  memcpy(&x, p, 4);
  uint16x8_t h = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(x)));
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(h)))};
}
inline I mul16(I a, int32_t b) { return {vmulq_n_s32(a.v, b)}; }
inline void store_bytes(int8_t* p, int64_t stride, F a) {
  NegativeSum unused;
  store_quads(p, stride, a, unused);
}
inline Weights low_nibbles(const uint8_t* p) { return {vreinterpretq_s8_u8(vandq_u8(vld1q_u8(p), vdupq_n_u8(15)))}; }
inline Weights high_nibbles(const uint8_t* p) { return {vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(p), 4))}; }
inline I broadcast_quad(const int8_t* p) { return {vreinterpretq_s32_s8(quad(p).v)}; }
struct NibbleSum {
  I sum;
};
inline NibbleSum nibble_start(I a) { return {a}; }
inline void dot_nibbles(NibbleSum& acc, Weights w, I x) {
  acc.sum = dot_floor(acc.sum, w, {vreinterpretq_s8_s32(x.v)});
}
inline void fold(NibbleSum&) {}
inline I total(NibbleSum a) { return a.sum; }

constexpr int kOutputsAtOnce = 2;  // of 8 vectors of sums each: 16 of the 32 registers
constexpr uint8_t kZeroCell = 0;
inline void istore(int32_t* p, I a) { vst1q_s32(p, a.v); }
inline F from_bits(I a) { return {vreinterpretq_f32_s32(a.v)}; }
inline void store_cells(int8_t* p, F a) {
  NegativeSum unused;
  store_quads(p, 0, a, unused);
}
inline I dot_cells(I acc, I x, I w) { return {vdotq_s32(acc.v, vreinterpretq_s8_s32(x.v), vreinterpretq_s8_s32(w.v))}; }
template <int N>
inline void spread(const void* p, I (&to)[N]) {
  for (int i = 0; i < N; ++i) to[i] = broadcast_quad(static_cast<const int8_t*>(p) + 4 * i);
}
struct Window {
  const int32_t* p;
};
inline Window window(const int32_t* p) { return {p}; }
inline I pick(const Window& from, const uint8_t* index) {
  int32_t lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = from.p[index[i] % 32];
  return {vld1q_s32(lanes)};
}
inline void transpose(const int32_t* from, int64_t from_stride, int32_t* to, int64_t to_stride) {
  int32x4_t a = vld1q_s32(from), b = vld1q_s32(from + from_stride);
  int32x4_t c = vld1q_s32(from + 2 * from_stride), d = vld1q_s32(from + 3 * from_stride);
  int32x4x2_t ab = vtrnq_s32(a, b), cd = vtrnq_s32(c, d);
  vst1q_s32(to, vcombine_s32(vget_low_s32(ab.val[0]), vget_low_s32(cd.val[0])));
  vst1q_s32(to + to_stride, vcombine_s32(vget_low_s32(ab.val[1]), vget_low_s32(cd.val[1])));
  vst1q_s32(to + 2 * to_stride, vcombine_s32(vget_high_s32(ab.val[0]), vget_high_s32(cd.val[0])));
  vst1q_s32(to + 3 * to_stride, vcombine_s32(vget_high_s32(ab.val[1]), vget_high_s32(cd.val[1])));
}

}  // namespace
