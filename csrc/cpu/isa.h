// Which instruction set the CPU kernels use: detected once, overridable with ADPDM_CPU, switchable in tests.
#pragma once

#include <string>
#include <vector>

namespace adpdm::cpu {

// Ordered: a CPU that has a level has all levels before it that this build has.
enum class Isa {
  kPortable = 0,  // the compiler's baseline for the architecture
  kAvx2 = 1,      // AVX2, FMA, F16C
  // vpdpbusd and vpdpwssd in 256 bits for integer layers and int8 attention, all else as kAvx2. AVX-VNNI has
  // them, and so has AVX-512 VNNI with VL, in another encoding.
  kAvxVnni = 2,
  kAvx512 = 3,  // AVX-512 F, BW, VL, DQ and VNNI
  kAmx = 4,     // AMX tiles of int8 for integer layers (igemm_strips.h), all else as kAvx512
};

// "portable", "avx2", "avx_vnni", "avx512", "amx": the names ADPDM_CPU takes.
const char* isa_name(Isa isa);

// A clause that says why this build or system cannot run code of that level; empty where the CPU alone
// decides. kAmx asks Linux for permission (amx_support.h).
std::string isa_obstacle(Isa isa);

// Whether this CPU, its operating system and this build can run code of that level.
bool cpu_supports(Isa isa);

// Whether kAvxVnni runs its products as AVX-VNNI encodes them; if not, as AVX-512 does.
bool has_avx_vnni();

// The highest level cpu_supports().
Isa best_isa();

// The level that runs unless another is asked for: the highest that has been run on a CPU, kAvxVnni in the
// encoding of AVX-512. AMX has not been yet, so it waits to be asked for (docs/cpu_backlog.md).
Isa default_isa();

// The level a request means; an empty request means default_isa(). Throws std::runtime_error for a name that
// is not a level and for a level this CPU lacks, because running something slower than was asked for would
// falsify measurements.
Isa resolve_isa(const std::string& request);

// The level kernels must use now: that of the innermost ScopedIsa, else resolve_isa(ADPDM_CPU) as read at the
// first call.
Isa active_isa();

// Instruction set extensions of this CPU which the kernels can use or will, by their /proc/cpuinfo names.
std::vector<std::string> cpu_features();

// Forces a level for its lifetime, in all threads, so that a test can compare kernels. Throws as resolve_isa.
// Not meant for product code; scopes must nest and must not begin or end while kernels run in other threads.
class ScopedIsa {
 public:
  explicit ScopedIsa(Isa isa);
  ~ScopedIsa();
  ScopedIsa(const ScopedIsa&) = delete;
  ScopedIsa& operator=(const ScopedIsa&) = delete;

 private:
  int previous_;
};

}  // namespace adpdm::cpu

// Declares one function per instruction set, e.g. ADPDM_DECLARE_PER_ISA(void negate(const float* x, float* y,
// int64_t n)). Use inside namespace adpdm::cpu. How such functions are built: top of CMakeLists.txt.
#if defined(__x86_64__)
#define ADPDM_DECLARE_PER_ISA(...) \
  namespace portable {             \
  __VA_ARGS__;                     \
  }                                \
  namespace avx2 {                 \
  __VA_ARGS__;                     \
  }                                \
  namespace avx512 {               \
  __VA_ARGS__;                     \
  }
// The function of that name for active_isa().
#define ADPDM_SELECT_ISA(function)                                             \
  (::adpdm::cpu::active_isa() >= ::adpdm::cpu::Isa::kAvx512 ? avx512::function \
   : ::adpdm::cpu::active_isa() >= ::adpdm::cpu::Isa::kAvx2 ? avx2::function   \
                                                            : portable::function)
#else
#define ADPDM_DECLARE_PER_ISA(...) \
  namespace portable {             \
  __VA_ARGS__;                     \
  }
#define ADPDM_SELECT_ISA(function) (portable::function)
#endif

// The same for functions that have code of their own at kAvxVnni.
#if defined(ADPDM_AVX_VNNI)
#define ADPDM_DECLARE_PER_ISA_AND_VNNI(...) \
  ADPDM_DECLARE_PER_ISA(__VA_ARGS__)        \
  namespace avx_vnni {                      \
  __VA_ARGS__;                              \
  }                                         \
  namespace avx_vnni_evex {                 \
  __VA_ARGS__;                              \
  }
#define ADPDM_SELECT_ISA_OR_VNNI(function)                                                \
  (::adpdm::cpu::active_isa() != ::adpdm::cpu::Isa::kAvxVnni ? ADPDM_SELECT_ISA(function) \
   : ::adpdm::cpu::has_avx_vnni()                            ? avx_vnni::function         \
                                                             : avx_vnni_evex::function)
#else
#define ADPDM_DECLARE_PER_ISA_AND_VNNI(...) ADPDM_DECLARE_PER_ISA(__VA_ARGS__)
#define ADPDM_SELECT_ISA_OR_VNNI(function) ADPDM_SELECT_ISA(function)
#endif
