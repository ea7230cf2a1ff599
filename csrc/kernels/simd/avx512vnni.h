// AVX-512 with VNNI.
#pragma once
#include "avx512_base.h"

namespace {

constexpr int kQuadBytes = 4;
constexpr uint8_t kZeroQuad = 128;
constexpr int kRows = 6;  // 24 sums, 4 vectors of weights and one of activations: 29 of the 32 registers
constexpr int kPanelsPerTile = 4;
constexpr int kNibbleRows = 6;  // 12 integer and 12 float sums, 2 vectors of weights, one of activations, 15: 28 of 32
constexpr int kNibblePanels = 2;

// vpdpbusd multiplies unsigned by signed bytes: activations carry +128, and sums start at -128 sum(w).
struct NegativeSum {
  int32_t total() const { return 0; }
};
inline void store_quads(int8_t* p, int64_t stride, F a, NegativeSum&) {
  alignas(16) int32_t quads[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(quads), _mm_xor_si128(narrow(a), _mm_set1_epi8(-128)));
  for (int i = 0; i < 4; ++i) memcpy(p + i * stride, quads + i, 4);
}
inline I start(I column_sums, int32_t) {
  return {_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(column_sums.v, 7))};
}
struct Quad {
  __m512i v;
};
inline Quad quad(const int8_t* p) { return {broadcast(p)}; }
inline I dot_floor(I acc, Weights w, Quad x) { return {_mm512_dpbusd_epi32(acc.v, x.v, w.v)}; }
template <int V>
inline void dot(I (&acc)[V], const Weights (&w)[V], const int8_t* p) {
  Quad x = quad(p);
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) acc[v] = dot_floor(acc[v], w[v], x);
}
inline void opaque(Quad& x) { opaque_vector(x.v); }

// vpdpbusd as it is: nibbles are unsigned, activations signed.
struct NibbleSum {
  I sum;
};
inline NibbleSum nibble_start(I a) { return {a}; }
inline void dot_nibbles(NibbleSum& acc, Weights w, I x) { acc.sum.v = _mm512_dpbusd_epi32(acc.sum.v, w.v, x.v); }
inline void fold(NibbleSum&) {}
inline I total(NibbleSum a) { return a.sum; }

// Cells carry +128, as quads do.
constexpr uint8_t kZeroCell = 128;
inline void store_cells(int8_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(narrow(a), _mm_set1_epi8(-128)));
}
inline I dot_cells(I acc, I x, I w) { return {_mm512_dpbusd_epi32(acc.v, x.v, w.v)}; }

}  // namespace
