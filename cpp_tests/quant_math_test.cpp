// Tests of the scalar formulas and of the 16-bit float conversions.
#include "core/quant_math.h"

#include <gtest/gtest.h>

#include <limits>

#include "core/float_convert.h"

namespace adpdm {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float code(float x, float zero_point = 0.0f) { return quantize_value(x, 1.0f, zero_point, -128.0f, 127.0f); }

TEST(QuantMath, TiesRoundToEven) {
  EXPECT_EQ(code(0.5f), 0.0f);
  EXPECT_EQ(code(1.5f), 2.0f);
  EXPECT_EQ(code(2.5f), 2.0f);
  EXPECT_EQ(code(-0.5f), 0.0f);
  EXPECT_EQ(code(-1.5f), -2.0f);
  EXPECT_EQ(code(-2.5f), -2.0f);
}

TEST(QuantMath, NanBecomesQuantMinAndInfinitiesSaturate) {
  EXPECT_EQ(code(kNan, 5.0f), -128.0f);
  EXPECT_EQ(code(kInf, 5.0f), 127.0f);
  EXPECT_EQ(code(-kInf, 5.0f), -128.0f);
  EXPECT_EQ(code(3e38f), 127.0f);
  EXPECT_EQ(code(-3e38f), -128.0f);
}

TEST(QuantMath, RoundingEqualsNearbyintUpToTheSaturation) {
  for (int i = -4 * 65536; i <= 4 * 65536; ++i) {
    const float x = static_cast<float>(i) / 4.0f;
    ASSERT_EQ(round_half_even(x), std::nearbyint(x)) << x;
  }
}

TEST(QuantMath, StepsWithOneClampEqualCodeMinusZeroPoint) {
  for (float zero_point : {-8.0f, -3.0f, 0.0f, 7.0f}) {
    for (int i = -200; i <= 200; ++i) {
      const float x = static_cast<float>(i) / 8.0f;
      const float expected = quantize_value(x, 1.0f, zero_point, -8.0f, 7.0f) - zero_point;
      ASSERT_EQ(quantized_steps(x, 1.0f, -8.0f - zero_point, 7.0f - zero_point), expected) << x;
      ASSERT_EQ(fake_quantize_terms(x, 1.0f, -8.0f - zero_point, 7.0f - zero_point).steps, expected) << x;
    }
  }
}

TEST(QuantMath, GradientsInsideAndAtBothClips) {
  // 4 bits, scale 0.5, zero-point 2: codes -8..7 stand for -5 .. 2.5.
  const FakeQuantizeGrads inside = fake_quantize_grads(0.6f, 0.5f, 2.0f, 2.0f, -8.0f, 7.0f);
  EXPECT_EQ(inside.x, 1.0f);
  EXPECT_FLOAT_EQ(inside.scale, 1.0f - 1.2f);
  EXPECT_EQ(inside.zero_point, 0.0f);
  const FakeQuantizeGrads above = fake_quantize_grads(10.0f, 0.5f, 2.0f, 2.0f, -8.0f, 7.0f);
  EXPECT_EQ(above.x, 0.0f);
  EXPECT_EQ(above.scale, 5.0f);
  EXPECT_EQ(above.zero_point, -0.5f);
  const FakeQuantizeGrads below = fake_quantize_grads(-10.0f, 0.5f, 2.0f, 2.0f, -8.0f, 7.0f);
  EXPECT_EQ(below.x, 0.0f);
  EXPECT_EQ(below.scale, -10.0f);
  EXPECT_EQ(below.zero_point, -0.5f);
}

TEST(QuantMath, LearnedZeroPointActsAsNearestCode) {
  EXPECT_EQ(effective_zero_point(2.5f, -8.0f, 7.0f), 2.0f);
  EXPECT_EQ(effective_zero_point(9.3f, -8.0f, 7.0f), 7.0f);
  EXPECT_EQ(effective_zero_point(-100.0f, -8.0f, 7.0f), -8.0f);
}

TEST(QuantMath, HistogramBinsAtTheirBorders) {
  EXPECT_EQ(histogram_bin(0.0f), 1024);
  EXPECT_EQ(histogram_bin(-0.0f), 1024);
  EXPECT_EQ(histogram_bin(std::ldexp(1.0f, -17)), 1024);
  EXPECT_EQ(histogram_bin(std::ldexp(1.0f, -16)), 1025);
  EXPECT_EQ(histogram_bin(-std::ldexp(1.0f, -16)), 1023);
  EXPECT_EQ(histogram_bin(1.0f), 1024 + 16 * 32 + 1);
  EXPECT_EQ(histogram_bin(1.03125f), 1024 + 16 * 32 + 2);
  EXPECT_EQ(histogram_bin(65536.0f), 2048);
  EXPECT_EQ(histogram_bin(kInf), 2048);
  EXPECT_EQ(histogram_bin(-kInf), 0);
}

TEST(FloatConvert, EveryHalfSurvivesTheWayToFloatAndBack) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t half = static_cast<uint16_t>(h);
    const bool nan_f16 = (h & 0x7fffu) > 0x7c00u, nan_bf16 = (h & 0x7fffu) > 0x7f80u;
    ASSERT_EQ(float_to_f16(f16_to_float(half)), nan_f16 ? (h | 0x200u) : h);
    ASSERT_EQ(float_to_bf16(bf16_to_float(half)), nan_bf16 ? (h | 0x40u) : h);
  }
}

TEST(FloatConvert, RoundsTiesToEven) {
  EXPECT_EQ(float_to_f16(1.0f + 1.0f / 2048), 0x3c00);     // halfway to the odd 0x3c01
  EXPECT_EQ(float_to_f16(1.0f + 3.0f / 2048), 0x3c02);     // halfway from the odd 0x3c01
  EXPECT_EQ(float_to_f16(65519.0f), 0x7bff);               // largest half
  EXPECT_EQ(float_to_f16(65520.0f), 0x7c00);               // infinity
  EXPECT_EQ(float_to_f16(std::ldexp(1.0f, -25)), 0x0000);  // half of the smallest subnormal
  EXPECT_EQ(float_to_f16(std::ldexp(1.5f, -25)), 0x0001);
  EXPECT_EQ(f16_to_float(0x0001), std::ldexp(1.0f, -24));
  EXPECT_EQ(f16_to_float(0xbc00), -1.0f);
  EXPECT_EQ(float_to_bf16(1.0f + 1.0f / 256), 0x3f80);
  EXPECT_EQ(float_to_bf16(1.0f + 3.0f / 256), 0x3f82);
}

}  // namespace
}  // namespace adpdm
