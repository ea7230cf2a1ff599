// The machine's ceilings, measured with this ISA's own instructions and nothing but registers (or pure reads).

namespace {

// Independent chains: enough to hide the latency of a multiply-add on two ports (4 or 5 cycles), without spilling one
// of 16 registers, or of AVX-512's 32.
constexpr int kChains = kLanes == 16 ? 12 : 8;

double peak_int8(int64_t iterations) {
  alignas(64) int8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<int8_t>(i % 5 - 2);
  Weights w = weights(bytes);
  Quad x = quad(bytes);
  I acc[kChains];
#pragma GCC unroll 64
  for (int c = 0; c < kChains; ++c) acc[c] = izero();
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 64
    for (int c = 0; c < kChains; ++c) {
      opaque(x);
      acc[c] = dot_floor(acc[c], w, x);
    }
  }
  volatile int32_t keep = 0;
#pragma GCC unroll 64
  for (int c = 0; c < kChains; ++c) keep = keep + itop(acc[c]);
  return 2.0 * 4.0 * kLanes * kChains * static_cast<double>(iterations);
}

double peak_f32(int64_t iterations) {
  F acc[kChains];
  F x = set1(0.5f), y = set1(1e-3f);
#pragma GCC unroll 64
  for (int c = 0; c < kChains; ++c) acc[c] = set1(static_cast<float>(c + 1));  // unequal, or the chains are merged
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 64
    for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], x, y);
  }
  volatile float keep = 0;
#pragma GCC unroll 64
  for (int c = 0; c < kChains; ++c) keep = keep + top(acc[c]);
  return 2.0 * kLanes * kChains * static_cast<double>(iterations);
}

int32_t read_memory(const void* data, size_t bytes, int64_t repeats) {
  constexpr int kStreams = 8;
  I acc[kStreams];
  for (I& a : acc) a = izero();
  size_t vectors = bytes / (sizeof(float) * kLanes);
  for (int64_t r = 0; r < repeats; ++r) {
    auto p = static_cast<const float*>(data);
    for (size_t v = 0; v + kStreams <= vectors; v += kStreams) {
      for (int s = 0; s < kStreams; ++s) acc[s] = magnitude_max(acc[s], load(p + (v + s) * kLanes));
    }
    asm volatile("" ::: "memory");
  }
  int32_t all = 0;
  for (I& a : acc) all |= itop(a);
  return all;
}

}  // namespace
