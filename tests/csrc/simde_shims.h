// AVX-512 for machines without it: SIMDe's portable definitions (Debian's libsimde-dev) under the native names, and
// those that SIMDe 0.7 lacks. Only the parity test compiles with it (POTSTILL_EMULATE); never the product.
//
// The missing ones are written lane by lane from Intel's intrinsics guide, so that they share nothing with the kernels
// they check. A masked lane is neither read nor written: the guard pages of parity.cpp see it.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T, int N>
struct Lanes {
  T lane[N];
};
using Floats = Lanes<float, 16>;
using Ints = Lanes<int32_t, 16>;

inline simde__m512 emulated_mask_loadu_ps(simde__m512 fill, uint16_t mask, const void* p) {
  Floats r = bits<Floats>(fill);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(&r.lane[i], static_cast<const float*>(p) + i, 4);
  }
  return bits<simde__m512>(r);
}

inline void emulated_mask_storeu_ps(void* p, uint16_t mask, simde__m512 a) {
  Floats r = bits<Floats>(a);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(static_cast<float*>(p) + i, &r.lane[i], 4);
  }
}

inline simde__m512i emulated_cvtps_epi32(simde__m512 a) {  // the current rounding mode: nearest even
  Floats x = bits<Floats>(a);
  Ints r;
  for (int i = 0; i < 16; ++i) {
    bool fits = x.lane[i] >= -0x1p31f && x.lane[i] < 0x1p31f;
    r.lane[i] = fits ? static_cast<int32_t>(nearbyintf(x.lane[i])) : INT32_MIN;  // "integer indefinite"
  }
  return bits<simde__m512i>(r);
}

inline simde__m512 emulated_cvtepi32_ps(simde__m512i a) {
  Ints x = bits<Ints>(a);
  Floats r;
  for (int i = 0; i < 16; ++i) r.lane[i] = static_cast<float>(x.lane[i]);
  return bits<simde__m512>(r);
}

inline simde__m512i emulated_srai_epi32(simde__m512i a, int n) {
  Ints r = bits<Ints>(a);
  for (int32_t& lane : r.lane) lane >>= n;
  return bits<simde__m512i>(r);
}

inline simde__m512i emulated_cvtepu16_epi32(simde__m256i a) {
  auto x = bits<Lanes<uint16_t, 16>>(a);
  Ints r;
  for (int i = 0; i < 16; ++i) r.lane[i] = x.lane[i];
  return bits<simde__m512i>(r);
}

inline simde__m512i emulated_cvtepi8_epi32(simde__m128i a) {
  auto x = bits<Lanes<int8_t, 16>>(a);
  Ints r;
  for (int i = 0; i < 16; ++i) r.lane[i] = x.lane[i];
  return bits<simde__m512i>(r);
}

inline simde__m512i emulated_cvtepu8_epi32(simde__m128i a) {
  auto x = bits<Lanes<uint8_t, 16>>(a);
  Ints r;
  for (int i = 0; i < 16; ++i) r.lane[i] = x.lane[i];
  return bits<simde__m512i>(r);
}

inline simde__m256i emulated_cvtepi32_epi16(simde__m512i a) {  // truncates, as the instruction does
  Ints x = bits<Ints>(a);
  Lanes<uint16_t, 16> r;
  for (int i = 0; i < 16; ++i) r.lane[i] = static_cast<uint16_t>(x.lane[i]);
  return bits<simde__m256i>(r);
}

inline simde__m128i emulated_cvtepi32_epi8(simde__m512i a) {
  Ints x = bits<Ints>(a);
  Lanes<uint8_t, 16> r;
  for (int i = 0; i < 16; ++i) r.lane[i] = static_cast<uint8_t>(x.lane[i]);
  return bits<simde__m128i>(r);
}

inline simde__m512i emulated_shuffle_epi32(simde__m512i a, int control) {  // in each 128 bits
  Ints x = bits<Ints>(a), r;
  for (int i = 0; i < 16; ++i) r.lane[i] = x.lane[i / 4 * 4 + (control >> i % 4 * 2 & 3)];
  return bits<simde__m512i>(r);
}

inline float emulated_reduce_add_ps(simde__m512 a) {  // halves onto halves, gcc's and clang's order
  Floats x = bits<Floats>(a);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
  }
  return x.lane[0];
}

inline float emulated_reduce_max_ps(simde__m512 a) {
  Floats x = bits<Floats>(a);
  for (int half = 8; half > 0; half /= 2) {  // vmaxps takes its second operand when either is a NaN
    for (int i = 0; i < half; ++i) x.lane[i] = x.lane[i] > x.lane[i + half] ? x.lane[i] : x.lane[i + half];
  }
  return x.lane[0];
}

inline int32_t emulated_reduce_max_epi32(simde__m512i a) {
  Ints x = bits<Ints>(a);
  int32_t r = x.lane[0];
  for (int32_t lane : x.lane) r = lane > r ? lane : r;
  return r;
}

}  // namespace

// Macros, since gcc's <immintrin.h> declares the names (and refuses to inline them without -mavx512f).
#define _mm512_mask_loadu_ps(fill, mask, p) emulated_mask_loadu_ps(fill, mask, p)
#define _mm512_mask_storeu_ps(p, mask, a) emulated_mask_storeu_ps(p, mask, a)
#define _mm512_srai_epi32(a, n) emulated_srai_epi32(a, n)
#define _mm512_cvtps_epi32(a) emulated_cvtps_epi32(a)
#define _mm512_cvtepi32_ps(a) emulated_cvtepi32_ps(a)
#define _mm512_cvtepu16_epi32(a) emulated_cvtepu16_epi32(a)
#define _mm512_cvtepi8_epi32(a) emulated_cvtepi8_epi32(a)
#define _mm512_cvtepu8_epi32(a) emulated_cvtepu8_epi32(a)
#define _mm512_cvtepi32_epi16(a) emulated_cvtepi32_epi16(a)
#define _mm512_cvtepi32_epi8(a) emulated_cvtepi32_epi8(a)
#define _mm512_shuffle_epi32(a, control) emulated_shuffle_epi32(a, control)
#define _mm512_reduce_add_ps(a) emulated_reduce_add_ps(a)
#define _mm512_reduce_max_ps(a) emulated_reduce_max_ps(a)
#define _mm512_reduce_max_epi32(a) emulated_reduce_max_epi32(a)

// SIMDe 0.7.4 gives this alias the four arguments of the masked form.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
