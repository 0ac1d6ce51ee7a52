// conv2d and linear on wgmma against their definition and against mma.sync, bit for bit; and when wgmma is
// chosen.
#include <gtest/gtest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/igemm_cases.h"
#include "cuda/igemm_wgmma.h"

namespace adpdm::testing {
namespace {

using cuda::DeviceInfo;
using cuda::IgemmCore;
using cuda::IgemmPlan;
using cuda::IgemmRequest;
using cuda::TileChoice;

constexpr DeviceInfo kHopper = {90, 132, 227 * 1024};

// The emulated device is a Hopper while a test runs.
class OnHopper {
 public:
  OnHopper() {
#ifdef ADPDM_SIMT
    cuda::set_emulated_device(kHopper);
#endif
  }
  ~OnHopper() {
#ifdef ADPDM_SIMT
    cuda::set_emulated_device(cuda::kEmulatedA100);
#endif
  }
  OnHopper(const OnHopper&) = delete;
  OnHopper& operator=(const OnHopper&) = delete;
};

#define ADPDM_REQUIRE_WGMMA()                                                        \
  ADPDM_REQUIRE_GPU();                                                               \
  const OnHopper hopper;                                                             \
  if (cuda::current_device_info().arch != 90 || !cuda::built_for("90a")) {           \
    GTEST_SKIP() << "wanted a device of compute capability 9.0 and code for sm_90a"; \
  }                                                                                  \
  static_assert(true)

// An environment variable for the length of a test.
class ScopedVariable {
 public:
  ScopedVariable(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~ScopedVariable() { unsetenv(name_); }
  ScopedVariable(const ScopedVariable&) = delete;
  ScopedVariable& operator=(const ScopedVariable&) = delete;

 private:
  const char* name_;
};

// Equal bits from the definition, from mma.sync and from every wgmma tile that fits.
void expect_same_on_both_cores(const HostCase& host, int splits = 1) {
  const std::vector<uint32_t> expected = expected_results(host);
  DeviceCase device(host);
  EXPECT_EQ(device.conv2d(TileChoice{{64, 64}, splits}), expected) << "mma.sync";
  for (const cuda::IgemmTile& tile : cuda::kWgmmaTiles) {
    if (splits == 1 && host.segments.size() == 2 && tile.outputs == 256)
      continue;  // larger than shared memory
    const TileChoice choice = {tile, splits, IgemmCore::kWgmma};
    const IgemmPlan plan = cuda::plan_conv2d(device.args(), choice);
    ASSERT_EQ(plan.core, IgemmCore::kWgmma) << cuda::describe(plan);
    EXPECT_EQ(device.conv2d(choice), expected) << cuda::describe(plan);
  }
}

void expect_same_on_both_cores(const Layer& layer, const Epilogue& epilogue, uint32_t seed, int splits = 1) {
  expect_same_on_both_cores(random_case(layer, epilogue, seed), splits);
}

// 162 rows are two tiles, 288 codes two and a quarter k tiles, 136 outputs a tile with an end of 8.
Layer ragged_layer() {
  Layer layer;
  layer.batch = 2;
  layer.channels = {32};
  layer.input = {9, 9};
  layer.out_channels = 136;
  return layer;
}

// All others skip themselves where code for it is missing, which no run on such a device may do.
TEST(CudaConv2dWgmma, IsBuiltWhereTheDeviceHasIt) {
  ADPDM_REQUIRE_GPU();
  EXPECT_TRUE(cuda::current_device_info().arch != 90 || cuda::built_for("90a"));
}

TEST(CudaConv2dWgmma, MatchesDefinitionOnEverySchedule) {
  ADPDM_REQUIRE_WGMMA();
  on_schedules(3, [] { expect_same_on_both_cores(ragged_layer(), {}, 1); });
}

TEST(CudaConv2dWgmma, PipelineGoesAroundMoreThanOnce) {
  ADPDM_REQUIRE_WGMMA();
  Layer layer;
  layer.channels = {1488};  // 11.6 k tiles
  layer.input = {1, 130};
  layer.out_channels = 264;  // 3 tiles of 128, 2 of 160 and 256
  layer.kernel = {1, 1};
  layer.padding = layer.padding_end = {0, 0};
  on_schedules(2, [&] { expect_same_on_both_cores(layer, {}, 2); });
}

TEST(CudaConv2dWgmma, ReductionMayBeShorterThanThePipeline) {
  ADPDM_REQUIRE_WGMMA();
  for (int64_t channels : {16, 144, 272, 400}) {
    Layer layer = ragged_layer();
    layer.channels = {channels};
    layer.kernel = {1, 1};
    layer.padding = layer.padding_end = {0, 0};
    on_schedules(1, [&] { expect_same_on_both_cores(layer, {}, 3); });
  }
}

TEST(CudaConv2dWgmma, RowsOfOneWarpgroupMayBeAllThereAre) {
  ADPDM_REQUIRE_WGMMA();
  for (int64_t rows : {1, 63, 64, 65, 128, 129}) {
    Layer layer;
    layer.channels = {160};
    layer.input = {1, rows};
    layer.out_channels = 24;
    layer.kernel = {1, 1};
    layer.padding = layer.padding_end = {0, 0};
    expect_same_on_both_cores(layer, {}, 4);
  }
}

TEST(CudaConv2dWgmma, StridePaddingAndDilationMayDifferByDirection) {
  ADPDM_REQUIRE_WGMMA();
  Layer layer = ragged_layer();
  layer.input = {13, 17};
  layer.kernel = {3, 2};
  layer.stride = {2, 1};
  layer.padding = {2, 0};
  layer.padding_end = {1, 3};
  layer.dilation = {1, 2};
  on_schedules(1, [&] { expect_same_on_both_cores(layer, {}, 5); });
}

TEST(CudaConv2dWgmma, UpsamplesItsInput) {
  ADPDM_REQUIRE_WGMMA();
  Layer layer = ragged_layer();
  layer.input = {5, 6};
  layer.upsample = 2;
  expect_same_on_both_cores(layer, {}, 6);
}

TEST(CudaConv2dWgmma, GroupsHaveWeightsAndOutputsOfTheirOwn) {
  ADPDM_REQUIRE_WGMMA();
  Layer layer = ragged_layer();
  layer.channels = {48};
  layer.groups = 3;
  layer.out_channels = 3 * 40;
  expect_same_on_both_cores(layer, {}, 7);
}

TEST(CudaConv2dWgmma, AddsTwoSegments) {
  ADPDM_REQUIRE_WGMMA();
  Layer layer = ragged_layer();
  layer.channels = {48, 80};
  on_schedules(2, [&] { expect_same_on_both_cores(layer, {}, 8); });
}

TEST(CudaConv2dWgmma, SplitsTheReduction) {
  ADPDM_REQUIRE_WGMMA();
  Layer layer = ragged_layer();
  layer.channels = {96};  // 6.75 k tiles
  Epilogue epilogue;
  epilogue.residual = FloatType::kFloat16;
  epilogue.type = FloatType::kFloat16;
  for (int splits : {2, 3, 7}) expect_same_on_both_cores(layer, epilogue, 9, splits);
}

TEST(CudaConv2dWgmma, SplitsTwoSegments) {
  ADPDM_REQUIRE_WGMMA();
  Layer layer = ragged_layer();
  layer.channels = {48, 80};
  for (int splits : {2, 5}) expect_same_on_both_cores(layer, {}, 10, splits);
}

TEST(CudaConv2dWgmma, FinishesEveryKindOfOutput) {
  ADPDM_REQUIRE_WGMMA();
  for (int64_t out_channels : {136, 133}) {  // vectors, and tails of single values
    Layer layer = ragged_layer();
    layer.out_channels = out_channels;
    for (FloatType type : {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16}) {
      Epilogue epilogue;
      epilogue.row_bias = true;
      epilogue.residual = type;
      epilogue.output_scale = 0.70710678f;
      epilogue.activation = Activation::kSilu;
      epilogue.type = type;
      expect_same_on_both_cores(layer, epilogue, 11);
    }
    for (int num_bits : {4, 8}) {
      Epilogue epilogue;
      epilogue.row_bias = true;
      epilogue.num_bits = num_bits;
      expect_same_on_both_cores(layer, epilogue, 12);
    }
  }
}

TEST(CudaConv2dWgmma, GatesPairsOfOutputs) {
  ADPDM_REQUIRE_WGMMA();
  for (int64_t out_channels : {136, 134}) {
    Layer layer = ragged_layer();
    layer.out_channels = out_channels;
    Epilogue epilogue;
    epilogue.activation = Activation::kGeglu;
    expect_same_on_both_cores(layer, epilogue, 13);
    epilogue.num_bits = 8;
    expect_same_on_both_cores(layer, epilogue, 14);
  }
}

TEST(CudaConv2dWgmma, ExtremeCodesAndZeroPointsAreExact) {
  ADPDM_REQUIRE_WGMMA();
  for (int zero_point : {-128, 127}) {
    HostCase host = random_case(ragged_layer(), {}, 15);
    SegmentData& data = host.segments[0];
    for (int8_t& code : data.codes) code = static_cast<int8_t>(-zero_point - 1);
    for (int8_t& weight : data.weight_codes) weight = -128;
    data.zero_point[static_cast<size_t>(data.group_index)] = zero_point;
    pack(data, host.layer.out_channels, host.taps(), 1, 8);
    expect_same_on_both_cores(host);
  }
}

TEST(CudaLinearWgmma, MatchesMmaSync) {
  ADPDM_REQUIRE_WGMMA();
  Layer layer;
  layer.batch = 2;
  layer.channels = {320};
  layer.input = {1, 77};
  layer.out_channels = 320;
  layer.kernel = {1, 1};
  layer.padding = layer.padding_end = {0, 0};
  Epilogue epilogue;
  epilogue.row_bias = true;
  const HostCase host = random_case(layer, epilogue, 16);
  DeviceCase device(host);
  const std::vector<uint32_t> expected = expected_results(host);
  EXPECT_EQ(device.linear(TileChoice{{64, 64}, 1}), expected);
  EXPECT_EQ(device.linear(TileChoice{{128, 160}, 1}), expected);
}

// ---- the choice ----

// A linear layer of SDXL at 1024 pixels and batch 2, where wgmma has the better costs.
IgemmRequest large_request() { return {"linear", 2048, 1280, 1, {1280}, 8, 8, true, true}; }

TEST(PlannerWgmma, IsChosenForLargeLayersOnHopper) {
  const IgemmPlan plan = cuda::plan_igemm(large_request(), kHopper, std::nullopt);
  EXPECT_EQ(cuda::describe(plan), "wgmma a8w8 128x160");
}

TEST(PlannerWgmma, IsNotChosenForAFewRows) {
  IgemmRequest request = large_request();
  request.rows = 2;
  EXPECT_EQ(cuda::plan_igemm(request, kHopper, std::nullopt).core, IgemmCore::kMma);
}

TEST(PlannerWgmma, IsChosenNowhereElse) {
  for (int arch : {80, 86, 89, 100, 120}) {
    const IgemmPlan plan = cuda::plan_igemm(large_request(), {arch, 132, 227 * 1024}, std::nullopt);
    EXPECT_EQ(plan.core, IgemmCore::kMma) << arch;
  }
}

TEST(PlannerWgmma, NeedsInt8CodesInWholeChunksAndABuildThatHasIt) {
  IgemmRequest request = large_request();
  request.weight_bits = 4;
  EXPECT_EQ(cuda::plan_igemm(request, kHopper, std::nullopt).core, IgemmCore::kMma);
  request = large_request();
  request.activation_bits = request.weight_bits = 4;
  EXPECT_EQ(cuda::plan_igemm(request, kHopper, std::nullopt).core, IgemmCore::kMma);
  request = large_request();
  request.whole_chunks = false;
  EXPECT_EQ(cuda::plan_igemm(request, kHopper, std::nullopt).core, IgemmCore::kMma);
  request = large_request();
  request.wgmma = false;
  EXPECT_EQ(cuda::plan_igemm(request, kHopper, std::nullopt).core, IgemmCore::kMma);
}

TEST(PlannerWgmma, TwoSegmentsNeverExceedSharedMemory) {
  IgemmRequest request = large_request();
  request.reductions = {640, 1280};
  const IgemmPlan plan = cuda::plan_igemm(request, kHopper, std::nullopt);
  ASSERT_EQ(plan.core, IgemmCore::kWgmma);
  EXPECT_LE(cuda::wgmma_shared_bytes(plan.tile, plan.splits == 1 ? 2 : 1), kHopper.max_shared_bytes);
  // Chosen without a split, its two tiles of sums do not fit; in shares of one source they do.
  EXPECT_THROW(cuda::plan_igemm(request, kHopper, TileChoice{{128, 256}, 1}), std::invalid_argument);
  EXPECT_EQ(cuda::plan_igemm(request, kHopper, TileChoice{{128, 256}, 2}).core, IgemmCore::kWgmma);
}

TEST(PlannerWgmma, ItsTilesAreRefusedElsewhereWithASentence) {
  try {
    cuda::plan_igemm(large_request(), {80, 108, 163 * 1024}, TileChoice{{128, 160}, 1});
    FAIL() << "no error";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(
        error.what(),
        "linear: wanted a tile of 64x64, 128x64, 128x128 (128x160, 128x256 are for int8 codes and weights "
        "on compute capability 9.0), got 128x160");
  }
}

TEST(PlannerWgmma, EnvironmentRefusesIt) {
#ifdef ADPDM_SIMT
  EXPECT_TRUE(cuda::wgmma_allowed());
#endif
  {
    const ScopedVariable variable("ADPDM_FORCE_MMA_SYNC", "1");
    EXPECT_FALSE(cuda::wgmma_allowed());
  }
  const ScopedVariable variable("ADPDM_FORCE_MMA_SYNC", "yes");
  try {
    cuda::wgmma_allowed();
    FAIL() << "no error";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "ADPDM_FORCE_MMA_SYNC: wanted 0 or 1, got 'yes'");
  }
}

TEST(PlannerWgmma, EnvironmentActsOnLayers) {
  ADPDM_REQUIRE_WGMMA();
  Layer layer = ragged_layer();
  layer.channels = {128};  // 9 k tiles: fewer would leave it to mma.sync, whose k tiles are shorter
  const HostCase host = random_case(layer, {}, 17);
  DeviceCase device(host);
  const TileChoice choice = {{128, 128}, 1};
  EXPECT_EQ(cuda::plan_conv2d(device.args(), choice).core, IgemmCore::kWgmma);
  const ScopedVariable variable("ADPDM_FORCE_MMA_SYNC", "1");
  EXPECT_EQ(cuda::plan_conv2d(device.args(), choice).core, IgemmCore::kMma);
}

}  // namespace
}  // namespace adpdm::testing
