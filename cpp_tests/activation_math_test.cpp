// exp, SiLU and GELU: their errors against double, special values, and equal bits on every instruction set.
#include "core/activation_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "core/linear.h"
#include "cpu/isa.h"
#include "elementwise_cases.h"
#include "igemm_problem.h"

namespace adpdm {
namespace {

// size + 1 evenly spaced values of [low, high].
std::vector<float> grid(float low, float high, int64_t size) {
  std::vector<float> values;
  for (int64_t i = 0; i <= size; ++i) {
    values.push_back(low + (high - low) * static_cast<float>(i) / static_cast<float>(size));
  }
  return values;
}

double exact_silu(double x) { return x / (1.0 + std::exp(-x)); }
double exact_gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }
double exact_gelu_tanh(double x) {
  return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

// Of a result at x, relative: of the polynomial, and of log2(e) in float32.
double exp_tolerance(double x) { return std::ldexp(1.0, -23) + std::abs(x) * std::ldexp(1.0, -26); }

TEST(ActivationMath, ExpIsWithinItsTolerance) {
  for (float x : grid(-kMaxExponent, kMaxExponent, 2000000)) {
    const auto exact = static_cast<double>(x);
    const double error = static_cast<double>(exp_of(x, kLog2E)) / std::exp(exact) - 1.0;
    const double inverse = static_cast<double>(exp_of(x, -kLog2E)) / std::exp(-exact) - 1.0;
    ASSERT_LT(std::abs(error), exp_tolerance(exact)) << x;
    ASSERT_LT(std::abs(inverse), exp_tolerance(exact)) << x;
  }
}

TEST(ActivationMath, ExpIsExactAtZeroAndNormalAtItsBounds) {
  EXPECT_EQ(exp_of(0.0f, kLog2E), 1.0f);
  for (float factor : {kLog2E, -kLog2E}) {
    for (float x : {-kMaxExponent, kMaxExponent}) {
      EXPECT_TRUE(std::isnormal(exp_of(x, factor))) << x;
      EXPECT_GT(exp_of(x, factor), 0.0f) << x;
    }
  }
}

TEST(ActivationMath, CoarsePowersOfTwoAreWithin75Millionths) {
  double worst = 0;
  for (float x : grid(-125.0f, 126.0f, 2000000)) {
    worst = std::max(worst,
                     std::abs(static_cast<double>(exp2_coarse(x)) / std::exp2(static_cast<double>(x)) - 1));
  }
  EXPECT_LT(worst, 7.5e-5);
}

TEST(ActivationMath, SiluIsAsExactAsExp) {
  for (float x : grid(-kMaxExponent, kMaxExponent, 2000000)) {
    if (x == 0.0f) continue;
    const auto exact = static_cast<double>(x);
    const double error = static_cast<double>(silu(x)) / exact_silu(exact) - 1.0;
    // of positive x, e^-x counts little; a division and an addition round as well
    ASSERT_LT(std::abs(error), 1e-7 + (x > 0 ? exp_tolerance(0) : exp_tolerance(exact))) << x;
  }
}

// Relative to x where that is above 1: half a unit in the last place of a result of 4 is 2.4e-7 already.
TEST(ActivationMath, GeluIsWithin2e7) {
  double worst = 0;
  for (float x : grid(-20.0f, 20.0f, 4000000)) {
    const auto exact = static_cast<double>(x);
    const double error = std::abs(static_cast<double>(gelu(x)) - exact_gelu(exact));
    worst = std::max(worst, error / std::max(1.0, std::abs(exact)));
  }
  EXPECT_LT(worst, 2e-7);
}

TEST(ActivationMath, GeluTanhIsWithin2e7) {
  double worst = 0;
  for (float x : grid(-20.0f, 20.0f, 4000000)) {
    const auto exact = static_cast<double>(x);
    const double error = std::abs(static_cast<double>(gelu_tanh(x)) - exact_gelu_tanh(exact));
    worst = std::max(worst, error / std::max(1.0, std::abs(exact)));
  }
  EXPECT_LT(worst, 2e-7);
}

TEST(ActivationMath, LargeValuesPassAndSmallOnesVanish) {
  EXPECT_EQ(silu(100.0f), 100.0f);
  EXPECT_EQ(gelu(100.0f), 100.0f);
  EXPECT_EQ(gelu_tanh(100.0f), 100.0f);
  EXPECT_EQ(gelu_tanh(3e38f), 3e38f);
  EXPECT_EQ(gelu_tanh(0.0f), 0.0f);
  EXPECT_NEAR(gelu_tanh(-100.0f), 0.0f, 1e-30f);
  EXPECT_TRUE(std::isnan(gelu_tanh(NAN)));
  EXPECT_EQ(silu(0.0f), 0.0f);
  EXPECT_EQ(gelu(0.0f), 0.0f);
  EXPECT_NEAR(silu(-100.0f), 0.0f, 1e-30f);
  EXPECT_NEAR(gelu(-100.0f), 0.0f, 1e-30f);
  EXPECT_TRUE(std::isnan(silu(NAN)));
  EXPECT_TRUE(std::isnan(gelu(NAN)));
}

TEST(ActivationMath, InfinityStaysOne) {
  EXPECT_EQ(silu(INFINITY), INFINITY);
  EXPECT_EQ(gelu(INFINITY), INFINITY);
  EXPECT_EQ(gelu_tanh(INFINITY), INFINITY);
  EXPECT_EQ(gelu(-INFINITY), 0.0f);
}

// silu, a gelu, or value * gelu of values by the vector code: a linear layer whose only input is code 0 at
// real 0.
std::vector<float> by_linear(const std::vector<float>& values, Activation activation, cpu::Isa isa) {
  const cpu::ScopedIsa scope(isa);
  const auto outputs = static_cast<int64_t>(values.size());
  testing::SegmentData data{};
  data.codes.assign(4, 0);
  data.channels = 4;
  data.weight_codes.assign(values.size() * 4, 1);
  data.weight_scale.assign(values.size(), 1.0f);
  data.scale = {1.0f};
  data.zero_point = {0};
  testing::pack(data, outputs, 1, 1, 8);
  std::vector<float> result(activation == Activation::kGeglu ? values.size() / 2 : values.size());
  LinearArgs args{};
  args.segments[0] = data.segment();
  args.num_segments = 1;
  args.rows = args.rows_per_image = 1;
  args.out_features = outputs;
  args.weight_bits = 8;
  args.output = plain_output(values.data(), result.data(), FloatType::kFloat32);
  args.output.activation = activation;
  cpu::linear(args);
  return result;
}

std::vector<uint32_t> bits(const std::vector<float>& values) {
  std::vector<uint32_t> result;
  for (float value : values) result.push_back(std::isnan(value) ? 0x7fc00000u : float_to_bits(value));
  return result;
}

TEST(ActivationMath, VectorsGiveTheBitsOfTheScalarFormulas) {
  std::vector<float> values = grid(-90.0f, 90.0f, 20000);
  for (float x : {0.0f, 1e-30f, -1e-30f, 1e-45f, -3e38f, 3e38f, INFINITY, NAN, -87.0f, 88.0f, 88.5f}) {
    values.push_back(x);
  }
  std::vector<float> wanted, wanted_gelu, wanted_tanh, pairs, wanted_pairs;
  for (float x : values) {
    wanted.push_back(silu(x + 0.0f));
    wanted_gelu.push_back(gelu(x + 0.0f));
    wanted_tanh.push_back(gelu_tanh(x + 0.0f));
    pairs.insert(pairs.end(), {1.5f, x});
    wanted_pairs.push_back(1.5f * gelu(x + 0.0f));
  }
  for (cpu::Isa isa : testing::supported_isas()) {
    EXPECT_EQ(bits(by_linear(values, Activation::kSilu, isa)), bits(wanted)) << cpu::isa_name(isa);
    EXPECT_EQ(bits(by_linear(values, Activation::kGelu, isa)), bits(wanted_gelu)) << cpu::isa_name(isa);
    EXPECT_EQ(bits(by_linear(values, Activation::kGeluTanh, isa)), bits(wanted_tanh)) << cpu::isa_name(isa);
    EXPECT_EQ(bits(by_linear(pairs, Activation::kGeglu, isa)), bits(wanted_pairs)) << cpu::isa_name(isa);
  }
}

}  // namespace
}  // namespace adpdm
