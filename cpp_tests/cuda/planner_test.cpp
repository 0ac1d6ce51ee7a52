// The planner: what it chooses by its model, what it can be told, what it refuses. Needs no device.
#include "cuda/planner.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/igemm_mma.h"

namespace adpdm::cuda {
namespace {

constexpr DeviceInfo kA100 = {80, 108, 163 * 1024};
constexpr DeviceInfo kRtx3090 = {86, 82, 99 * 1024};
constexpr DeviceInfo kRtx4090 = {89, 128, 99 * 1024};
constexpr DeviceInfo kH200 = {90, 132, 227 * 1024};
constexpr DeviceInfo kB200 = {100, 148, 227 * 1024};
constexpr DeviceInfo kRtx5090 = {120, 170, 99 * 1024};
constexpr DeviceInfo kDevices[] = {kA100, kRtx3090, kRtx4090, kH200, kB200, kRtx5090};

IgemmRequest make_request(int64_t rows, int64_t outputs, std::vector<int64_t> reductions,
                          int activation_bits = 8, int weight_bits = 8) {
  return {"conv2d", rows, outputs, 1, std::move(reductions), activation_bits, weight_bits, true};
}

std::string error_of(const IgemmRequest& request, const DeviceInfo& device,
                     const std::optional<TileChoice>& choice = std::nullopt) {
  try {
    plan_igemm(request, device, choice);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(Planner, ModeFollowsStorageAndDevice) {
  for (const DeviceInfo& device : kDevices) {
    EXPECT_EQ(plan_igemm(make_request(64, 64, {64}, 8, 8), device, {}).mode, IgemmMode::kA8W8);
    EXPECT_EQ(plan_igemm(make_request(64, 64, {64}, 8, 4), device, {}).mode, IgemmMode::kA8W4);
    EXPECT_EQ(plan_igemm(make_request(64, 64, {64}, 4, 4), device, {}).mode,
              device.arch < 90 ? IgemmMode::kA4W4 : IgemmMode::kA4W4Unpacked);
  }
}

TEST(Planner, LargeLayersGetWideTilesAndNoSplit) {
  for (const DeviceInfo& device : kDevices) {
    const IgemmPlan plan = plan_igemm(make_request(32768, 1280, {11520}), device, {});
    EXPECT_EQ(plan.tile.rows, 128) << describe(plan);
    EXPECT_EQ(plan.splits, 1);
    EXPECT_EQ(plan.workspace_bytes, 0);
  }
}

TEST(Planner, SmallMapsWithLongReductionsAreSplit) {
  for (const DeviceInfo& device : kDevices) {
    const IgemmPlan plan = plan_igemm(make_request(16, 256, {4608}), device, {});
    EXPECT_GT(plan.splits, 1) << describe(plan);
    EXPECT_EQ(plan.workspace_bytes, int64_t{plan.splits} * plan.tile.rows * 256 * 4);
  }
}

TEST(Planner, ShortReductionsAreNotSplit) {
  for (const DeviceInfo& device : kDevices) {
    EXPECT_EQ(plan_igemm(make_request(16, 64, {128}), device, {}).splits, 1);
  }
}

TEST(Planner, FullDevicesAreNotSplit) {
  // Nor are layers of two sources, whose widest tile fits some devices only where it is split.
  for (const DeviceInfo& device : kDevices) {
    EXPECT_EQ(plan_igemm(make_request(32768, 1280, {5760, 5760}), device, {}).workspace_bytes, 0);
  }
}

TEST(Planner, PlansFitTheSharedMemoryOfTheDevice) {
  for (const DeviceInfo& device : kDevices) {
    for (const auto& [activation_bits, weight_bits] : {std::pair(8, 8), std::pair(8, 4), std::pair(4, 4)}) {
      const IgemmPlan plan =
          plan_igemm(make_request(32768, 1280, {2880, 2880}, activation_bits, weight_bits), device, {});
      const int sources = plan.splits == 1 ? 2 : 1;
      EXPECT_LE(mma_shared_bytes(plan.mode, plan.tile, sources), device.max_shared_bytes) << describe(plan);
    }
  }
}

TEST(Planner, SourcesShareSplitsByTheirLength) {
  const auto shares = [](int64_t first, int64_t second, int splits) {
    const IgemmPlan plan =
        plan_igemm(make_request(64, 64, {first, second}), kA100, TileChoice{{64, 64}, splits});
    return std::pair(plan.splits_of_first, plan.splits);
  };
  EXPECT_EQ(shares(64 * 10, 64 * 10, 4), std::pair(2, 4));
  EXPECT_EQ(shares(64 * 30, 64 * 10, 8), std::pair(6, 8));
  EXPECT_EQ(shares(64 * 100, 64, 8), std::pair(7, 8));
  EXPECT_EQ(shares(64, 64 * 100, 8), std::pair(1, 8));
  EXPECT_EQ(shares(64, 64, 8), std::pair(1, 2));  // no more than there are k tiles
}

TEST(Planner, EveryShareOfASplitReductionIsCoveredOnce) {
  for (int64_t first : {1, 3, 7, 20}) {
    for (int64_t second : {0, 1, 5, 40}) {
      for (int splits = 1; splits <= kMaxSplits; ++splits) {
        std::vector<int64_t> reductions = {64 * first};
        if (second > 0) reductions.push_back(64 * second);
        const IgemmPlan plan =
            plan_igemm(make_request(64, 64, reductions), kA100, TileChoice{{64, 64}, splits});
        IgemmProblem problem{};
        problem.num_sources = static_cast<int32_t>(reductions.size());
        problem.sources[0].num_k_tiles = static_cast<int32_t>(first);
        problem.sources[1].num_k_tiles = static_cast<int32_t>(second);
        problem.splits = plan.splits;
        problem.splits_of_first = plan.splits_of_first;
        int64_t next[2] = {0, 0};
        for (int z = 0; z < plan.splits; ++z) {
          for (int s = first_source(problem, z); s < end_source(problem, z); ++s) {
            const KRange range = k_range(problem, s, z);
            EXPECT_EQ(range.begin, next[s]);
            EXPECT_LT(range.begin, range.end);
            next[s] = range.end;
          }
        }
        EXPECT_EQ(next[0], first);
        EXPECT_EQ(next[1], second);
      }
    }
  }
}

TEST(Planner, GatheringHasOneTile) {
  IgemmRequest request = make_request(4096, 320, {36});
  request.whole_chunks = false;
  const IgemmPlan plan = plan_igemm(request, kA100, TileChoice{{128, 128}, 0});
  EXPECT_TRUE(plan.gather);
  EXPECT_TRUE((plan.tile == IgemmTile{64, 64}));
}

TEST(Planner, EveryKernelAPlanCanNameExists) {
  for (IgemmMode mode : {IgemmMode::kA8W8, IgemmMode::kA8W4, IgemmMode::kA4W4, IgemmMode::kA4W4Unpacked}) {
    for (const IgemmTile& tile : kMmaTiles) EXPECT_NE(find_mma_kernel(mode, tile, false).function, nullptr);
    if (activation_bits(mode) == 4) continue;
    EXPECT_NE(find_mma_kernel(mode, kMmaTiles[0], true).function, nullptr);
  }
}

TEST(Planner, DescribesItsPlan) {
  EXPECT_EQ(describe(plan_igemm(make_request(64, 64, {640}, 8, 4), kA100, TileChoice{{128, 64}, 2})),
            "mma a8w4 128x64 splits=2");
  IgemmRequest request = make_request(64, 64, {36});
  request.whole_chunks = false;
  EXPECT_EQ(describe(plan_igemm(request, kA100, TileChoice{{64, 64}, 1})), "mma a8w8 64x64 gather");
}

TEST(Planner, RefusesWithASentence) {
  EXPECT_EQ(error_of(make_request(64, 64, {64}), {75, 40, 64 * 1024}),
            "conv2d: wanted a device of compute capability 8.0 or later, got 7.5");
  EXPECT_EQ(
      error_of(make_request(64, 64, {64}), kA100, TileChoice{{96, 64}, 1}),
      "conv2d: wanted a tile of 64x64, 128x64, 128x128, 128x160, 128x256 and 0..8 splits, got 96x64 and 1");
  EXPECT_EQ(
      error_of(make_request(64, 64, {64}), kA100, TileChoice{{64, 64}, 9}),
      "conv2d: wanted a tile of 64x64, 128x64, 128x128, 128x160, 128x256 and 0..8 splits, got 64x64 and 9");
  EXPECT_EQ(error_of(make_request(64, 64, {64, 64}), kRtx3090, TileChoice{{128, 128}, 1}),
            "conv2d: tile 128x128 for this layer needs more than the 101376 bytes of shared memory that a "
            "block of the "
            "device has");
}

// Sets ADPDM_CUDA_TILE for its lifetime.
class ScopedTile {
 public:
  explicit ScopedTile(const char* value) { setenv("ADPDM_CUDA_TILE", value, 1); }
  ~ScopedTile() { unsetenv("ADPDM_CUDA_TILE"); }
  ScopedTile(const ScopedTile&) = delete;
  ScopedTile& operator=(const ScopedTile&) = delete;
};

TEST(Planner, TileComesFromTheEnvironment) {
  EXPECT_FALSE(tile_from_environment().has_value());
  {
    const ScopedTile scope("128x64/2");
    const std::optional<TileChoice> choice = tile_from_environment();
    ASSERT_TRUE(choice.has_value());
    EXPECT_TRUE((choice->tile == IgemmTile{128, 64}));
    EXPECT_EQ(choice->splits, 2);
  }
  for (const auto& [value, core] :
       {std::pair("mma:128x128/1", IgemmCore::kMma), std::pair("wgmma:128x128/1", IgemmCore::kWgmma)}) {
    const ScopedTile scope(value);
    EXPECT_TRUE((tile_from_environment()->tile == IgemmTile{128, 128})) << value;
    EXPECT_EQ(tile_from_environment()->core, core) << value;
  }
  const ScopedTile scope("128x128");
  EXPECT_FALSE(tile_from_environment()->core.has_value());
  EXPECT_TRUE((tile_from_environment()->tile == IgemmTile{128, 128}));
  EXPECT_EQ(tile_from_environment()->splits, 0);
}

TEST(Planner, WrongTextInTheEnvironmentIsAnError) {
  for (const char* value : {"128", "128x", "128x64/", "128x64/9", "32x32", "128x64 ", "128x64/2x", "axb",
                            "-64x64", "mma:", "wmma:64x64", "mma:wgmma:64x64"}) {
    const ScopedTile scope(value);
    try {
      tile_from_environment();
      ADD_FAILURE() << value;
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(
          error.what(),
          std::string(
              "ADPDM_CUDA_TILE: wanted ROWSxOUTPUTS or ROWSxOUTPUTS/SPLITS, with mma: or wgmma: before it or "
              "without, a tile of 64x64, 128x64, 128x128, 128x160, 128x256 and at most 8 splits, got '") +
              value + "'");
    }
  }
}

}  // namespace
}  // namespace adpdm::cuda
