// Tests of fake quantization, its mixture and their gradients, on every instruction set this CPU has.
#include "core/fake_quantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
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

constexpr CodeRange kRange = {-8, 7};
const float kScale[] = {0.5f, 0.125f, 0.25f};
const float kZeroPoint[] = {1.75f, -3.0f, 0.0f};  // act as 2, -3, 0
const float kImportance[] = {0.5f, 0.25f, 0.25f};

FakeQuantizeArgs one_group(const void* x, FloatType type, ChannelView shape, const int32_t* index) {
  return {x, type, shape, kScale, kZeroPoint, index, 3, kRange};
}

MixtureArgs mixture(const void* x, FloatType type, int64_t size) {
  return {x, type, size, kScale, kZeroPoint, kImportance, 3, kRange};
}

// Result of the mixture's backward pass, comparable.
struct Gradients {
  std::vector<uint8_t> x;
  std::vector<float> scale = std::vector<float>(3), zero_point = scale, importance = scale;
  bool operator==(const Gradients& other) const {
    return x == other.x && scale == other.scale && zero_point == other.zero_point &&
           importance == other.importance;
  }
};

Gradients mixture_gradients(const std::vector<uint8_t>& x, const std::vector<uint8_t>& grad, FloatType type) {
  Gradients result;
  result.x.resize(x.size());
  const int64_t size = static_cast<int64_t>(x.size()) / float_size(type);
  cpu::fake_quantize_mixture_backward(
      mixture(x.data(), type, size), grad.data(),
      {result.x.data(), result.scale.data(), result.zero_point.data(), result.importance.data()});
  return result;
}

TEST(FakeQuantize, LiteralValues) {
  const int32_t index = 0;  // codes -8..7 around 2: -5 .. 2.5 in steps of 0.5
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> x = {0.0f, 0.25f, 0.75f, 2.6f, -9.0f, nan, INFINITY};
  for (cpu::Isa isa : supported_isas()) {
    const cpu::ScopedIsa scope(isa);
    for (FloatType type : kFloatTypes) {
      const std::vector<uint8_t> bytes = encode(x, type);
      std::vector<uint8_t> y(bytes.size());
      cpu::fake_quantize(one_group(bytes.data(), type, {1, 1, 7}, &index), y.data());
      EXPECT_EQ(decode(y, type), (std::vector<float>{0.0f, 0.0f, 1.0f, 2.5f, -5.0f, -5.0f, 2.5f}));
    }
  }
}

TEST(FakeQuantize, ChannelsUseTheirOwnRow) {
  // [2 outer, 3 channels, 1 inner]; one group whose channels are the three quantizers above.
  const int32_t index = 0;
  const std::vector<float> x = {0.7f, 0.7f, 0.7f, -9.0f, -9.0f, -9.0f};
  std::vector<float> y(6);
  const FakeQuantizeArgs args = {x.data(), FloatType::kFloat32, {2, 3, 1}, kScale, kZeroPoint, &index, 1,
                                 kRange};
  cpu::fake_quantize(args, y.data());
  EXPECT_EQ(y, (std::vector<float>{0.5f, 0.75f, 0.75f, -5.0f, -0.625f, -2.0f}));
  const std::vector<float> grad = {1, 2, 3, 4, 5, 6};
  std::vector<float> grad_x(6), grad_scale(3), grad_zero_point(3);
  cpu::fake_quantize_backward(args, grad.data(), grad_x.data(), grad_scale.data(), grad_zero_point.data());
  EXPECT_EQ(grad_x, (std::vector<float>{1, 2, 3, 0, 0, 0}));
  EXPECT_EQ(grad_zero_point, (std::vector<float>{-2.0f, -0.625f, -1.5f}));
  EXPECT_FLOAT_EQ(grad_scale[0], 1 * (1 - 0.7f / 0.5f) + 4 * -10);
  EXPECT_FLOAT_EQ(grad_scale[1], 2 * (6 - 0.7f / 0.125f) + 5 * -5);
  EXPECT_FLOAT_EQ(grad_scale[2], 3 * (3 - 0.7f / 0.25f) + 6 * -8);
}

TEST(FakeQuantizeBackward, OtherGroupsGetZero) {
  const int32_t index = 1;
  const std::vector<float> x = {100.0f}, grad = {2.0f};
  std::vector<float> grad_x(1, 9.0f), grad_scale(3, 9.0f), grad_zero_point(3, 9.0f);
  cpu::fake_quantize_backward(one_group(x.data(), FloatType::kFloat32, {1, 1, 1}, &index), grad.data(),
                              grad_x.data(), grad_scale.data(), grad_zero_point.data());
  EXPECT_EQ(grad_x, (std::vector<float>{0.0f}));
  EXPECT_EQ(grad_scale, (std::vector<float>{0.0f, 20.0f, 0.0f}));
  EXPECT_EQ(grad_zero_point, (std::vector<float>{0.0f, -0.25f, 0.0f}));
}

TEST(FakeQuantize, GroupIndexOutOfRangeThrows) {
  const int32_t index = 3;
  float x = 1.0f, y = 9.0f;
  EXPECT_THROW(cpu::fake_quantize(one_group(&x, FloatType::kFloat32, {1, 1, 1}, &index), &y),
               std::out_of_range);
  EXPECT_EQ(y, 9.0f);
}

TEST(FakeQuantizeMixture, IsTheWeightedSumOfItsGroups) {
  for (FloatType type : kFloatTypes) {
    for (int64_t size : kSizes) {
      const std::vector<uint8_t> x = encode(random_normal(size, 3, 2.0f), type);
      const std::vector<float> read = decode(x, type);
      std::vector<float> sum(read.size());
      for (int g = 0; g < 3; ++g) {
        const float zero_point = effective_zero_point(kZeroPoint[g], -8.0f, 7.0f);
        for (size_t i = 0; i < sum.size(); ++i) {
          const float code = quantize_value(read[i], 1.0f / kScale[g], zero_point, -8.0f, 7.0f);
          sum[i] += kImportance[g] * dequantize_value(code, zero_point, kScale[g]);
        }
      }
      const std::vector<uint8_t> expected = encode(sum, type);
      for (cpu::Isa isa : supported_isas()) {
        const cpu::ScopedIsa scope(isa);
        std::vector<uint8_t> y(x.size());
        cpu::fake_quantize_mixture(mixture(x.data(), type, size), y.data());
        EXPECT_EQ(decode(y, type), decode(expected, type)) << cpu::isa_name(isa) << " " << size;
      }
    }
  }
}

TEST(FakeQuantizeMixtureBackward, InstructionSetsGiveEqualBits) {
  for (FloatType type : kFloatTypes) {
    for (int64_t size : kSizes) {
      const std::vector<uint8_t> x = encode(random_normal(size, 4, 2.0f), type);
      const std::vector<uint8_t> grad = encode(random_normal(size, 5), type);
      const cpu::ScopedIsa portable(cpu::Isa::kPortable);
      const Gradients expected = mixture_gradients(x, grad, type);
      for (cpu::Isa isa : supported_isas()) {
        const cpu::ScopedIsa scope(isa);
        EXPECT_TRUE(mixture_gradients(x, grad, type) == expected) << cpu::isa_name(isa) << " " << size;
      }
    }
  }
}

// The importance enters linearly, so its derivative is an exact difference; x only moves the value through
// the straight-through mask.
TEST(FakeQuantizeMixtureBackward, MatchesTheDefinitionInDouble) {
  const int64_t size = 5000;
  const std::vector<float> x = random_normal(size, 6, 2.0f), grad = random_normal(size, 7);
  const FloatType type = FloatType::kFloat32;
  const Gradients result = mixture_gradients(encode(x, type), encode(grad, type), type);
  const std::vector<float> grad_x = decode(result.x, type);
  std::vector<float> mask(x.size());
  for (int g = 0; g < 3; ++g) {
    const float zero_point = effective_zero_point(kZeroPoint[g], -8.0f, 7.0f);
    double scale = 0, zero = 0, importance = 0, scale_bound = 0, zero_bound = 0, importance_bound = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const FakeQuantizeGrads d =
          fake_quantize_grads(x[i], kScale[g], 1.0f / kScale[g], zero_point, -8.0f, 7.0f);
      const double value = dequantize_value(quantize_value(x[i], 1.0f / kScale[g], zero_point, -8.0f, 7.0f),
                                            zero_point, kScale[g]);
      const double weight = kImportance[g], upstream = grad[i];
      mask[i] += kImportance[g] * d.x;
      scale += upstream * weight * d.scale;
      zero += upstream * weight * d.zero_point;
      importance += upstream * value;
      scale_bound += std::fabs(upstream * weight * d.scale);
      zero_bound += std::fabs(upstream * weight * d.zero_point);
      importance_bound += std::fabs(upstream * value);
    }
    // A lane adds 64 rounded products in float32: 65 roundings of 2^-24; the rest is done in double.
    const double epsilon = 66 * std::ldexp(1.0, -24);
    EXPECT_NEAR(result.scale[static_cast<size_t>(g)], scale, epsilon * scale_bound);
    EXPECT_NEAR(result.zero_point[static_cast<size_t>(g)], zero, epsilon * zero_bound);
    EXPECT_NEAR(result.importance[static_cast<size_t>(g)], importance, epsilon * importance_bound);
  }
  for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(grad_x[i], grad[i] * mask[i]);
}

}  // namespace
}  // namespace adpdm
