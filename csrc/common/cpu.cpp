#include "common/cpu.h"

#include <atomic>
#include <stdexcept>

namespace pynar {
namespace {

// What every processor of the platform has.
#if defined(__aarch64__)
constexpr Isa kBaseline = Isa::kNeon;
#else
constexpr Isa kBaseline = Isa::kGeneric;
#endif

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return vnni ? Isa::kAvx512Vnni : Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return kBaseline;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{widest()};
  return value;
}

}  // namespace

Isa isa() {
  return current().load(std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kNeon:
      return "neon";
    case Isa::kGeneric:
      break;
  }
  return "generic";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : {kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni}) {
    if (isa <= widest()) isas.push_back(isa);
  }
  return isas;
}

void set_isa(const std::string& name) {
  std::string choices;
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) {
      current().store(isa);
      return;
    }
    if (!choices.empty()) choices += ", ";
    choices += isa_name(isa);
  }
  throw std::invalid_argument("the SIMD level must be one of " + choices + ", got '" + name + "'");
}

}  // namespace pynar
