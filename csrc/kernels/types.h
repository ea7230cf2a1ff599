// The few plain types that kernels and their callers share.
#pragma once
#include <stdint.h>

struct bf16 {
  uint16_t bits;
};

enum class Type { f32, bf16 };

// A pointer with the float type it points to.
struct FloatPtr {
  void* data;
  Type type;
};
