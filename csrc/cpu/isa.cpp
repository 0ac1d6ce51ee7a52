// Detection and choice of the CPU instruction set.
#include "cpu/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/amx_support.h"

namespace adpdm::cpu {
namespace {

constexpr Isa kLevels[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAmx};
constexpr int kNotForced = -1;
std::atomic<int> forced_isa{kNotForced};

struct Feature {
  const char* name;
  bool present;
};

#if defined(ADPDM_AVX_VNNI)
constexpr bool kAvxVnniBuilt = true;
#else
constexpr bool kAvxVnniBuilt = false;
#endif

#if defined(__x86_64__)
// __builtin_cpu_supports of GCC 10 knows neither of them, that of clang before 18 not the second. Their
// registers are those of AVX2.
bool probe_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
}

bool probe_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1) != 0;
}
#endif

// __builtin_cpu_supports reads CPUID and, for AVX and AVX-512, asks XGETBV whether the OS saves the
// registers.
std::vector<Feature> probe_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const AmxFacts amx = probe_amx();
  return {{"avx2", __builtin_cpu_supports("avx2") != 0},
          {"fma", __builtin_cpu_supports("fma") != 0},
          {"f16c", probe_f16c()},
          {"avx_vnni", probe_avx_vnni()},
          {"avx512f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
          {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
          {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
          {"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0},
          {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0},
          {"amx_tile", amx.tile && amx.saved},
          {"amx_int8", amx.int8 && amx.saved}};
#else
  return {};
#endif
}

bool has_all(const std::vector<std::string>& wanted) {
  for (const std::string& name : wanted) {
    bool present = false;
    for (const Feature& feature : probe_features())
      present = present || (feature.name == name && feature.present);
    if (!present) return false;
  }
  return true;
}

std::string requested_isa() {
  const char* value = std::getenv("ADPDM_CPU");
  return value == nullptr ? "" : value;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvxVnni:
      return "avx_vnni";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      break;
  }
  return "portable";
}

std::string isa_obstacle(Isa isa) {
  if (isa == Isa::kAmx) return amx_obstacle();
  if (isa == Isa::kAvxVnni && !kAvxVnniBuilt) return "the compiler of this build has no AVX-VNNI";
  return "";
}

bool has_avx_vnni() {
  static const bool present = has_all({"avx_vnni"});
  return present;
}

bool cpu_supports(Isa isa) {
  if (isa == Isa::kPortable) return true;
  if (!has_all({"avx2", "fma", "f16c"}) || !isa_obstacle(isa).empty()) return false;
  if (isa == Isa::kAvx2) return true;
  if (isa == Isa::kAvxVnni) return has_avx_vnni() || has_all({"avx512_vnni", "avx512vl"});
  return has_all({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"});
}

Isa best_isa() {
  Isa best = Isa::kPortable;
  for (Isa isa : kLevels) {
    if (cpu_supports(isa)) best = isa;
  }
  return best;
}

Isa default_isa() { return std::min(best_isa(), Isa::kAvx512); }

Isa resolve_isa(const std::string& request) {
  if (request.empty()) return default_isa();
  for (Isa isa : kLevels) {
    if (request != isa_name(isa)) continue;
    if (!cpu_supports(isa)) {
      const std::string obstacle = isa_obstacle(isa);
      throw std::runtime_error("ADPDM_CPU: wanted " + request + ", but the best this CPU supports is " +
                               isa_name(best_isa()) + (obstacle.empty() ? "" : ": " + obstacle));
    }
    return isa;
  }
  throw std::runtime_error("ADPDM_CPU: wanted portable, avx2, avx_vnni, avx512 or amx, got '" + request +
                           "'");
}

Isa active_isa() {
  const int forced = forced_isa.load(std::memory_order_relaxed);
  if (forced != kNotForced) return static_cast<Isa>(forced);
  static const Isa chosen = resolve_isa(requested_isa());
  return chosen;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
  for (const Feature& feature : probe_features()) {
    if (feature.present) names.emplace_back(feature.name);
  }
  return names;
}

ScopedIsa::ScopedIsa(Isa isa) : previous_(forced_isa.load()) {
  forced_isa.store(static_cast<int>(resolve_isa(isa_name(isa))));
}

ScopedIsa::~ScopedIsa() { forced_isa.store(previous_); }

}  // namespace adpdm::cpu
