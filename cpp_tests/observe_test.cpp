// Tests of the activation histograms, on every instruction set this CPU has.
#include "core/observe.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "elementwise_cases.h"

namespace adpdm {
namespace {

using testing::decode;
using testing::encode;
using testing::kFloatTypes;
using testing::kSizes;
using testing::random_normal;
using testing::supported_isas;

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Tables {
  std::vector<int64_t> counts = std::vector<int64_t>(2 * kHistogramBins);
  std::vector<float> extrema = {kInf, -kInf, kInf, -kInf};

  void observe(const std::vector<uint8_t>& x, FloatType type, int32_t step) {
    const int64_t size = static_cast<int64_t>(x.size()) / float_size(type);
    cpu::observe({x.data(), type, 1, size, size}, {counts.data(), extrema.data(), &step, 2});
  }
};

TEST(Observe, CountsEveryElementInItsBinForAllSizes) {
  for (cpu::Isa isa : supported_isas()) {
    const cpu::ScopedIsa scope(isa);
    for (FloatType type : kFloatTypes) {
      for (int64_t size : kSizes) {
        const std::vector<uint8_t> x = encode(random_normal(size, 8, 3.0f), type);
        Tables tables, expected;
        tables.observe(x, type, 1);
        for (float value : decode(x, type)) {
          ++expected.counts[static_cast<size_t>(kHistogramBins + histogram_bin(value))];
          expected.extrema[2] = std::fmin(expected.extrema[2], value);
          expected.extrema[3] = std::fmax(expected.extrema[3], value);
        }
        EXPECT_EQ(tables.counts, expected.counts) << cpu::isa_name(isa) << " " << size;
        EXPECT_EQ(tables.extrema, expected.extrema) << cpu::isa_name(isa) << " " << size;
      }
    }
  }
}

TEST(Observe, AddsUpOverCalls) {
  Tables tables;
  tables.observe(encode({1.0f, -2.0f}, FloatType::kFloat32), FloatType::kFloat32, 0);
  tables.observe(encode({1.0f, 5.0f}, FloatType::kFloat32), FloatType::kFloat32, 0);
  EXPECT_EQ(tables.counts[static_cast<size_t>(histogram_bin(1.0f))], 2);
  EXPECT_EQ(std::accumulate(tables.counts.begin(), tables.counts.end(), int64_t{0}), 4);
  EXPECT_EQ(tables.extrema, (std::vector<float>{-2.0f, 5.0f, kInf, -kInf}));
}

TEST(Observe, NanAnywhereMakesExtremaNanForGood) {
  for (cpu::Isa isa : supported_isas()) {
    const cpu::ScopedIsa scope(isa);
    for (size_t position : {0, 7, 16, 20}) {
      std::vector<float> x(21, 1.0f);
      x[position] = std::numeric_limits<float>::quiet_NaN();
      for (FloatType type : kFloatTypes) {
        Tables tables;
        tables.observe(encode(x, type), type, 0);
        tables.observe(encode({-3.0f}, type), type, 0);
        EXPECT_TRUE(std::isnan(tables.extrema[0]) && std::isnan(tables.extrema[1])) << position;
      }
    }
  }
}

TEST(Observe, StepOutOfRangeThrows) {
  Tables tables;
  EXPECT_THROW(tables.observe(encode({1.0f}, FloatType::kFloat32), FloatType::kFloat32, 2),
               std::out_of_range);
  EXPECT_EQ(std::accumulate(tables.counts.begin(), tables.counts.end(), int64_t{0}), 0);
}

}  // namespace
}  // namespace adpdm
