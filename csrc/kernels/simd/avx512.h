// AVX-512 without VNNI.
#pragma once
#include "avx512_base.h"

namespace {

constexpr int kQuadBytes = 8;  // four magnitudes, four sign masks
constexpr uint8_t kZeroQuad = 0;
constexpr int kRows = 6;
constexpr int kNibbleRows = 4;  // 8 sums of each of 3 kinds, 2 vectors of weights, activations, a product, 1 and 15
constexpr int kNibblePanels = 2;
constexpr int kPanelsPerTile = 4;  // 24 sums, 4 vectors of weights, |x|, mask, 1 and a product: 32 registers

// The sign of x moves to w, as in avx2.h.
struct NegativeSum {
  __m128i v = _mm_setzero_si128();
  int32_t total() const { return _mm_cvtsi128_si32(_mm_add_epi64(v, _mm_unpackhi_epi64(v, v))); }
};
inline void store_quads(int8_t* p, int64_t stride, F a, NegativeSum& sum) {
  __m128i x = narrow(a);
  __m128i magnitude = _mm_abs_epi8(x);
  __m128i mask = _mm_cmpgt_epi8(_mm_setzero_si128(), x);
  sum.v = _mm_add_epi64(sum.v, _mm_sad_epu8(_mm_and_si128(magnitude, mask), _mm_setzero_si128()));
  __m128i low = _mm_unpacklo_epi32(magnitude, mask), high = _mm_unpackhi_epi32(magnitude, mask);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low);
  _mm_storeh_pd(reinterpret_cast<double*>(p + stride), _mm_castsi128_pd(low));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 2 * stride), high);
  _mm_storeh_pd(reinterpret_cast<double*>(p + 3 * stride), _mm_castsi128_pd(high));
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
inline void dot(I (&acc)[V], const Weights (&w)[V], const int8_t* p) {
  Quad x = quad(p);
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) {
    acc[v] = add_pairs(acc[v], _mm512_maddubs_epi16(x.magnitude, _mm512_xor_si512(w[v].v, x.mask)));
  }
}
inline I dot_floor(I acc, Weights w, Quad x) { return add_pairs(acc, _mm512_maddubs_epi16(x.magnitude, w.v)); }
inline void opaque(Quad& x) { opaque_vector(x.magnitude); }

// vpmaddubsw: nibbles are unsigned, activations signed. Pairs of products are at most 2 * 15 * 127, so that eight of
// them fit 16 bits.
struct NibbleSum {
  I sum;
  __m512i pairs;
};
inline NibbleSum nibble_start(I a) { return {a, _mm512_setzero_si512()}; }
inline void dot_nibbles(NibbleSum& acc, Weights w, I x) {
  acc.pairs = _mm512_add_epi16(acc.pairs, _mm512_maddubs_epi16(w.v, x.v));
}
inline void fold(NibbleSum& acc) { acc = nibble_start(add_pairs(acc.sum, acc.pairs)); }
inline I total(NibbleSum a) { return a.sum; }

// The sign of x moves to w, lane by lane: both lie in [-127, 127].
constexpr uint8_t kZeroCell = 0;
inline void store_cells(int8_t* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
inline I dot_cells(I acc, I x, I w) {
  __m512i signed_w = _mm512_mask_sub_epi8(w.v, _mm512_movepi8_mask(x.v), _mm512_setzero_si512(), w.v);
  return add_pairs(acc, _mm512_maddubs_epi16(_mm512_abs_epi8(x.v), signed_w));
}

}  // namespace
