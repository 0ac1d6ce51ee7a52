// conv2d on the CPU: literal cases, and random shapes against the definition on every instruction set.
#include "core/conv2d.h"

#include <gtest/gtest.h>

#include <random>
#include <utility>
#include <vector>

#include "core/float_convert.h"
#include "igemm_level.h"
#include "igemm_problem.h"
#include "scattered_threads.h"

namespace adpdm {
namespace {

using testing::igemm_levels;
using testing::IgemmLevel;
using testing::SegmentData;

struct Shape {
  int64_t batch;
  std::vector<int64_t> channels;  // of each segment
  Size2d input;
  int64_t out_channels;
  Size2d kernel{3, 3};
  Size2d stride{1, 1};
  Size2d padding{1, 1};
  Size2d dilation{1, 1};
  int64_t groups = 1;
};

struct Problem {
  Conv2dArgs args{};
  std::vector<SegmentData> segments;
  std::vector<float> bias;
};

Problem random_problem(const Shape& shape, int weight_bits, uint32_t seed, bool unit_scales = false) {
  std::mt19937 random(seed);
  Problem problem;
  for (int64_t channels : shape.channels) {
    problem.segments.push_back(testing::random_segment(
        random, shape.batch * shape.input.height * shape.input.width, channels, shape.out_channels,
        shape.kernel.height * shape.kernel.width, shape.groups, weight_bits, unit_scales));
  }
  std::uniform_real_distribution<float> bias(-1.0f, 1.0f);
  for (int64_t o = 0; o < shape.out_channels; ++o) problem.bias.push_back(unit_scales ? 0.0f : bias(random));
  Conv2dArgs& args = problem.args;
  args.num_segments = static_cast<int>(shape.channels.size());
  args.batch = shape.batch;
  args.out_channels = shape.out_channels;
  args.input = shape.input;
  args.kernel = shape.kernel;
  args.stride = shape.stride;
  args.padding = args.padding_end = shape.padding;
  args.upsample = 1;
  args.dilation = shape.dilation;
  args.groups = shape.groups;
  args.weight_bits = weight_bits;
  args.out.height = conv_out_size(shape.input.height + 2 * shape.padding.height, shape.kernel.height,
                                  shape.stride.height, shape.dilation.height);
  args.out.width = conv_out_size(shape.input.width + 2 * shape.padding.width, shape.kernel.width,
                                 shape.stride.width, shape.dilation.width);
  return problem;
}

// Runs the operator; elements beyond the output keep their guard value.
template <typename T>
std::vector<T> run(Problem& problem, const IgemmLevel& level, FloatType type, T guard) {
  const testing::ScopedLevel scope(level);
  Conv2dArgs& args = problem.args;
  for (int s = 0; s < args.num_segments; ++s) args.segments[s] = problem.segments[s].segment();
  const int64_t size = args.batch * args.out.height * args.out.width * args.out_channels;
  std::vector<T> output(size + 64, guard);
  args.output = plain_output(problem.bias.data(), output.data(), type);
  cpu::conv2d(args);
  for (int64_t i = size; i < size + 64; ++i) EXPECT_EQ(output[i], guard) << "written beyond the output";
  output.resize(size);
  return output;
}

void expect_matches_definition(const Shape& shape, int weight_bits, uint32_t seed) {
  Problem problem = random_problem(shape, weight_bits, seed);
  problem.args.output = plain_output(problem.bias.data(), nullptr, FloatType::kFloat32);
  const std::vector<float> wanted = testing::naive_conv2d(problem.args, problem.segments);
  for (const IgemmLevel& level : igemm_levels()) {
    EXPECT_EQ(run<float>(problem, level, FloatType::kFloat32, -7.0f), wanted) << level.name;
  }
}

TEST(Conv2d, HandComputedWithHalo) {
  // One channel, 1x2 image of codes {3, 5}, zero-point 1: real values {2, 4} * 0.5. Kernel 1x3 of codes {1,
  // 2, -1}, weight scale 0.25, bias 1. Left: 0*1 + 2*2 - 4 = 0; right: 2*1 + 4*2 - 0 = 10; times 0.125
  // plus 1.
  SegmentData data{};
  data.codes = {3, 5};
  data.weight_codes = {1, 2, -1};
  data.weight_scale = {0.25f};
  data.scale = {9.0f, 0.5f};
  data.zero_point = {9, 1};
  data.group_index = 1;
  data.channels = 1;
  testing::pack(data, 1, 3, 1, 8);
  Problem problem;
  problem.segments = {data};
  problem.bias = {1.0f};
  problem.args.num_segments = 1;
  problem.args.batch = 1;
  problem.args.out_channels = 1;
  problem.args.input = problem.args.out = {1, 2};
  problem.args.kernel = {1, 3};
  problem.args.stride = problem.args.dilation = {1, 1};
  problem.args.padding = problem.args.padding_end = {0, 1};
  problem.args.upsample = 1;
  problem.args.groups = 1;
  problem.args.weight_bits = 8;
  for (const IgemmLevel& level : igemm_levels()) {
    EXPECT_EQ(run<float>(problem, level, FloatType::kFloat32, 0.0f), (std::vector<float>{1.0f, 2.25f}));
  }
}

TEST(Conv2d, MatchesDefinitionForEveryWeightWidth) {
  for (int bits = 2; bits <= 8; ++bits) expect_matches_definition({2, {20}, {5, 7}, 24}, bits, 10 + bits);
}

TEST(Conv2d, MatchesDefinitionForEveryTileShape) {
  for (int64_t outputs : {1, 16, 17, 33, 48, 64, 80, 112, 130}) {
    for (int64_t width = 1; width <= 13; ++width) {
      const int bits = width % 2 ? 8 : 4;
      const auto seed = static_cast<uint32_t>(outputs * 16 + width);
      expect_matches_definition({1, {12}, {1, width}, outputs, {1, 1}, {1, 1}, {0, 0}}, bits, seed);
    }
  }
}

TEST(Conv2d, MatchesDefinitionForOddShapes) {
  const Shape shapes[] = {
      {1, {1}, {9, 5}, 3},                                        // one channel
      {3, {4}, {1, 1}, 5},                                        // 1x1 image, kernel larger than the image
      {1, {6}, {2, 3}, 7, {5, 7}, {1, 1}, {3, 2}},                // asymmetric, kernel larger
      {2, {8}, {11, 6}, 16, {3, 2}, {2, 3}, {1, 0}},              // strides
      {1, {16}, {12, 9}, 20, {3, 3}, {1, 2}, {2, 4}, {2, 3}},     // dilation
      {1, {8}, {6, 6}, 16, {2, 2}, {2, 2}, {0, 0}},               // no copy, two tap rows
      {2, {12}, {5, 4}, 18, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 3},   // groups
      {1, {10}, {6, 5}, 20, {3, 3}, {2, 1}, {0, 1}, {1, 2}, 10},  // depthwise with multiplier
      {2, {20}, {7, 9}, 20, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 20},  // depthwise, a tail of channels
      {1, {16}, {5, 6}, 16, {5, 3}, {2, 1}, {2, 1}, {1, 2}, 16},  // depthwise, all that geometry has
      {2, {130}, {3, 30}, 130, {3, 3}, {1, 1}, {0, 1}, {1, 1}, 130},  // several tiles of it
      {1, {3}, {4, 4}, 3, {7, 7}, {1, 1}, {3, 3}, {1, 1}, 3},    // depthwise, kernel larger than the image
      {1, {64}, {4, 4}, 32, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 2},  // groups without copy
      {2, {16, 8}, {5, 5}, 40},                                  // two segments
      {1, {13, 70}, {4, 7}, 65, {3, 1}, {2, 1}, {1, 0}},         // two segments, tails everywhere
      {1, {300}, {3, 3}, 16},                                    // more than one chunk of widened weights
      {1, {400}, {2, 3}, 16},                                    // a row of taps is more than one chunk
      {1, {128}, {5, 5}, 16, {3, 3}, {1, 1}, {2, 2}, {2, 2}},    // a chunk ends within a row of taps
  };
  uint32_t seed = 100;
  for (const Shape& shape : shapes) {
    for (int bits : {8, 4}) expect_matches_definition(shape, bits, ++seed);
  }
}

TEST(Conv2d, MatchesDefinitionInPanelsOfEachGroup) {
  expect_matches_definition({2, {2048}, {15, 16}, 256, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 2}, 8, 77);
}

TEST(Conv2d, MatchesDefinitionWhereWinogradRuns) {
  const Shape shapes[] = {
      {1, {16}, {2, 2}, 16},        // one tile of 2x2
      {1, {32}, {4, 4}, 16},        // one of 4x4
      {1, {32}, {4, 4}, 40},        // the second slab of two blocks is one, and a tail
      {2, {32, 64}, {8, 12}, 33},   // two segments, tiles of several rows and images
      {1, {256, 224}, {4, 8}, 16},  // more channels than one slice, exactly one slice
      {1, {32}, {4, 72}, 16},       // more tiles in a row than a batch
      {1, {32}, {36, 40}, 32},      // more than an item
      {2, {16}, {4, 6}, 20},        // tiles of several rows together, a tail of outputs
      {1, {32, 16}, {6, 10}, 33},   // 2x2: two segments, more tiles than are multiplied at once
      {3, {48}, {4, 34}, 17},       // more than one row of tiles at once
      {3, {640}, {16, 48}, 16},     // passes end within images
      {1, {16}, {6, 6}, 16, {3, 3}, {1, 1}, {0, 0}},  // no copy
      {1, {16}, {5, 6}, 16},                          // not: an odd number of rows
      {1, {16}, {8, 8}, 16, {3, 3}, {1, 2}},          // not: stride
      {1, {16}, {8, 8}, 16, {3, 3}, {2, 1}},
      {1, {16}, {8, 8}, 16, {3, 3}, {1, 1}, {2, 2}, {2, 1}},    // not: dilation
      {2, {32}, {16, 16}, 16, {3, 3}, {2, 2}, {2, 2}, {2, 2}},  // stride and dilation alike
  };
  uint32_t seed = 200;
  for (const Shape& shape : shapes) {
    for (int bits : {8, 5, 4}) expect_matches_definition(shape, bits, ++seed);
  }
}

TEST(Conv2d, HalfTypesAreRoundedFloat32) {
  Problem problem = random_problem({1, {24}, {6, 6}, 35}, 8, 5);
  for (const IgemmLevel& level : igemm_levels()) {
    const std::vector<float> exact = run<float>(problem, level, FloatType::kFloat32, 0.0f);
    const std::vector<uint16_t> bfloat = run<uint16_t>(problem, level, FloatType::kBFloat16, 0x1234);
    const std::vector<uint16_t> half = run<uint16_t>(problem, level, FloatType::kFloat16, 0x1234);
    for (size_t i = 0; i < exact.size(); ++i) {
      ASSERT_EQ(bfloat[i], float_to_bf16(exact[i])) << level.name;
      ASSERT_EQ(half[i], float_to_f16(exact[i])) << level.name;
    }
  }
}

TEST(Conv2d, HalfTypesRoundExtremesOnEveryIsa) {
  // The bias alone is the output: subnormals, ties, overflow, infinity, NaN.
  const std::vector<float> values = {
      1e-40f,  3e-8f,  5.9604645e-8f, 6.1e-5f,   1.0009766f, 1.00048828125f, 1.00390625f, 65519.0f, 65520.0f,
      3.4e38f, -2e-8f, INFINITY,      -INFINITY, NAN,        -0.0f,          0.1f};
  Problem problem = random_problem({1, {4}, {1, 1}, 16}, 8, 6);
  std::fill(problem.segments[0].codes.begin(), problem.segments[0].codes.end(), int8_t{0});
  problem.segments[0].zero_point[1] = 0;
  problem.bias = values;
  for (const IgemmLevel& level : igemm_levels()) {
    const std::vector<uint16_t> bfloat = run<uint16_t>(problem, level, FloatType::kBFloat16, 0);
    const std::vector<uint16_t> half = run<uint16_t>(problem, level, FloatType::kFloat16, 0);
    for (size_t i = 0; i < values.size(); ++i) {
      const float sum = values[i] + 0.0f;  // -0 + 0 * scale is +0
      EXPECT_EQ(bfloat[i], float_to_bf16(sum)) << level.name << " " << values[i];
      EXPECT_EQ(half[i], float_to_f16(sum)) << level.name << " " << values[i];
    }
  }
}

TEST(Conv2d, LargestReductionDoesNotOverflow) {
  // K = kMaxReduction, every product at its extreme: (127 - -128) * -128.
  Problem problem = random_problem({1, {kMaxReduction}, {1, 1}, 1, {1, 1}, {1, 1}, {0, 0}}, 8, 3, true);
  SegmentData& data = problem.segments[0];
  std::fill(data.codes.begin(), data.codes.end(), int8_t{127});
  std::fill(data.weight_codes.begin(), data.weight_codes.end(), int8_t{-128});
  data.zero_point[1] = -128;
  testing::pack(data, 1, 1, 1, 8);
  const auto wanted = static_cast<float>(-255 * 128 * kMaxReduction);
  for (const IgemmLevel& level : igemm_levels()) {
    EXPECT_EQ(run<float>(problem, level, FloatType::kFloat32, 0.0f), std::vector<float>{wanted});
  }
}

TEST(Conv2d, LargestWinogradSumDoesNotOverflow) {
  // Just below and above the numbers of channels up to which results of 2x2 and of 4x4 tiles fit 32 bits.
  const Size2d small{4, 4}, large{6, 6};  // without padding, 2x2 and 4x4 outputs
  struct Case {
    int64_t channels;
    Size2d input;
    int weight;
  };
  const Case cases[] = {{3632, small, -128}, {3648, small, -128}, {224, large, -128},
                        {256, large, -128},  {256, large, -113},  {256, large, -114}};
  for (const auto& [channels, input, weight] : cases) {
    for (int8_t code : {int8_t{127}, int8_t{-128}}) {
      Problem problem = random_problem({1, {channels}, input, 1, {3, 3}, {1, 1}, {0, 0}}, 8, 3, true);
      SegmentData& data = problem.segments[0];
      std::fill(data.codes.begin(), data.codes.end(), code);
      std::fill(data.weight_codes.begin(), data.weight_codes.end(), static_cast<int8_t>(weight));
      data.zero_point[1] = code > 0 ? -128 : 127;
      testing::pack(data, 1, 9, 1, 8);
      const auto wanted = static_cast<float>((code - data.zero_point[1]) * weight * 9 * channels);
      const auto outputs = static_cast<size_t>((input.height - 2) * (input.width - 2));
      for (const IgemmLevel& level : igemm_levels()) {
        EXPECT_EQ(run<float>(problem, level, FloatType::kFloat32, 0.0f), std::vector<float>(outputs, wanted))
            << level.name << ", " << channels << " channels of " << weight;
      }
    }
  }
}

TEST(Conv2d, LargestWinogradPointsDoNotOverflow) {
  // Signs that make each point of a 4x4 tile as large as it gets: those of products of rows of B^T, and of G.
  const int rows[6][6] = {{1, 0, -1, 0, 1, 0},  {0, 1, 1, -1, -1, 0}, {0, -1, 1, 1, -1, 0},
                          {0, -1, -1, 1, 1, 0}, {0, 1, -1, -1, 1, 0}, {0, 1, 0, -1, 0, 1}};
  const int taps[6][3] = {{1, 1, 1}, {1, 1, 1}, {1, -1, 1}, {1, 1, 1}, {1, -1, 1}, {1, 1, 1}};
  for (int point = 0; point < 36; ++point) {
    Problem problem = random_problem({1, {224}, {6, 6}, 1, {3, 3}, {1, 1}, {0, 0}}, 8, 3, true);
    SegmentData& data = problem.segments[0];
    for (size_t i = 0; i < data.codes.size(); ++i) {
      const auto pixel = i / 224;
      data.codes[i] = rows[point / 6][pixel / 6] * rows[point % 6][pixel % 6] > 0 ? -128 : 127;
    }
    for (size_t i = 0; i < data.weight_codes.size(); ++i) {
      const auto tap = i % 9;
      data.weight_codes[i] = taps[point / 6][tap / 3] * taps[point % 6][tap % 3] > 0 ? -128 : 127;
    }
    testing::pack(data, 1, 9, 1, 8);
    const std::vector<float> wanted =
        run<float>(problem, {"portable", cpu::Isa::kPortable, nullptr}, FloatType::kFloat32, 0.0f);
    for (const IgemmLevel& level : igemm_levels()) {
      EXPECT_EQ(run<float>(problem, level, FloatType::kFloat32, 0.0f), wanted) << level.name << " " << point;
    }
  }
}

TEST(Conv2d, SumsOfNarrowWeightsDoNotSaturate) {
  // Every product of a pair, and of all pairs added in 16 bits, at its extreme: (127 + 128) * quant_min.
  for (int bits = 2; bits <= 8; ++bits) {
    const CodeRange range = signed_range(bits);
    for (int weight : {range.quant_min, range.quant_max}) {
      Problem problem = random_problem({1, {300}, {1, 5}, 1, {1, 1}, {1, 1}, {0, 0}}, bits, 4, true);
      SegmentData& data = problem.segments[0];
      std::fill(data.codes.begin(), data.codes.end(), int8_t{127});
      std::fill(data.weight_codes.begin(), data.weight_codes.end(), static_cast<int8_t>(weight));
      data.zero_point[1] = 5;
      testing::pack(data, 1, 1, 1, bits);
      const auto wanted = static_cast<float>((127 - 5) * weight * 300);
      for (const IgemmLevel& level : igemm_levels()) {
        EXPECT_EQ(run<float>(problem, level, FloatType::kFloat32, 0.0f), std::vector<float>(5, wanted))
            << level.name << ", " << bits << " bits, weights " << weight;
      }
    }
  }
}

TEST(Conv2d, EmptyBatchDoesNothing) {
  Problem problem = random_problem({0, {4}, {3, 3}, 8}, 8, 1);
  for (const IgemmLevel& level : igemm_levels())
    EXPECT_TRUE(run<float>(problem, level, FloatType::kFloat32, 0.0f).empty());
}

TEST(Conv2d, WorkSplitDoesNotChangeResults) {
  Problem problem = random_problem({2, {64, 12}, {16, 16}, 96}, 8, 9);
  for (const IgemmLevel& level : igemm_levels()) {
    const std::vector<float> serial = run<float>(problem, level, FloatType::kFloat32, 0.0f);
    const testing::ScatteredThreads threads;
    EXPECT_EQ(run<float>(problem, level, FloatType::kFloat32, 0.0f), serial) << level.name;
  }
}

}  // namespace
}  // namespace adpdm
