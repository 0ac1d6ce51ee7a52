// Everything IgemmOutput describes, on CUDA: each step and type, vectors and tails, one pass and split
// reductions.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cuda/igemm_cases.h"

namespace adpdm::testing {
namespace {

using cuda::TileChoice;

constexpr FloatType kTypes[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};

// 35 rows of two images; whole runs of 8 outputs, or tails.
Layer small_layer(bool whole_runs) {
  Layer layer;
  layer.batch = 2;
  layer.channels = {16};
  layer.input = {3, 5};
  layer.out_channels = whole_runs ? 40 : 38;
  return layer;
}

// In one pass and with a split reduction.
void expect_both_ways(const Layer& layer, const Epilogue& epilogue, uint32_t seed) {
  expect_conv2d(layer, epilogue, seed, {TileChoice{{64, 64}, 1}, TileChoice{{64, 64}, 2}});
}

TEST(CudaIgemmEpilogue, EveryStepAlone) {
  ADPDM_REQUIRE_GPU();
  for (bool whole_runs : {true, false}) {
    const Layer layer = small_layer(whole_runs);
    Epilogue none, row_scale, row_bias, scaled, silu, geglu, gelu, gelu_tanh;
    none.bias = false;
    row_scale.row_scale = true;
    row_bias.row_bias = true;
    scaled.output_scale = 1.0f / 1.25f;
    silu.activation = Activation::kSilu;
    geglu.activation = Activation::kGeglu;
    gelu.activation = Activation::kGelu;
    gelu_tanh.activation = Activation::kGeluTanh;
    for (const Epilogue& epilogue : {none, row_scale, row_bias, scaled, silu, geglu, gelu, gelu_tanh})
      expect_both_ways(layer, epilogue, 1);
    for (FloatType type : kTypes) {
      Epilogue residual;
      residual.residual = type;
      expect_both_ways(layer, residual, 2);
    }
  }
}

TEST(CudaIgemmEpilogue, EveryStepTogetherForEveryResult) {
  ADPDM_REQUIRE_GPU();
  for (bool whole_runs : {true, false}) {
    for (Activation activation : {Activation::kSilu, Activation::kGeglu, Activation::kGeluTanh}) {
      for (int num_bits : {0, 2, 4, 8}) {
        for (FloatType type : kTypes) {
          Epilogue all;
          all.row_scale = activation == Activation::kGeluTanh;
          all.row_bias = true;
          if (activation != Activation::kGeglu) all.residual = type;
          all.output_scale = 0.7f;
          all.activation = activation;
          all.num_bits = num_bits;
          all.type = type;
          expect_both_ways(small_layer(whole_runs), all, 3);
        }
      }
    }
  }
}

TEST(CudaIgemmEpilogue, WideTilesFinishEveryRow) {
  ADPDM_REQUIRE_GPU();
  Layer layer = small_layer(true);
  layer.input = {9, 15};  // 270 rows
  layer.out_channels = 200;
  Epilogue all;
  all.row_bias = true;
  all.residual = FloatType::kFloat16;
  all.activation = Activation::kSilu;
  all.type = FloatType::kBFloat16;
  expect_conv2d(layer, all, 4,
                {TileChoice{{128, 64}, 1}, TileChoice{{128, 128}, 1}, TileChoice{{128, 128}, 2}});
}

TEST(CudaIgemmEpilogue, SegmentsAreAddedInOrder) {
  ADPDM_REQUIRE_GPU();
  // Sums of so different a size that another order would round differently.
  Layer layer = small_layer(true);
  layer.channels = {32, 32};
  HostCase host = random_case(layer, {}, 5);
  host.segments[0].scale[1] = 3e4f;
  host.segments[1].scale[1] = 1e-4f;
  const std::vector<uint32_t> expected = expected_results(host);
  std::swap(host.segments[0], host.segments[1]);
  EXPECT_NE(expected_results(host), expected) << "the order makes no difference: a test of nothing";
  std::swap(host.segments[0], host.segments[1]);
  for (int splits : {1, 2, 5}) EXPECT_EQ(DeviceCase(host).conv2d({{{64, 64}, splits}}), expected) << splits;
}

TEST(CudaIgemmEpilogue, UnalignedOperandsGoOneByOne) {
  ADPDM_REQUIRE_GPU();
  Epilogue epilogue;
  epilogue.residual = FloatType::kFloat16;
  epilogue.type = FloatType::kFloat16;
  const HostCase host = random_case(small_layer(true), epilogue, 6);
  const std::vector<uint32_t> expected = expected_results(host);
  DeviceCase device(host);
  Conv2dArgs args = device.args();
  // The result and the bias lie one element further.
  DeviceBuffer<uint16_t> result(static_cast<int64_t>(expected.size()) + 1);
  std::vector<float> bias = {0.0f};
  bias.insert(bias.end(), host.bias.begin(), host.bias.end());
  const DeviceBuffer<float> shifted_bias(bias);
  args.output.data = result.data() + 1;
  args.output.bias = shifted_bias.data() + 1;
  const cuda::IgemmPlan plan = cuda::plan_conv2d(args, TileChoice{{64, 64}, 1});
  cuda::conv2d(args, plan, nullptr, nullptr);
  const std::vector<uint16_t> bits = result.host();
  EXPECT_EQ(bits[0], 0xffff) << "something was written before the result";
  EXPECT_EQ(std::vector<uint32_t>(bits.begin() + 1, bits.end()), expected);
}

// Every NaN as one: its bits are the device's own business.
std::vector<uint32_t> with_one_nan(std::vector<uint32_t> bits, const Epilogue& epilogue) {
  if (epilogue.num_bits > 0) return bits;
  for (uint32_t& x : bits) {
    if (std::isnan(bits_as_float(x, epilogue.type))) x = 0xffffffff;
  }
  return bits;
}

TEST(CudaIgemmEpilogue, SpecialValuesRoundAsOnTheHost) {
  ADPDM_REQUIRE_GPU();
  // The bias alone is the result: codes are the zero-point.
  const std::vector<float> values = {
      1e-40f,  3e-8f,  5.9604645e-8f, 6.1e-5f,   1.0009766f, 1.00048828125f, 1.00390625f, 65519.0f, 65520.0f,
      3.4e38f, -2e-8f, INFINITY,      -INFINITY, NAN,        -0.0f,          0.1f};
  Layer layer;
  layer.channels = {16};
  layer.kernel = {1, 1};
  layer.padding = layer.padding_end = {0, 0};
  layer.out_channels = static_cast<int64_t>(values.size());
  for (FloatType type : kTypes) {
    for (int num_bits : {0, 8}) {
      Epilogue epilogue;
      epilogue.type = type;
      epilogue.num_bits = num_bits;
      HostCase host = random_case(layer, epilogue, 7);
      std::fill(host.segments[0].codes.begin(), host.segments[0].codes.end(), int8_t{5});
      host.segments[0].zero_point[1] = 5;
      host.bias = values;
      EXPECT_EQ(with_one_nan(DeviceCase(host).conv2d(), epilogue),
                with_one_nan(expected_results(host), epilogue))
          << static_cast<int>(type);
    }
  }
}

TEST(CudaIgemmEpilogue, NextGroupOutsideTheTableActsAsTheNearest) {
  ADPDM_REQUIRE_GPU();
  Epilogue epilogue;
  epilogue.num_bits = 8;
  HostCase host = random_case(small_layer(true), epilogue, 8);
  host.next_group = 2;
  const std::vector<uint32_t> expected = expected_results(host);
  host.next_group = 77;
  EXPECT_EQ(DeviceCase(host).conv2d(), expected);
}

}  // namespace
}  // namespace adpdm::testing
