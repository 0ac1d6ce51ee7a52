// linear on the CPU: a literal case, and random shapes against the definition on every instruction set.
#include "core/linear.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "igemm_level.h"
#include "igemm_problem.h"

namespace adpdm {
namespace {

using testing::IgemmLevel;
using testing::SegmentData;

std::vector<float> run(const std::vector<SegmentData>& segments, const float* bias, int64_t rows,
                       int64_t outputs, int weight_bits, const IgemmLevel& level) {
  const testing::ScopedLevel scope(level);
  LinearArgs args{};
  args.num_segments = static_cast<int>(segments.size());
  for (int s = 0; s < args.num_segments; ++s) args.segments[s] = segments[s].segment();
  args.rows = args.rows_per_image = rows;
  args.out_features = outputs;
  args.weight_bits = weight_bits;
  std::vector<float> output(rows * outputs, -7.0f);
  args.output = plain_output(bias, output.data(), FloatType::kFloat32);
  cpu::linear(args);
  return output;
}

std::vector<float> naive(const std::vector<SegmentData>& segments, const float* bias, int64_t rows,
                         int64_t outputs) {
  Conv2dArgs args{};
  args.output = plain_output(bias, nullptr, FloatType::kFloat32);
  args.batch = args.groups = args.upsample = 1;
  args.out_channels = outputs;
  args.input = args.out = {1, rows};
  args.kernel = args.stride = args.dilation = {1, 1};
  return testing::naive_conv2d(args, segments);
}

template <typename Body>
void on_every_level(const Body& body) {
  for (const IgemmLevel& level : testing::igemm_levels()) body(level);
}

TEST(Linear, HandComputedTwoSegments) {
  // Segment 1: codes {1, -2}, zero-point 1, weights {3, 4}: 0*3 - 3*4 = -12, times 0.5 * 2 = -12.
  // Segment 2: code {10}, zero-point 0, weight {7}: 70, times 0.25 * 1 = 17.5. Bias 0.5.
  SegmentData first{};
  first.codes = {1, -2};
  first.weight_codes = {3, 4};
  first.weight_scale = {2.0f};
  first.scale = {0.5f};
  first.zero_point = {1};
  first.channels = 2;
  SegmentData second{};
  second.codes = {10};
  second.weight_codes = {7};
  second.weight_scale = {1.0f};
  second.scale = {8.0f, 0.25f};
  second.zero_point = {3, 0};
  second.group_index = 1;
  second.channels = 1;
  for (int bits : {4, 8}) {
    testing::pack(first, 1, 1, 1, bits);
    testing::pack(second, 1, 1, 1, bits);
    const float bias = 0.5f;
    on_every_level([&](const IgemmLevel& level) {
      EXPECT_EQ(run({first, second}, &bias, 1, 1, bits, level), std::vector<float>{6.0f}) << level.name;
    });
  }
}

TEST(Linear, MatchesDefinitionOnEveryIsa) {
  const int64_t shapes[][3] = {{1, 1, 1},      {1, 256, 64}, {7, 33, 10},  {64, 64, 64},
                               {29, 130, 100}, {3, 4, 257},  {1, 400, 48}, {2, 600, 33}};
  std::mt19937 random(1);
  for (const auto& [rows, features, outputs] : shapes) {
    for (int bits : {3, 8}) {
      const std::vector<SegmentData> segments = {
          testing::random_segment(random, rows, features, outputs, 1, 1, bits, false),
          testing::random_segment(random, rows, features + 5, outputs, 1, 1, bits, false)};
      const std::vector<float> wanted = naive(segments, nullptr, rows, outputs);
      on_every_level([&](const IgemmLevel& level) {
        EXPECT_EQ(run(segments, nullptr, rows, outputs, bits, level), wanted) << level.name;
      });
    }
  }
}

// Three slabs of 64 outputs and more codes than stay in a cache: several panels of tiles, the last one
// smaller.
TEST(Linear, MatchesDefinitionInPanels) {
  std::mt19937 random(3);
  const int64_t rows = 440, features = 1400, outputs = 150;
  for (int bits : {4, 8}) {
    const std::vector<SegmentData> segments = {
        testing::random_segment(random, rows, features, outputs, 1, 1, bits, false)};
    const std::vector<float> wanted = naive(segments, nullptr, rows, outputs);
    on_every_level([&](const IgemmLevel& level) {
      EXPECT_EQ(run(segments, nullptr, rows, outputs, bits, level), wanted) << level.name;
    });
  }
}

TEST(Linear, NoRowsDoesNothing) {
  std::mt19937 random(2);
  const std::vector<SegmentData> segments = {testing::random_segment(random, 0, 8, 4, 1, 1, 8, false)};
  on_every_level(
      [&](const IgemmLevel& level) { EXPECT_TRUE(run(segments, nullptr, 0, 4, 8, level).empty()); });
}

}  // namespace
}  // namespace adpdm
