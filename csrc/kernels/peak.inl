// The machine's ceilings, measured with this ISA's own instructions and nothing but registers (or pure reads).

namespace {

// As many independent chains as hide the latency of the longest dot() with two multiplier ports.
constexpr int kChains = 12;

double peak_int8(int64_t iterations) {
  alignas(64) int8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<int8_t>(i % 5 - 2);
  Weights w = weights(bytes);
  Quad x = quad(bytes);
  I acc[kChains];
  for (I& a : acc) a = izero();
  for (int64_t i = 0; i < iterations; ++i) {
    for (I& a : acc) {
      opaque(x);
      a = dot_floor(a, w, x);
    }
  }
  volatile int32_t keep = 0;
  for (I& a : acc) keep = keep + itop(a);
  return 2.0 * 4.0 * kLanes * kChains * static_cast<double>(iterations);
}

double peak_f32(int64_t iterations) {
  F acc[kChains];
  F x = set1(0.5f), y = set1(1e-3f);
  for (F& a : acc) a = set1(1.0f);
  for (int64_t i = 0; i < iterations; ++i) {
    for (F& a : acc) a = fma(a, x, y);
  }
  volatile float keep = 0;
  for (F& a : acc) keep = keep + top(a);
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
