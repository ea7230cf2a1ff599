// What AVX-512 (F, BW, DQ, VL) has with and without VNNI. The list of primitives and their meaning: scalar.h.
#pragma once
#ifdef POTSTILL_EMULATE   // the parity test runs these objects on machines without AVX-512
#include "simde_shims.h"  // in tests/csrc
#else
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

#include "../types.h"

namespace {

constexpr int kLanes = 16;

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};

inline __mmask16 first(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }
inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F load_n(const float* p, int n, float fill) { return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline F load(const bf16* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline F load_n(const bf16* p, int n, float fill) {
  if (n >= kLanes) return load(p);
  bf16 t[kLanes] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), load(t).v)};
}
inline F load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline F load_n(const int8_t* p, int n, float fill) {
  if (n >= kLanes) return load(p);
  int8_t t[kLanes] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), load(t).v)};
}
inline void store(bf16* p, F a) {  // nearest even; a NaN stays a (quiet) NaN
  __m512i b = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __m512i q = _mm512_or_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(0x40));
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
inline void store_n(bf16* p, F a, int n) {
  if (n >= kLanes) return store(p, a);
  bf16 t[kLanes];
  store(t, a);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F neg(F a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
inline F round_even(F a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline F exp2i(F n) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(n.v), 23))}; }
inline F exponent(F x, F& m) {
  __m512i bits = _mm512_castps_si512(x.v);
  __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f400000)), 23);
  m.v = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
  return {_mm512_cvtepi32_ps(e)};
}
inline F zero_below(F a, F b, F x) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)}; }
inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
inline float top(F a) { return _mm512_reduce_max_ps(a.v); }

inline I izero() { return {_mm512_setzero_si512()}; }
inline I iadd(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I iload(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline I magnitude_max(I acc, F a) {
  __m512i bits = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_max_epi32(acc.v, bits)};
}
inline int32_t itop(I a) { return _mm512_reduce_max_epi32(a.v); }
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline __m128i narrow(F a) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)); }

struct Weights {
  __m512i v;
};
inline Weights weights(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
inline __m512i broadcast(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
#ifdef POTSTILL_EMULATE
inline void opaque_vector(__m512i& x) { asm volatile("" : "+m"(x)); }
#else
inline void opaque_vector(__m512i& x) { asm volatile("" : "+v"(x)); }
#endif

inline I iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I mul16(I a, int32_t b) { return {_mm512_madd_epi16(a.v, _mm512_set1_epi32(b & 0xffff))}; }
inline void store_bytes(int8_t* p, int64_t stride, F a) {
  alignas(16) int32_t quads[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(quads), narrow(a));
  for (int i = 0; i < 4; ++i) memcpy(p + i * stride, quads + i, 4);
}
inline Weights low_nibbles(const uint8_t* p) { return {_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15))}; }
inline Weights high_nibbles(const uint8_t* p) {
  return {_mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15))};
}
inline I broadcast_quad(const int8_t* p) { return {broadcast(p)}; }

constexpr int kOutputsAtOnce = 4;
inline void istore(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
inline F from_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
// One load, and shuffles inside 128 bits: loads are what the sparse kernels run out of.
template <int N>
inline void spread(const void* p, I (&to)[N]) {
  static_assert(N == 4);
  __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  to[0].v = _mm512_shuffle_epi32(four, static_cast<_MM_PERM_ENUM>(0x00));
  to[1].v = _mm512_shuffle_epi32(four, static_cast<_MM_PERM_ENUM>(0x55));
  to[2].v = _mm512_shuffle_epi32(four, static_cast<_MM_PERM_ENUM>(0xaa));
  to[3].v = _mm512_shuffle_epi32(four, static_cast<_MM_PERM_ENUM>(0xff));
}
struct Window {
  __m512i low, high;
};
inline Window window(const int32_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 16)}; }
inline I pick(const Window& from, const uint8_t* index) {
  return {_mm512_permutex2var_epi32(from.low, load_bytes(index).v, from.high)};
}
// Pairs of rows, then of pairs: [0 1][2 3] .. inside 128 bits, then the 128-bit parts themselves.
inline void transpose(const int32_t* from, int64_t from_stride, int32_t* to, int64_t to_stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + c]: column c of each 128 bits, rows i .. i + 3
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512i low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), low2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    __m512i odd = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), odd2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_si512(to + c * to_stride, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_storeu_si512(to + (4 + c) * to_stride, _mm512_shuffle_i32x4(odd, odd2, 0x88));
    _mm512_storeu_si512(to + (8 + c) * to_stride, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_storeu_si512(to + (12 + c) * to_stride, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
}

}  // namespace
