#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool avx512() {
  return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool avx512vnni() { return avx512() && __builtin_cpu_supports("avx512vnni"); }
#elif defined(__aarch64__)
bool neon() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif

struct Row {
  const Kernels* kernels;
  bool (*supported)();
};

// Best first.
const Row kTable[] = {
#if defined(__x86_64__)
    {&kernels_avx512vnni, avx512vnni},
    {&kernels_avx512, avx512},
    {&kernels_avx2, avx2},
#elif defined(__aarch64__)
    {&kernels_neon, neon},
#endif
    {&kernels_scalar, always},
};

const Kernels& find(const std::string& name) {
  std::string known;
  for (const Row& row : kTable) {
    known += (known.empty() ? "" : ", ") + std::string(row.kernels->name);
    if (name != row.kernels->name) continue;
    if (!row.supported()) throw std::invalid_argument("isa '" + name + "' is not supported by this CPU");
    return *row.kernels;
  }
  throw std::invalid_argument("isa '" + name + "' is unknown; this build has " + known);
}

const Kernels* initial() {
  const char* forced = std::getenv("POTSTILL_ISA");
  return &find(forced != nullptr && *forced != '\0' ? forced : supported_isas().front());
}

const Kernels*& current() {
  static const Kernels* table = initial();
  return table;
}

}  // namespace

const Kernels& kernels() { return *current(); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Row& row : kTable) {
    if (row.supported()) names.emplace_back(row.kernels->name);
  }
  return names;
}

void use_isa(const std::string& name) { current() = &find(name); }
