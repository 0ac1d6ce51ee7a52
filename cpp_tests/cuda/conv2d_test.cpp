// conv2d on CUDA against its definition, bit for bit: shapes, modes, tiles, split reductions, operands.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/igemm_cases.h"

namespace adpdm::testing {
namespace {

using cuda::TileChoice;
using Choices = std::vector<std::optional<TileChoice>>;

// Bits of activations and weights, as stored.
struct Mode {
  int activation_bits;
  int weight_bits;
};
constexpr Mode kModes[] = {{8, 8}, {8, 4}, {4, 4}};

Layer with_mode(Layer layer, Mode mode) {
  layer.activation_bits = mode.activation_bits;
  layer.weight_bits = mode.weight_bits;
  return layer;
}

Choices every_tile(int splits) {
  return {TileChoice{{64, 64}, splits}, TileChoice{{128, 64}, splits}, TileChoice{{128, 128}, splits}};
}

Layer make_layer(std::vector<int64_t> channels, Size2d input, int64_t out_channels, Size2d kernel = {3, 3},
                 Size2d stride = {1, 1}, Size2d padding = {1, 1}) {
  Layer layer;
  layer.channels = std::move(channels);
  layer.input = input;
  layer.out_channels = out_channels;
  layer.kernel = kernel;
  layer.stride = stride;
  layer.padding = layer.padding_end = padding;
  return layer;
}

// ---- modes, tiles, schedules ----

TEST(CudaConv2d, MatchesDefinitionForEveryModeAndTile) {
  ADPDM_REQUIRE_GPU();
  Layer layer = make_layer({32}, {9, 8}, 136);
  layer.batch = 2;  // 144 rows: more than one tile of 128, the last one partial
  on_devices([&] {
    for (const Mode& mode : kModes) {
      on_schedules(1, [&] { expect_conv2d(with_mode(layer, mode), {}, 1, every_tile(1)); });
    }
  });
}

TEST(CudaConv2d, DoesNotDependOnTheOrderOfWarps) {
  ADPDM_REQUIRE_GPU();
  const Layer layer = make_layer({96}, {5, 6}, 40);
  for (const Mode& mode : kModes) {
    on_schedules(4, [&] { expect_conv2d(with_mode(layer, mode), {}, 2, {TileChoice{{64, 64}, 1}}); });
  }
}

TEST(CudaConv2d, MatchesDefinitionForEveryWeightWidth) {
  ADPDM_REQUIRE_GPU();
  for (int bits = 2; bits <= 8; ++bits) {
    for (int activation_bits : {8, 4}) {
      if (activation_bits == 4 && bits > 4) continue;
      expect_conv2d(with_mode(make_layer({32}, {4, 5}, 24), {activation_bits, bits}), {}, 10u + bits);
    }
  }
}

TEST(CudaConv2d, EveryNumberOfKTilesFillsThePipelineRight) {
  ADPDM_REQUIRE_GPU();
  // 1 to 6 k tiles of 64 codes for 4 stages, with and without a tail.
  for (int64_t channels = 16; channels <= 384; channels += 48) {
    on_schedules(1, [&] { expect_conv2d(make_layer({channels}, {1, 3}, 8, {1, 1}, {1, 1}, {0, 0}), {}, 3); });
  }
}

// ---- geometry ----

TEST(CudaConv2d, MatchesDefinitionForOddGeometry) {
  ADPDM_REQUIRE_GPU();
  Layer dilated = make_layer({16}, {12, 9}, 20, {3, 3}, {1, 2}, {2, 4});
  dilated.dilation = {2, 3};
  Layer above_left = make_layer({32}, {6, 7}, 16);
  above_left.padding_end = {0, 0};
  Layer below_right = make_layer({32}, {6, 6}, 16, {3, 3}, {2, 2}, {0, 0});
  below_right.padding_end = {1, 1};  // the downsampling of some U-Nets
  Layer uneven = make_layer({16}, {3, 4}, 16, {2, 4});
  uneven.padding = {0, 2};
  uneven.padding_end = {3, 1};
  Layer batch = make_layer({16}, {3, 5}, 9, {2, 2}, {2, 2}, {0, 0});
  batch.batch = 7;
  const Layer layers[] = {
      make_layer({16}, {1, 1}, 5),                          // the kernel is larger than the image
      make_layer({32}, {2, 3}, 7, {5, 7}, {1, 1}, {3, 2}),  // mostly halo
      make_layer({48}, {11, 6}, 16, {3, 2}, {2, 3}, {1, 0}),
      make_layer({64}, {5, 5}, 1, {1, 1}, {1, 1}, {0, 0}),
      make_layer({64}, {5, 5}, 65, {1, 1}, {2, 2}, {1, 1}),  // padded 1x1
      dilated,
      above_left,
      below_right,
      uneven,
      batch,
  };
  uint32_t seed = 100;
  for (const Layer& layer : layers) {
    for (const Mode& mode : kModes) {
      Layer with = with_mode(layer, mode);
      if (mode.activation_bits == 4) with.channels = {32};
      expect_conv2d(with, {}, ++seed);
    }
  }
}

TEST(CudaConv2d, UpsamplesByTwo) {
  ADPDM_REQUIRE_GPU();
  for (const Mode& mode : kModes) {
    for (Size2d padding : {Size2d{1, 1}, Size2d{0, 2}}) {
      Layer layer = make_layer({32}, {3, 5}, 24, {3, 3}, {1, 1}, padding);
      layer.upsample = 2;
      layer.batch = 2;
      expect_conv2d(with_mode(layer, mode), {}, 200);
    }
  }
}

TEST(CudaConv2d, MatchesDefinitionForGroups) {
  ADPDM_REQUIRE_GPU();
  for (const Mode& mode : kModes) {
    for (int64_t outputs : {48, 9}) {  // 16 and 3 of a group: vectors and tails
      Layer layer = make_layer({96}, {5, 4}, outputs);
      layer.groups = 3;
      layer.batch = 2;
      expect_conv2d(with_mode(layer, mode), {}, 300, {std::nullopt, TileChoice{{128, 64}, 3}});
    }
    Layer halves = make_layer({64}, {3, 3}, 24);  // 24 are whole runs, 12 of a group are not
    halves.groups = 2;
    expect_conv2d(with_mode(halves, mode), {}, 301);
  }
}

TEST(CudaConv2d, GathersChannelsThatAreNoWholeChunks) {
  ADPDM_REQUIRE_GPU();
  Layer depthwise = make_layer({10}, {6, 5}, 20, {3, 3}, {2, 1}, {0, 1});
  depthwise.groups = 10;
  Layer upsampled = make_layer({3}, {3, 3}, 8);
  upsampled.upsample = 2;
  const Layer layers[] = {
      make_layer({1}, {9, 5}, 3),
      make_layer({3}, {6, 6}, 16, {5, 5}, {2, 2}, {2, 2}),
      make_layer({4}, {8, 9}, 70),
      make_layer({17}, {4, 5}, 24),
      make_layer({16, 5}, {4, 4}, 12),
      depthwise,
      upsampled,
  };
  uint32_t seed = 400;
  for (const Layer& layer : layers) {
    for (int weight_bits : {8, 4}) expect_conv2d(with_mode(layer, {8, weight_bits}), {}, ++seed);
  }
}

TEST(CudaConv2d, PackedCodesOfA1x1KernelFillUpTheirLastBlock) {
  ADPDM_REQUIRE_GPU();
  for (int64_t channels : {1, 31, 40, 129}) {
    on_devices([&] {
      expect_conv2d(with_mode(make_layer({channels}, {3, 4}, 10, {1, 1}, {1, 1}, {0, 0}), {4, 4}), {}, 500);
    });
  }
}

// ---- two segments, split reductions ----

TEST(CudaConv2d, TwoSegmentsKeepTheirQuantizers) {
  ADPDM_REQUIRE_GPU();
  on_devices([&] {
    for (const Mode& mode : kModes) {
      const Layer layer = with_mode(make_layer({64, 32}, {9, 8}, 72), mode);
      on_schedules(1, [&] { expect_conv2d(layer, {}, 600, every_tile(1)); });
    }
  });
}

TEST(CudaConv2d, SplitReductionsGiveTheSameBits) {
  ADPDM_REQUIRE_GPU();
  for (const Mode& mode : kModes) {
    const Layer one = with_mode(make_layer({64}, {4, 4}, 72), mode);
    const Layer two = with_mode(make_layer({32, 96}, {4, 4}, 72), mode);
    for (int splits = 1; splits <= 8; ++splits) {
      expect_conv2d(one, {}, 700, {TileChoice{{64, 64}, splits}});
      expect_conv2d(two, {}, 701, {TileChoice{{64, 64}, splits}});
    }
  }
  expect_conv2d(make_layer({64}, {9, 15}, 130), {}, 702, every_tile(2));
  expect_conv2d(make_layer({5}, {9, 9}, 65), {}, 703, {TileChoice{{64, 64}, 2}});
}

// ---- extremes ----

TEST(CudaConv2d, ExtremeZeroPointsStayExact) {
  ADPDM_REQUIRE_GPU();
  for (const Mode& mode : kModes) {
    const int lowest = mode.activation_bits == 8 ? -128 : -8;
    for (int zero_point : {lowest, 0, -lowest - 1}) {
      HostCase host = random_case(with_mode(make_layer({32}, {4, 4}, 16), mode), {}, 800);
      host.segments[0].zero_point[1] = zero_point;
      EXPECT_EQ(DeviceCase(host).conv2d(), expected_results(host)) << zero_point;
    }
  }
}

TEST(CudaConv2d, LargestReductionDoesNotOverflow) {
  ADPDM_REQUIRE_GPU();
  // Every product at its extreme: K * (127 - -128) * -128, and for packed codes K * (7 - -8) * -8.
  for (const Mode& mode : kModes) {
    const bool packed = mode.activation_bits == 4;
    const int64_t channels = packed ? kMaxReduction / 32 * 32 : kMaxReduction;
    const int high = packed ? 7 : 127;
    Layer layer = with_mode(make_layer({channels}, {1, 1}, 1, {1, 1}, {1, 1}, {0, 0}), mode);
    Epilogue epilogue;
    epilogue.bias = false;
    HostCase host = random_case(layer, epilogue, 900);
    SegmentData& data = host.segments[0];
    std::fill(data.codes.begin(), data.codes.end(), static_cast<int8_t>(high));
    const int lowest = -(1 << (mode.weight_bits - 1));
    std::fill(data.weight_codes.begin(), data.weight_codes.end(), static_cast<int8_t>(lowest));
    data.weight_sum = {static_cast<int32_t>(lowest * channels)};
    data.weight_scale = {1.0f};
    data.scale[1] = 1.0f;
    data.zero_point[1] = -high - 1;
    const auto sum = static_cast<float>((2 * high + 1) * lowest * channels);
    const auto check = [&] {
      EXPECT_EQ(DeviceCase(host).conv2d({{{64, 64}, 1}}), std::vector<uint32_t>{float_to_bits(sum)});
    };
    // With this tile codes of 8 bits go one way on every device; tens of seconds each under the sanitizers.
    packed ? on_devices(check) : check();
  }
}

TEST(CudaConv2d, GroupIndexOutsideTheTableActsAsTheNearest) {
  ADPDM_REQUIRE_GPU();
  HostCase host = random_case(make_layer({16}, {3, 3}, 8), {}, 1000);
  for (const auto& [index, nearest] : {std::pair(-5, 0), std::pair(3, 2), std::pair(1 << 30, 2)}) {
    host.segments[0].group_index = nearest;
    const std::vector<uint32_t> expected = expected_results(host);
    host.segments[0].group_index = index;
    EXPECT_EQ(DeviceCase(host).conv2d(), expected) << index;
  }
}

TEST(CudaConv2d, EmptyBatchDoesNothing) {
  ADPDM_REQUIRE_GPU();
  Layer layer = make_layer({16}, {3, 3}, 8);
  layer.batch = 0;
  const HostCase host = random_case(layer, {}, 1100);
  EXPECT_TRUE(DeviceCase(host).conv2d().empty());
}

// ---- errors ----

std::string error_of(const Layer& layer, const Epilogue& epilogue = {}) {
  const HostCase host = random_case(layer, epilogue, 1200);
  DeviceCase device(host);
  try {
    device.conv2d();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "no error";
}

TEST(CudaConv2d, RefusesWhatNoKernelTakes) {
  ADPDM_REQUIRE_GPU();
  EXPECT_EQ(
      error_of(with_mode(make_layer({32}, {3, 3}, 8), {4, 8})),
      "conv2d: packed 4-bit input needs weights of at most 4 bits, got wider ones; unpack the input first");
  Layer half_blocks = with_mode(make_layer({96}, {3, 3}, 8), {4, 4});
  half_blocks.groups = 2;
  EXPECT_EQ(error_of(half_blocks),
            "conv2d: packed 4-bit input needs channels per group in multiples of 32 and aligned to 16 bytes; "
            "unpack "
            "the input first");
  Layer odd = make_layer({32}, {3, 3}, 6);
  odd.groups = 2;
  Epilogue geglu;
  geglu.activation = Activation::kGeglu;
  EXPECT_EQ(error_of(odd, geglu), "conv2d: geglu needs an even number of outputs per group, got 3");
}

TEST(CudaConv2d, RefusesImagesWithMorePixelsThanItsIndicesCount) {
  ADPDM_REQUIRE_GPU();
  const HostCase host = random_case(make_layer({16}, {3, 3}, 8), {}, 1300);
  DeviceCase device(host);
  Conv2dArgs args = device.args();
  args.input = {50'000, 50'000};  // never read
  args.stride = {1000, 1000};
  args.out = {50, 50};
  try {
    cuda::plan_conv2d(args);
    ADD_FAILURE() << "wanted an error";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "conv2d: wanted at most 2147483391 input pixels in an image, got 2500000000");
  }
}

#ifdef ADPDM_SIMT
TEST(CudaConv2d, NamesTheArchitecturesThatWereBuilt) {
  cuda::set_emulated_device({75, 40, 64 * 1024});
  const std::string error = error_of(make_layer({32}, {3, 3}, 8));
  cuda::set_emulated_device(cuda::kEmulatedA100);
  EXPECT_NE(error.find("conv2d: the CUDA kernels were built for"), std::string::npos) << error;
  EXPECT_NE(error.find("sm_75"), std::string::npos) << error;
}
#endif

}  // namespace
}  // namespace adpdm::testing
