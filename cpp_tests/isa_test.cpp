// Tests of the choice of the CPU instruction set.
#include "cpu/isa.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

namespace adpdm::cpu {

ADPDM_DECLARE_PER_ISA(inline std::string level() {
  const std::string signature = __PRETTY_FUNCTION__;
  const size_t end = signature.find("::level");
  const size_t begin = signature.rfind("::", end - 1) + 2;
  return signature.substr(begin, end - begin);
})

namespace {

constexpr Isa kLevels[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};

std::string error_of(const std::string& request) {
  try {
    resolve_isa(request);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

TEST(Isa, EmptyRequestMeansTheBest) { EXPECT_EQ(resolve_isa(""), best_isa()); }

TEST(Isa, SupportIsDownwardClosed) {
  for (Isa isa : kLevels) EXPECT_EQ(cpu_supports(isa), isa <= best_isa()) << isa_name(isa);
}

TEST(Isa, EverySupportedNameResolvesToItsLevel) {
  for (Isa isa : kLevels) {
    if (!cpu_supports(isa)) continue;
    EXPECT_EQ(resolve_isa(isa_name(isa)), isa);
  }
}

TEST(Isa, UnsupportedLevelIsAnErrorNotAFallback) {
  for (Isa isa : kLevels) {
    const std::string name = isa_name(isa);
    const std::string wanted =
        cpu_supports(isa)
            ? ""
            : "ADPDM_CPU: wanted " + name + ", but the best this CPU supports is " + isa_name(best_isa());
    EXPECT_EQ(error_of(name), wanted);
  }
}

TEST(Isa, UnknownNameIsAnError) {
  EXPECT_EQ(error_of("sse9"), "ADPDM_CPU: wanted portable, avx2 or avx512, got 'sse9'");
  EXPECT_EQ(error_of("AVX2"), "ADPDM_CPU: wanted portable, avx2 or avx512, got 'AVX2'");
}

TEST(Isa, ScopesNestAndSelectTheFunction) {
  const Isa before = active_isa();
  EXPECT_EQ(ADPDM_SELECT_ISA(level)(), isa_name(before));
  {
    ScopedIsa best(best_isa());
    EXPECT_EQ(ADPDM_SELECT_ISA(level)(), isa_name(best_isa()));
    {
      ScopedIsa portable(Isa::kPortable);
      EXPECT_EQ(active_isa(), Isa::kPortable);
      EXPECT_EQ(ADPDM_SELECT_ISA(level)(), "portable");
    }
    EXPECT_EQ(active_isa(), best_isa());
  }
  EXPECT_EQ(active_isa(), before);
}

}  // namespace
}  // namespace adpdm::cpu
