// The AMX kernel on emulated tiles: the bits of the portable kernel on random layers, and how it uses the
// tiles. Its literal cases and those of every epilogue are in the tests of conv2d, linear and igemm_epilogue.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "cpu/amx_emulation.h"
#include "cpu/pixel_walk.h"
#include "elementwise_cases.h"
#include "igemm_case.h"
#include "igemm_level.h"
#include "scattered_threads.h"

namespace adpdm::testing {
namespace {

const IgemmLevel kPortable{"portable", cpu::Isa::kPortable, nullptr};
const IgemmLevel kEmulated{"amx emulated", cpu::Isa::kPortable, &cpu::amx_emulated::strip_kernel};

// Float32 results, bias added.
std::vector<float> run(const HostCase& host, const IgemmLevel& level) {
  const ScopedLevel scope(level);
  std::vector<float> result(static_cast<size_t>(host.rows() * host.result_columns()), -7.0f);
  Conv2dArgs args = host.args();
  for (int s = 0; s < args.num_segments; ++s) args.segments[s] = host.segments[s].segment();
  args.output.bias = host.bias.data();
  args.output.data = result.data();
  cpu::conv2d(args);
  return result;
}

void expect_portable_bits(const Layer& layer, uint32_t seed) {
  const HostCase host = random_case(layer, {}, seed);
  EXPECT_EQ(run(host, kEmulated), run(host, kPortable)) << "seed " << seed;
}

Layer linear_layer(int64_t rows, std::vector<int64_t> features, int64_t outputs, int weight_bits = 8) {
  Layer layer;
  layer.input = {1, rows};
  layer.channels = std::move(features);
  layer.out_channels = outputs;
  layer.kernel = {1, 1};
  layer.padding = layer.padding_end = {0, 0};
  layer.weight_bits = weight_bits;
  return layer;
}

Layer conv_layer(int64_t channels, Size2d input, int64_t outputs, int weight_bits = 8) {
  Layer layer;
  layer.channels = {channels};
  layer.input = input;
  layer.out_channels = outputs;
  layer.weight_bits = weight_bits;
  return layer;
}

Layer random_layer(std::mt19937& random) {
  const auto pick = [&](std::vector<int64_t> values) { return values[random() % values.size()]; };
  Layer layer;
  layer.batch = pick({1, 1, 2, 3});
  layer.groups = pick({1, 1, 1, 2, 5});
  layer.channels = {layer.groups * pick({1, 4, 7, 8, 36, 64, 68, 72, 100, 128, 132})};
  if (layer.groups == 1 && random() % 3 == 0) layer.channels.push_back(pick({3, 16, 64, 76}));
  layer.out_channels = layer.groups * pick({1, 8, 16, 17, 32, 40, 64});
  layer.kernel = {pick({1, 2, 3}), pick({1, 2, 3, 4})};
  layer.stride = {pick({1, 1, 2}), pick({1, 1, 2, 3})};
  layer.dilation = {pick({1, 1, 2}), pick({1, 1, 2})};
  layer.padding = {pick({0, 1}), pick({0, 1, 2})};
  layer.padding_end = {pick({0, 1}), pick({0, 1, 2})};
  layer.upsample = pick({1, 1, 2});
  layer.input = {pick({4, 5, 8, 11}), pick({7, 8, 16, 19})};
  layer.weight_bits = static_cast<int>(pick({3, 4, 8}));
  return layer;
}

TEST(IgemmAmx, GivesThePortableBitsOnRandomLayers) {
  std::mt19937 random(5);
  for (uint32_t seed = 0; seed < 120; ++seed) expect_portable_bits(random_layer(random), seed);
}

// Every number of channels around whole steps, in place, so that a read beyond a tap is one beyond the codes.
TEST(IgemmAmx, ReadsNothingBeyondTheCodes) {
  uint32_t seed = 1;
  for (int bits : {4, 8}) {
    for (int64_t features = 8; features <= 208; features += 8) {
      for (int64_t rows : {1, 15, 17, 33})
        expect_portable_bits(linear_layer(rows, {features}, 20, bits), ++seed);
    }
  }
}

TEST(IgemmAmx, CoversEveryNumberOfPixelsAndOutputs) {
  uint32_t seed = 1000;
  for (int64_t rows = 1; rows <= 70; rows += 3) {
    for (int64_t outputs : {1, 16, 31, 33, 64, 80}) {
      expect_portable_bits(linear_layer(rows, {72, 64}, outputs, outputs % 2 ? 4 : 8), ++seed);
    }
  }
}

// 640 kB of codes: two chunks, each over all slabs of outputs.
TEST(IgemmAmx, GivesThePortableBitsWhereTheInputIsCutIntoChunks) {
  expect_portable_bits(linear_layer(10001, {64}, 100), 7);
  expect_portable_bits(linear_layer(10001, {64}, 100, 4), 8);
}

TEST(IgemmAmx, EveryThreadConfiguresItsOwnTiles) {
  Layer layer = conv_layer(128, {16, 16}, 160);
  layer.batch = 2;
  const HostCase host = random_case(layer, {}, 3);
  const std::vector<float> serial = run(host, kEmulated);
  const int64_t before = cpu::amx_emulation::this_thread().counts.products;
  {
    const testing::ScatteredThreads threads;
    EXPECT_EQ(run(host, kEmulated), serial);
  }
  EXPECT_EQ(cpu::amx_emulation::this_thread().counts.products, before) << "wanted work in other threads only";
}

cpu::amx_emulation::Counts counts_of(const Layer& layer) {
  cpu::amx_emulation::Counts& counts = cpu::amx_emulation::this_thread().counts;
  counts = {};
  run(random_case(layer, {}, 1), kEmulated);
  return counts;
}

// Products that a layer would need if all pixels, outputs and channels came in whole tiles.
int64_t least_products(int64_t pixels, int64_t outputs, int64_t channels) {
  return pixels * outputs * channels / (16 * 16 * 64);
}

TEST(IgemmAmx, LoadsOnceForEveryProduct) {
  // 3x3, 64 -> 64 at 32x32: whole tiles everywhere, one shape of tiles for the whole convolution.
  cpu::amx_emulation::Counts counts = counts_of(conv_layer(64, {32, 32}, 64));
  EXPECT_EQ(counts.products, least_products(32 * 32, 64, 9 * 64));
  EXPECT_EQ(counts.loads, counts.products);
  EXPECT_EQ(counts.configurations, 1);
  // At 8x8 one row of 10 positions holds 8 pixels: 78 positions, 5 runs instead of 4. The last run is alone
  // and shorter, hence two shapes in each of two slabs.
  counts = counts_of(conv_layer(64, {8, 8}, 64));
  EXPECT_EQ(counts.products, least_products(80, 64, 9 * 64));
  EXPECT_EQ(counts.configurations, 4);
}

TEST(IgemmAmx, JoinsTapsAndOverlapsTheLastStep) {
  // 96 channels: a row of taps is 288 bytes, 5 steps instead of 3 * 2.
  EXPECT_EQ(counts_of(conv_layer(96, {16, 16}, 32)).products, least_products(256, 32, 3 * 5 * 64));
  // 4-bit weights are unpacked, which changes no product.
  EXPECT_EQ(counts_of(conv_layer(96, {16, 16}, 32, 4)).products, least_products(256, 32, 3 * 5 * 64));
}

TEST(IgemmAmx, FewPixelsAreLeftToTiles) {
  const cpu::StripKernel* kernel = cpu::strip_kernel_of(cpu::Isa::kAmx);
  if (!kernel || !cpu::cpu_supports(cpu::Isa::kAmx)) GTEST_SKIP() << "wanted a CPU with AMX";
  const cpu::ScopedIsa scope(cpu::Isa::kAmx);
  EXPECT_EQ(cpu::select_strip_kernel(kernel->min_pixels - 1), nullptr);
  EXPECT_EQ(cpu::select_strip_kernel(kernel->min_pixels), kernel);
}

// A problem of which only the geometry is set.
cpu::Igemm geometry(Size2d out, int64_t column_step, int64_t row_step, int64_t image_step) {
  cpu::Igemm problem{};
  problem.images = 3;
  problem.rows = out.height;
  problem.columns = out.width;
  problem.tile.num_segments = 1;
  problem.inputs[0].column_step = column_step;
  problem.inputs[0].row_step = row_step;
  problem.inputs[0].image_step = image_step;
  return problem;
}

TEST(PixelWalk, RunsGoOnOverTheHalo) {
  // Rows of 6 pixels in 8 positions, images of 2 rows in 4.
  const cpu::Igemm problem = geometry({2, 6}, 4, 32, 128);
  cpu::PixelWalk walk(problem, 3);
  cpu::PixelRun<16> run;
  walk.next(100, run);
  EXPECT_EQ(run.column, 3);
  EXPECT_EQ(run.rows, 11);  // 3 pixels, 2 of the halo, 6 pixels; the next image is 18 positions on
  EXPECT_EQ(std::vector<int>(run.at, run.at + run.num_pixels),
            (std::vector<int>{0, 1, 2, 5, 6, 7, 8, 9, 10}));
  walk.next(4, run);
  EXPECT_EQ(run.image, 1);
  EXPECT_EQ(run.row, 0);
  EXPECT_EQ(run.rows, 4);
  EXPECT_EQ(run.num_pixels, 4);
}

TEST(PixelWalk, RunsEndWhereTheGridDoes) {
  // Steps of 8 bytes, rows 36 apart: not on the grid.
  const cpu::Igemm problem = geometry({2, 4}, 8, 36, 72);
  cpu::PixelWalk walk(problem, 0);
  cpu::PixelRun<16> run;
  walk.next(100, run);
  EXPECT_EQ(run.num_pixels, 4);
  walk.next(100, run);
  EXPECT_EQ(run.row, 1);
  EXPECT_EQ(run.num_pixels, 4);
}

TEST(PixelWalk, RunsEndWhereSegmentsHaveDifferentHalos) {
  cpu::Igemm problem = geometry({2, 4}, 8, 40, 80);
  problem.tile.num_segments = 2;
  problem.inputs[1] = problem.inputs[0];
  cpu::PixelRun<16> run;
  cpu::PixelWalk(problem, 0).next(8, run);
  EXPECT_EQ(run.rows, 9);
  problem.inputs[1].row_step += 8;
  cpu::PixelWalk(problem, 0).next(8, run);
  EXPECT_EQ(run.rows, 4);
}

}  // namespace
}  // namespace adpdm::testing
