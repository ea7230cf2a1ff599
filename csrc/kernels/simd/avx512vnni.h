// AVX-512 with VNNI.
#pragma once
#include "avx512_base.h"

namespace {

constexpr int kOffset = 128;
constexpr int kRows = 6;  // 24 sums, 4 vectors of weights and one of activations: 29 of the 32 registers
constexpr int kPanelsPerTile = 4;

// vpdpbusd multiplies unsigned by signed bytes: activations carry +128, and sums start at -128 sum(w).
struct Weights {
  __m512i v;
};
inline Weights weights(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
inline I correct(I column_sums) {
  return {_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(column_sums.v, 7))};
}
inline I dot(I acc, Weights w, Quad x) { return {_mm512_dpbusd_epi32(acc.v, x.v, w.v)}; }
inline I dot_floor(I acc, Weights w, Quad x) { return dot(acc, w, x); }

}  // namespace
