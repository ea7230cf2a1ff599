// What the parity test is built from: counted checks, seeded random numbers, and buffers between which nothing leaks.
#pragma once
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/kernels/types.h"

namespace {

std::mt19937 generator;
long checks = 0, failures = 0;
char current[240] = "nothing yet";  // what is being checked

__attribute__((format(printf, 1, 2))) void begin(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(current, sizeof(current), format, arguments);
  va_end(arguments);
}

void check(bool good, const std::string& difference) {
  ++checks;
  if (good) return;
  if (++failures <= 20) fprintf(stderr, "MISMATCH %s: %s\n", current, difference.c_str());
}

// A touched guard page would end the program without a word.
void explain_faults() {
  auto explain = [](int) {
    constexpr char kText[] = ": touched memory outside its buffers\n";
    bool written =
        write(STDERR_FILENO, current, strlen(current)) > 0 && write(STDERR_FILENO, kText, sizeof(kText) - 1) > 0;
    _exit(written ? 1 : 2);
  };
  signal(SIGSEGV, explain);
  signal(SIGBUS, explain);
}

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }
inline float normal() { return std::normal_distribution<float>()(generator); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

template <class T>
T pick(const std::vector<T>& values) {
  return values[static_cast<size_t>(integer(0, static_cast<int>(values.size()) - 1))];
}

// Memory whose last byte (rounded up to `alignment`) is followed by a page that may not be touched.
class Guarded {
 public:
  Guarded(size_t bytes, size_t alignment, int filling) {
    constexpr size_t kPage = 65536;  // the largest page size of the platforms
    size_t used = (bytes + alignment - 1) / alignment * alignment;
    size_t body = (used + kPage - 1) / kPage * kPage;
    mapped_ = body + kPage;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + body, kPage, PROT_NONE) != 0) throw std::bad_alloc();
    data_ = base_ + body - used;
    memset(data_, filling, used);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* base_;
  char* data_;
  size_t mapped_;
};

size_t width(Type type) { return type == Type::f32 ? 4 : 2; }
inline const char* name(Type type) { return type == Type::f32 ? "f32" : "bf16"; }

// An array of float32 or bfloat16 values.
struct Floats {
  Floats(size_t n, Type t, int filling = 0) : memory(n * width(t), width(t), filling), size(n), type(t) {}
  Floats(const std::vector<float>& values, Type t) : Floats(values.size(), t) {
    for (size_t i = 0; i < size; ++i) set(i, values[i]);
  }
  void set(size_t i, float value) {
    if (type == Type::f32) {
      memory.as<float>()[i] = value;
      return;
    }
    uint32_t bits;  // truncated: any bf16 number serves, but a NaN must stay one
    memcpy(&bits, &value, 4);
    memory.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16 | (std::isnan(value) ? 0x40 : 0));
  }
  uint32_t bits(size_t i) const {
    return type == Type::f32 ? memory.as<uint32_t>()[i] : static_cast<uint32_t>(memory.as<uint16_t>()[i]) << 16;
  }
  float operator[](size_t i) const {
    uint32_t b = bits(i);
    float value;
    memcpy(&value, &b, 4);
    return value;
  }
  FloatPtr pointer() const { return {memory.as<void>(), type}; }

  Guarded memory;
  size_t size;
  Type type;
};

}  // namespace
