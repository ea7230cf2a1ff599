// AVX-512 without VNNI.
#pragma once
#include "avx512_base.h"

namespace {

constexpr int kQuadBytes = 8;  // four magnitudes, four sign masks
constexpr uint8_t kZeroQuad = 0;
constexpr int kRows = 6;
constexpr int kPanelsPerTile = 4;  // 24 sums, 4 vectors of weights, |x|, mask, 1 and a product: 32 registers

// The sign of x moves to w, as in avx2.h.
inline void store_quads(int8_t* p, F a) {
  __m128i x = narrow(a);
  __m128i magnitude = _mm_abs_epi8(x);
  __m128i mask = _mm_cmpgt_epi8(_mm_setzero_si128(), x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(magnitude, mask));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm_unpackhi_epi32(magnitude, mask));
}
inline I start(I, int32_t row_sum) { return {_mm512_set1_epi32(row_sum)}; }
struct Quad {
  __m512i magnitude, mask;
};
inline Quad quad(const int8_t* p) { return {broadcast(p), broadcast(p + 4)}; }
inline I add_pairs(I acc, __m512i pairs) {
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
template <int V>
inline void dot(I (&acc)[V], const Weights (&w)[V], Quad x) {
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) {
    acc[v] = add_pairs(acc[v], _mm512_maddubs_epi16(x.magnitude, _mm512_xor_si512(w[v].v, x.mask)));
  }
}
inline I dot_floor(I acc, Weights w, Quad x) { return add_pairs(acc, _mm512_maddubs_epi16(x.magnitude, w.v)); }
inline void opaque(Quad& x) { opaque_vector(x.magnitude); }

}  // namespace
