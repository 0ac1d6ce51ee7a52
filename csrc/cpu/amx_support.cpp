// Detection of AMX, and the permission to use it.
#include "cpu/amx_support.h"

#include <cerrno>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace adpdm::cpu {
namespace {

#if defined(ADPDM_AMX)
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif

// 0, or errno. Linux refuses where it is older than 5.16, or where a thread's alternate signal stack is too
// small for 8 KiB of tiles.
int request_permission() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

}  // namespace

AmxFacts probe_amx() {
  AmxFacts facts{};
  facts.built = kBuilt;
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    facts.tile = (edx >> 24 & 1) != 0;
    facts.int8 = (edx >> 25 & 1) != 0;
  }
  constexpr unsigned kOsxsave = 1u << 27;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & kOsxsave) != 0) {
    uint32_t low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr uint32_t kTileState = 3u << 17;  // XTILECFG and XTILEDATA
    facts.saved = (low & kTileState) == kTileState;
  }
#endif
  return facts;
}

std::string amx_obstacle(const AmxFacts& facts) {
  if (!facts.built) return "the compiler of this build has no AMX";
  if (!facts.tile || !facts.int8) {
    return std::string("the CPU has no ") + (facts.tile ? "amx_int8" : "amx_tile");
  }
  if (!facts.saved) return "the operating system does not save tile registers";
  if (facts.permission_error != 0) {
    return std::string("the kernel refused permission for tile data (") +
           std::strerror(facts.permission_error) + ")";
  }
  return "";
}

const std::string& amx_obstacle() {
  static const std::string obstacle = [] {
    AmxFacts facts = probe_amx();
    if (amx_obstacle(facts).empty()) facts.permission_error = request_permission();
    return amx_obstacle(facts);
  }();
  return obstacle;
}

}  // namespace adpdm::cpu
