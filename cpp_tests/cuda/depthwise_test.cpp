// Depthwise conv2d on CUDA against its definition, bit for bit, and against the GEMM kernels.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "cuda/igemm_cases.h"

namespace adpdm::testing {
namespace {

using cuda::IgemmCore;
using cuda::TileChoice;

constexpr FloatType kTypes[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};

Layer depthwise(int64_t channels, Size2d input, Size2d kernel = {3, 3}, Size2d padding = {1, 1}) {
  Layer layer;
  layer.channels = {channels};
  layer.out_channels = layer.groups = channels;
  layer.input = input;
  layer.kernel = kernel;
  layer.padding = layer.padding_end = padding;
  return layer;
}

// By its own kernel, with weights of 8 and of 4 bits.
void expect_depthwise(Layer layer, const Epilogue& epilogue, uint32_t seed) {
  for (int weight_bits : {8, 4}) {
    layer.weight_bits = weight_bits;
    const HostCase host = random_case(layer, epilogue, seed);
    DeviceCase device(host);
    const cuda::IgemmPlan plan = cuda::plan_conv2d(device.args());
    ASSERT_EQ(plan.core, IgemmCore::kDepthwise) << cuda::describe(plan);
    EXPECT_EQ(plan.workspace_bytes, 0);
    EXPECT_EQ(device.conv2d(), expected_results(host)) << cuda::describe(plan) << ", seed " << seed;
  }
}

TEST(CudaDepthwise, MatchesDefinitionForEveryNumberOfChannels) {
  ADPDM_REQUIRE_GPU();
  for (int64_t channels : {2, 7, 8, 9, 16, 24, 31, 64, 130, 264}) {
    Layer layer = depthwise(channels, {5, 4});
    layer.batch = 2;
    expect_depthwise(layer, {}, 1);
  }
}

TEST(CudaDepthwise, MatchesDefinitionForEveryKernel) {
  ADPDM_REQUIRE_GPU();
  // 4-bit rows hold 32 taps in a chunk.
  const Size2d kernels[] = {{1, 1}, {1, 2},  {1, 3}, {2, 2}, {1, 5}, {2, 3},  {3, 3}, {3, 4},
                            {2, 6}, {13, 1}, {5, 5}, {3, 7}, {4, 8}, {11, 3}, {7, 7}, {9, 9}};
  for (const Size2d kernel : kernels) {
    for (int64_t channels : {16, 5}) {
      const Size2d padding = {kernel.height / 2, kernel.width / 2};
      expect_depthwise(depthwise(channels, {6, 7}, kernel, padding), {}, 2);
    }
  }
}

TEST(CudaDepthwise, MatchesDefinitionForOddGeometry) {
  ADPDM_REQUIRE_GPU();
  for (int64_t channels : {24, 6}) {
    Layer strided = depthwise(channels, {9, 7});
    strided.stride = {2, 1};
    strided.batch = 3;
    Layer dilated = depthwise(channels, {12, 9}, {3, 3}, {2, 4});
    dilated.dilation = {2, 3};
    Layer below_right = depthwise(channels, {6, 6}, {3, 3}, {0, 0});
    below_right.stride = {2, 2};
    below_right.padding_end = {1, 1};
    Layer upsampled = depthwise(channels, {3, 5});
    upsampled.upsample = 2;
    upsampled.batch = 2;
    const Layer small = depthwise(channels, {1, 1});                 // the kernel is larger than the image
    const Layer halo = depthwise(channels, {2, 3}, {5, 7}, {3, 4});  // mostly halo
    for (const Layer& layer : {strided, dilated, below_right, upsampled, small, halo})
      expect_depthwise(layer, {}, 3);
  }
}

TEST(CudaDepthwise, AThreadOfManyPixelsGivesTheSameBits) {
  ADPDM_REQUIRE_GPU();
  // 11 and 15 pixels of a thread on a single multiprocessor; 3 and 4 on a large GPU, of larger images.
#ifdef ADPDM_SIMT
  cuda::set_emulated_device({80, 1, 163 * 1024});
  const Size2d input = {33, 21};
#else
  const Size2d input = {233, 121};
#endif
  for (int64_t channels : {64, 61}) {
    for (const Size2d kernel : {Size2d{3, 3}, Size2d{5, 1}}) {
      Layer layer = depthwise(channels, input, kernel, {kernel.height / 2, kernel.width / 2});
      layer.batch = channels == 64 ? 2 : 3;
      expect_depthwise(layer, {}, 4);
    }
  }
#ifdef ADPDM_SIMT
  cuda::set_emulated_device(cuda::kEmulatedA100);
#endif
}

TEST(CudaDepthwise, FinishesResultsAsEveryLayerDoes) {
  ADPDM_REQUIRE_GPU();
  for (int64_t channels : {40, 38}) {
    Layer layer = depthwise(channels, {3, 5});
    layer.batch = 2;
    for (Activation activation : {Activation::kNone, Activation::kSilu, Activation::kGelu}) {
      for (int num_bits : {0, 4, 8}) {
        for (FloatType type : kTypes) {
          Epilogue all;
          all.bias = num_bits != 4;
          all.row_scale = activation == Activation::kGelu;
          all.row_bias = true;
          all.residual = type;
          all.output_scale = 0.7f;
          all.activation = activation;
          all.num_bits = num_bits;
          all.type = type;
          expect_depthwise(layer, all, 5);
        }
      }
    }
  }
}

TEST(CudaDepthwise, ExtremesStayExact) {
  ADPDM_REQUIRE_GPU();
  for (int weight_bits : {8, 4}) {
    for (int zero_point : {-128, 127}) {
      Layer layer = depthwise(16, {4, 5}, {7, 7}, {3, 3});
      layer.weight_bits = weight_bits;
      HostCase host = random_case(layer, {}, 6);
      SegmentData& data = host.segments[0];
      const int lowest = -(1 << (weight_bits - 1));
      std::fill(data.codes.begin(), data.codes.end(), static_cast<int8_t>(zero_point < 0 ? 127 : -128));
      std::fill(data.weight_codes.begin(), data.weight_codes.end(), static_cast<int8_t>(lowest));
      std::fill(data.weight_sum.begin(), data.weight_sum.end(), 49 * lowest);
      data.zero_point[1] = zero_point;
      EXPECT_EQ(DeviceCase(host).conv2d(), expected_results(host)) << weight_bits << " " << zero_point;
    }
  }
}

TEST(CudaDepthwise, GroupIndexOutsideTheTableActsAsTheNearest) {
  ADPDM_REQUIRE_GPU();
  HostCase host = random_case(depthwise(16, {3, 3}), {}, 7);
  for (const auto& [index, nearest] : {std::pair(-5, 0), std::pair(3, 2)}) {
    host.segments[0].group_index = nearest;
    const std::vector<uint32_t> expected = expected_results(host);
    host.segments[0].group_index = index;
    EXPECT_EQ(DeviceCase(host).conv2d(), expected) << index;
  }
}

TEST(CudaDepthwise, ATileOfTheCallersRunsTheGemm) {
  ADPDM_REQUIRE_GPU();
  const HostCase host = random_case(depthwise(12, {4, 5}), {}, 8);
  DeviceCase device(host);
  const TileChoice choice = {{64, 64}, 1};
  EXPECT_EQ(cuda::plan_conv2d(device.args(), choice).core, IgemmCore::kMma);
  EXPECT_EQ(device.conv2d(choice), device.conv2d());
}

TEST(CudaDepthwise, OtherGroupsRunTheGemm) {
  ADPDM_REQUIRE_GPU();
  Layer two_each = depthwise(12, {4, 5});
  two_each.out_channels = 24;
  Layer pairs = depthwise(12, {4, 5});
  pairs.groups = 6;
  Layer single = depthwise(1, {4, 5});
  for (const Layer& layer : {two_each, pairs, single}) {
    const HostCase host = random_case(layer, {}, 9);
    DeviceCase device(host);
    EXPECT_EQ(cuda::plan_conv2d(device.args()).core, IgemmCore::kMma);
    EXPECT_EQ(device.conv2d(), expected_results(host));
  }
}

TEST(CudaDepthwise, EmptyBatchDoesNothing) {
  ADPDM_REQUIRE_GPU();
  Layer layer = depthwise(16, {3, 3});
  layer.batch = 0;
  const HostCase host = random_case(layer, {}, 10);
  EXPECT_TRUE(DeviceCase(host).conv2d().empty());
}

}  // namespace
}  // namespace adpdm::testing
