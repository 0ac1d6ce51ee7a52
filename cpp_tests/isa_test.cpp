// Tests of the choice of the CPU instruction set.
#include "cpu/isa.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/amx_support.h"

namespace adpdm::cpu {

ADPDM_DECLARE_PER_ISA(inline std::string level() {
  const std::string signature = __PRETTY_FUNCTION__;
  const size_t end = signature.find("::level");
  const size_t begin = signature.rfind("::", end - 1) + 2;
  return signature.substr(begin, end - begin);
})

namespace {

constexpr Isa kLevels[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAmx};

// Functions per instruction set end at AVX-512, which AMX uses; those without code for AVX-VNNI are of AVX2
// there.
std::string function_level(Isa isa) {
  if (isa == Isa::kAmx) return "avx512";
  return isa_name(isa == Isa::kAvxVnni ? Isa::kAvx2 : isa);
}

std::string error_of(const std::string& request) {
  try {
    resolve_isa(request);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

TEST(Isa, EmptyRequestMeansTheBestButAmx) {
  EXPECT_EQ(resolve_isa(""), best_isa() == Isa::kAmx ? Isa::kAvx512 : best_isa());
}

TEST(Isa, SupportIsDownwardClosed) {
  for (Isa isa : kLevels) {
    EXPECT_EQ(cpu_supports(isa), isa <= best_isa() && isa_obstacle(isa).empty()) << isa_name(isa);
  }
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
    const std::string obstacle = isa_obstacle(isa);
    const std::string reason = obstacle.empty() ? "" : ": " + obstacle;
    const std::string wanted = cpu_supports(isa)
                                   ? ""
                                   : "ADPDM_CPU: wanted " + name + ", but the best this CPU supports is " +
                                         isa_name(best_isa()) + reason;
    EXPECT_EQ(error_of(name), wanted);
  }
}

TEST(Isa, UnknownNameIsAnError) {
  EXPECT_EQ(error_of("sse9"), "ADPDM_CPU: wanted portable, avx2, avx_vnni, avx512 or amx, got 'sse9'");
  EXPECT_EQ(error_of("AVX2"), "ADPDM_CPU: wanted portable, avx2, avx_vnni, avx512 or amx, got 'AVX2'");
}

TEST(Isa, AmxObstaclesAreNamedOneByOne) {
  AmxFacts facts{};
  EXPECT_EQ(amx_obstacle(facts), "the compiler of this build has no AMX");
  facts.built = true;
  EXPECT_EQ(amx_obstacle(facts), "the CPU has no amx_tile");
  facts.tile = true;
  EXPECT_EQ(amx_obstacle(facts), "the CPU has no amx_int8");
  facts.int8 = true;
  EXPECT_EQ(amx_obstacle(facts), "the operating system does not save tile registers");
  facts.saved = true;
  facts.permission_error = EINVAL;
  EXPECT_EQ(amx_obstacle(facts), "the kernel refused permission for tile data (Invalid argument)");
  facts.permission_error = 0;
  EXPECT_EQ(amx_obstacle(facts), "");
}

TEST(Isa, AmxIsALevelExactlyWhereNothingIsInItsWay) {
  EXPECT_EQ(cpu_supports(Isa::kAmx), cpu_supports(Isa::kAvx512) && amx_obstacle().empty());
}

TEST(Isa, AvxVnniRunsInEitherEncoding) {
  const std::vector<std::string> features = cpu_features();
  const auto has = [&](const char* name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  };
  EXPECT_EQ(has_avx_vnni(), has("avx_vnni"));
  if (!isa_obstacle(Isa::kAvxVnni).empty()) {
    EXPECT_FALSE(cpu_supports(Isa::kAvxVnni));
  } else {
    const bool encoded = has("avx_vnni") || (has("avx512_vnni") && has("avx512vl"));
    EXPECT_EQ(cpu_supports(Isa::kAvxVnni), cpu_supports(Isa::kAvx2) && encoded);
  }
}

TEST(Isa, FunctionsWithoutCodeForALevelAreThoseOfTheLevelBefore) {
  for (Isa isa : kLevels) {
    if (!cpu_supports(isa)) continue;
    ScopedIsa scope(isa);
    EXPECT_EQ(ADPDM_SELECT_ISA(level)(), function_level(isa));
  }
}

TEST(Isa, ScopesNestAndSelectTheFunction) {
  const Isa before = active_isa();
  EXPECT_EQ(ADPDM_SELECT_ISA(level)(), function_level(before));
  {
    ScopedIsa best(best_isa());
    EXPECT_EQ(ADPDM_SELECT_ISA(level)(), function_level(best_isa()));
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
