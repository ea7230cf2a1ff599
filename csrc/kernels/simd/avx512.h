// AVX-512 without VNNI.
#pragma once
#include "avx512_base.h"

namespace {

constexpr int kOffset = 0;
constexpr int kRows = 6;
constexpr int kPanelsPerTile = 3;  // 18 sums, and |w| with its sign mask per panel

// As in avx2.h, w x = |w| (x sign w); AVX-512 has no vpsignb, so a mask of the negative weights negates x.
struct Weights {
  __m512i magnitude;
  __mmask64 negative;
};
inline Weights weights(const int8_t* p) {
  __m512i w = _mm512_loadu_si512(p);
  return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
}
inline I correct(I) { return izero(); }
inline I dot(I acc, Weights w, Quad x) {
  __m512i signed_x = _mm512_mask_sub_epi8(x.v, w.negative, _mm512_setzero_si512(), x.v);
  __m512i pairs = _mm512_maddubs_epi16(w.magnitude, signed_x);
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
inline I dot_floor(I acc, Weights w, Quad x) {  // without the move of the sign, as in avx2.h
  __m512i pairs = _mm512_maddubs_epi16(w.magnitude, x.v);
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}

}  // namespace
