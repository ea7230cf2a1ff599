// The primitives for AVX2 + FMA. The list and their meaning: scalar.h.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "../types.h"

namespace {

constexpr int kLanes = 8;
constexpr int kQuadBytes = 8;  // four magnitudes, four sign masks
constexpr uint8_t kZeroQuad = 0;
constexpr int kRows = 5;  // 10 sums, 2 vectors of weights, |x|, mask, 1 and a product: all 16 registers
constexpr int kPanelsPerTile = 1;
constexpr int kNibbleRows = 4;    // 8 sums of pairs, 2 vectors of weights, activations, a product and 15; the rest is
constexpr int kNibblePanels = 1;  // touched once in a group, and spilled

struct F {
  __m256 v;
};
struct I {
  __m256i v;
};

inline __m256i first(int n) {  // all ones in the first n 32-bit lanes
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F set1(float x) { return {_mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F load_n(const float* p, int n, float fill) {
  __m256i m = first(n);
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m))};
}
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline void store_n(float* p, F a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
inline F widen(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
inline F load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F load_n(const bf16* p, int n, float fill) {
  if (n >= kLanes) return load(p);
  bf16 t[kLanes] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), load(t).v, _mm256_castsi256_ps(first(n)))};
}
inline F load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline F load_n(const int8_t* p, int n, float fill) {
  if (n >= kLanes) return load(p);
  int8_t t[kLanes] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), load(t).v, _mm256_castsi256_ps(first(n)))};
}
inline __m128i halve(F a) {  // to bf16, nearest even; a NaN stays a (quiet) NaN
  __m256i b = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i q = _mm256_or_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(0x40));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, q, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline void store(bf16* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halve(a)); }
inline void store_n(bf16* p, F a, int n) {
  if (n >= kLanes) return store(p, a);
  bf16 t[kLanes];
  store(t, a);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
inline F add(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F sub(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F div(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F neg(F a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
inline F round_even(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F exp2i(F n) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(n.v), 23))}; }
inline F exponent(F x, F& m) {
  __m256i bits = _mm256_castps_si256(x.v);
  __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000)), 23);
  m.v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
  return {_mm256_cvtepi32_ps(e)};
}
inline F zero_below(F a, F b, F x) { return {_mm256_andnot_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ), x.v)}; }
inline float sum(F a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float top(F a) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

inline I izero() { return {_mm256_setzero_si256()}; }
inline I iadd(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I iload(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline I magnitude_max(I acc, F a) {
  __m256i bits = _mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7fffffff));
  return {_mm256_max_epi32(acc.v, bits)};
}
inline int32_t itop(I a) {
  __m128i h = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
  h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1));
  return _mm_cvtsi128_si32(h);
}
inline F to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }

// AVX2 multiplies unsigned by signed bytes, so the sign of x moves to w: |x| (w ^ m) with m = x < 0 ? -1 : 0 is x w for
// x >= 0, and |x| (-w - 1) = x w - |x| otherwise; start() adds the row's |x| back. (vpsignb, which needs no correction,
// shares a port with the multiplier and costs a fifth of the speed.) A pair sums to at most 2 * 127 * 128 = 32512 <
// 32768: vpmaddubsw never saturates.
struct NegativeSum {
  __m128i v = _mm_setzero_si128();
  int32_t total() const { return _mm_cvtsi128_si32(v); }
};
inline void store_quads(int8_t* p, int64_t stride, F a, NegativeSum& sum) {
  __m256i q = _mm256_cvtps_epi32(a.v);
  __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  __m128i x = _mm_packs_epi16(h, _mm_setzero_si128());
  __m128i mask = _mm_cmpgt_epi8(_mm_setzero_si128(), x);
  __m128i magnitude = _mm_abs_epi8(x);
  sum.v = _mm_add_epi64(sum.v, _mm_sad_epu8(_mm_and_si128(magnitude, mask), _mm_setzero_si128()));
  __m128i quads = _mm_unpacklo_epi32(magnitude, mask);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), quads);
  _mm_storeh_pd(reinterpret_cast<double*>(p + stride), _mm_castsi128_pd(quads));
}
inline I start(I, int32_t row_sum) { return {_mm256_set1_epi32(row_sum)}; }
struct Weights {
  __m256i v;
};
inline Weights weights(const int8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
// In assembly for its order alone: with like operations side by side Zen 3 keeps both multipliers busy, 3 % faster than
// what gcc 12 makes of the same intrinsics.
inline void dot(I (&acc)[2], const Weights (&w)[2], const int8_t* quad) {
  __m256i x, a, b;
  asm("vpbroadcastd %[mask], %[b]\n\t"
      "vpbroadcastd %[magnitude], %[x]\n\t"
      "vpxor %[w0], %[b], %[a]\n\t"
      "vpxor %[w1], %[b], %[b]\n\t"
      "vpmaddubsw %[a], %[x], %[a]\n\t"
      "vpmaddubsw %[b], %[x], %[b]\n\t"
      "vpmaddwd %[one], %[a], %[a]\n\t"
      "vpmaddwd %[one], %[b], %[b]\n\t"
      "vpaddd %[a], %[sum0], %[sum0]\n\t"
      "vpaddd %[b], %[sum1], %[sum1]"
      : [sum0] "+x"(acc[0].v), [sum1] "+x"(acc[1].v), [x] "=&x"(x), [a] "=&x"(a), [b] "=&x"(b)
      : [w0] "x"(w[0].v), [w1] "x"(w[1].v), [one] "x"(_mm256_set1_epi16(1)),
        [magnitude] "m"(*reinterpret_cast<const int8_t (*)[4]>(quad)),
        [mask] "m"(*reinterpret_cast<const int8_t (*)[4]>(quad + 4)));
}
// Without the move of the sign: what a kernel pays that accepts 7-bit activations or saturation.
struct Quad {
  __m256i magnitude;
};
inline Quad quad(const int8_t* p) {
  int32_t magnitude;
  memcpy(&magnitude, p, 4);
  return {_mm256_set1_epi32(magnitude)};
}
inline I dot_floor(I acc, Weights w, Quad x) {
  __m256i pairs = _mm256_maddubs_epi16(x.magnitude, w.v);
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
inline void opaque(Quad& x) { asm volatile("" : "+x"(x.magnitude)); }

inline I iset1(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline I load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline I mul16(I a, int32_t b) { return {_mm256_madd_epi16(a.v, _mm256_set1_epi32(b & 0xffff))}; }
inline void store_bytes(int8_t* p, int64_t stride, F a) {
  __m256i q = _mm256_cvtps_epi32(a.v);
  __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  int64_t quads = _mm_cvtsi128_si64(_mm_packs_epi16(h, h));
  memcpy(p, &quads, 4);
  quads >>= 32;
  memcpy(p + stride, &quads, 4);
}
inline __m256i bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Weights low_nibbles(const uint8_t* p) { return {_mm256_and_si256(bytes(p), _mm256_set1_epi8(15))}; }
inline Weights high_nibbles(const uint8_t* p) {
  return {_mm256_and_si256(_mm256_srli_epi16(bytes(p), 4), _mm256_set1_epi8(15))};
}
inline I broadcast_quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return {_mm256_set1_epi32(x)};
}
// Nibbles are unsigned and activations signed, as vpmaddubsw has it. Pairs of products are at most 2 * 15 * 127, so
// that eight of them fit 16 bits: half the instructions of dot().
struct NibbleSum {
  I sum;
  __m256i pairs;
};
inline NibbleSum nibble_start(I a) { return {a, _mm256_setzero_si256()}; }
inline void dot_nibbles(NibbleSum& acc, Weights w, I x) {
  acc.pairs = _mm256_add_epi16(acc.pairs, _mm256_maddubs_epi16(w.v, x.v));
}
inline void fold(NibbleSum& acc) {
  acc = nibble_start({_mm256_add_epi32(acc.sum.v, _mm256_madd_epi16(acc.pairs, _mm256_set1_epi16(1)))});
}
inline I total(NibbleSum a) { return a.sum; }

constexpr int kOutputsAtOnce = 2;
constexpr uint8_t kZeroCell = 0;
inline void istore(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline F from_bits(I a) { return {_mm256_castsi256_ps(a.v)}; }
inline void store_cells(int8_t* p, F a) {
  __m256i q = _mm256_cvtps_epi32(a.v);
  __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(h, h));
}
// The sign of x moves to w, lane by lane: both lie in [-127, 127].
inline I dot_cells(I acc, I x, I w) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x.v), _mm256_sign_epi8(w.v, x.v));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
template <int N>
inline void spread(const void* p, I (&to)[N]) {
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) to[i] = broadcast_quad(static_cast<const int8_t*>(p) + 4 * i);
}
struct Window {
  const int32_t* p;
};
inline Window window(const int32_t* p) { return {p}; }
inline I pick(const Window& from, const uint8_t* index) {
  __m256i i = _mm256_and_si256(load_bytes(index).v, _mm256_set1_epi32(31));
  return {_mm256_i32gather_epi32(from.p, i, 4)};
}
// As in avx512_base.h, with 128-bit halves.
inline void transpose(const int32_t* from, int64_t from_stride, int32_t* to, int64_t to_stride) {
  __m256i r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * from_stride));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    istore(to + c * to_stride, {_mm256_permute2x128_si256(r[c], r[4 + c], 0x20)});
    istore(to + (4 + c) * to_stride, {_mm256_permute2x128_si256(r[c], r[4 + c], 0x31)});
  }
}

}  // namespace
