// Normalisations that end in codes on the CPU: a literal case, the definition in double, and equal codes for
// every instruction set and number of threads.
#include "core/norm_quantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <vector>

#include "core/activation_math.h"
#include "elementwise_cases.h"
#include "scattered_threads.h"

namespace adpdm {
namespace {

using testing::decode;
using testing::encode;
using testing::random_normal;
using testing::supported_isas;

// A normalisation of [images, pixels, channels of all sources]; every image has `groups` groups of channels.
struct Case {
  int64_t images = 1;
  int64_t pixels = 1;
  std::vector<int64_t> channels;
  int64_t groups = 1;
  FloatType type = FloatType::kFloat32;
  bool affine = true;
  bool modulated = false;
  Activation activation = Activation::kNone;
  int num_bits = 8;
  float mean = 0.5f;
};

struct Tensors {
  std::vector<std::vector<uint8_t>> sources;  // as bytes of the type
  std::vector<float> x;                       // [images, pixels, C]: all sources side by side
  std::vector<float> weight, bias, modulation;
  std::vector<float> scale = {1.0f, 0.03f};
  std::vector<int32_t> zero_point = {0, -5};
  int32_t group_index = 1;
  int64_t channels = 0;

  GroupedQParams qparams() const { return {scale.data(), zero_point.data(), &group_index, 2}; }
};

Tensors random_tensors(const Case& c, unsigned seed) {
  Tensors t;
  for (int64_t channels : c.channels) t.channels += channels;
  const int64_t rows = c.images * c.pixels;
  t.x.resize(static_cast<size_t>(rows * t.channels));
  int64_t first = 0;
  for (int64_t channels : c.channels) {
    std::vector<float> values = random_normal(rows * channels, ++seed);
    for (float& value : values) value += c.mean;
    t.sources.push_back(encode(values, c.type));
    values = decode(t.sources.back(), c.type);
    for (int64_t i = 0; i < rows * channels; ++i) {
      t.x[static_cast<size_t>(i / channels * t.channels + first + i % channels)] = values[i];
    }
    first += channels;
  }
  if (c.affine) {
    t.weight = random_normal(t.channels, seed + 100);
    t.bias = random_normal(t.channels, seed + 101);
  }
  if (c.modulated) t.modulation = random_normal(c.images * 2 * t.channels, seed + 102, 0.3f);
  return t;
}

const float* pointer(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

// All but the codes.
GroupNormQuantizeArgs group_norm_args(const Case& c, const Tensors& t) {
  GroupNormQuantizeArgs args{};
  args.num_sources = static_cast<int>(c.channels.size());
  for (int s = 0; s < args.num_sources; ++s) args.sources[s] = {t.sources[s].data(), c.channels[s]};
  args.type = c.type;
  args.batch = c.images;
  args.pixels = c.pixels;
  args.channels = t.channels;
  args.norm_groups = c.groups;
  args.weight = pointer(t.weight);
  args.bias = pointer(t.bias);
  args.modulation = pointer(t.modulation);
  args.eps = 1e-5f;
  args.activation = c.activation;
  args.qparams = t.qparams();
  args.num_bits = c.num_bits;
  return args;
}

std::vector<int8_t> group_norm(const Case& c, const Tensors& t, cpu::Isa isa) {
  const cpu::ScopedIsa scope(isa);
  GroupNormQuantizeArgs args = group_norm_args(c, t);
  std::vector<int8_t> codes(t.x.size() + 16, 99);
  args.codes = codes.data();
  cpu::group_norm_quantize(args);
  for (size_t i = t.x.size(); i < codes.size(); ++i) EXPECT_EQ(codes[i], 99) << "written beyond the output";
  codes.resize(t.x.size());
  return codes;
}

// Rows of one source; images of `pixels` rows.
std::vector<int8_t> layer_norm(const Case& c, const Tensors& t, cpu::Isa isa) {
  const cpu::ScopedIsa scope(isa);
  LayerNormQuantizeArgs args{};
  args.x = t.sources[0].data();
  args.type = c.type;
  args.rows = c.images * c.pixels;
  args.channels = t.channels;
  args.weight = pointer(t.weight);
  args.bias = pointer(t.bias);
  args.modulation = pointer(t.modulation);
  args.rows_per_image = c.pixels;
  args.eps = 1e-5f;
  args.qparams = t.qparams();
  args.num_bits = c.num_bits;
  std::vector<int8_t> codes(t.x.size() + 16, 99);
  args.codes = codes.data();
  cpu::layer_norm_quantize(args);
  for (size_t i = t.x.size(); i < codes.size(); ++i) EXPECT_EQ(codes[i], 99) << "written beyond the output";
  codes.resize(t.x.size());
  return codes;
}

struct Moments {
  double mean, variance;
};

// Of the elements i of x with member(i).
template <typename Member>
Moments moments(const std::vector<float>& x, Member&& member) {
  double sum = 0, squares = 0;
  int64_t count = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!member(static_cast<int64_t>(i))) continue;
    sum += static_cast<double>(x[i]);
    ++count;
  }
  const double mean = sum / static_cast<double>(count);
  for (size_t i = 0; i < x.size(); ++i) {
    const double distance = static_cast<double>(x[i]) - mean;
    if (member(static_cast<int64_t>(i))) squares += distance * distance;
  }
  return {mean, squares / static_cast<double>(count)};
}

// The code of element i, given the moments of its group: the formulas of core/norm_quantize.h in float32.
int8_t expected_code(const Case& c, const Tensors& t, int64_t i, const Moments& m) {
  const int64_t channel = i % t.channels;
  const int64_t image = i / t.channels / c.pixels;
  const auto rstd = static_cast<float>(1.0 / std::sqrt(m.variance + static_cast<double>(1e-5f)));
  const float factor = rstd * (c.affine ? t.weight[channel] : 1.0f);
  const float offset = std::fma(-static_cast<float>(m.mean), factor, c.affine ? t.bias[channel] : 0.0f);
  float y = std::fma(t.x[i], factor, offset);
  if (c.modulated) {
    const float* row = t.modulation.data() + image * 2 * t.channels;
    y = std::fma(y, 1.0f + row[channel], row[t.channels + channel]);
  }
  if (c.activation == Activation::kSilu) y = silu(y);
  const CodeRange range = signed_range(c.num_bits);
  return static_cast<int8_t>(quantize_value(y, 1.0f / t.scale[1], static_cast<float>(t.zero_point[1]),
                                            static_cast<float>(range.quant_min),
                                            static_cast<float>(range.quant_max)));
}

// Codes may differ by one where the order of the sums moves a value over a tie: 1 in 10 000, and one in few.
void expect_codes(const std::vector<int8_t>& codes, const std::vector<int8_t>& expected) {
  ASSERT_EQ(codes.size(), expected.size());
  int64_t different = 0;
  for (size_t i = 0; i < codes.size(); ++i) {
    ASSERT_LE(std::abs(codes[i] - expected[i]), 1) << "at " << i;
    different += codes[i] != expected[i];
  }
  EXPECT_LE(different, 1 + static_cast<int64_t>(codes.size()) / 10000);
}

void expect_group_norm(const Case& c, unsigned seed) {
  const Tensors t = random_tensors(c, seed);
  const int64_t group_channels = t.channels / c.groups;
  const auto group_of = [&](int64_t i) {
    return i / t.channels / c.pixels * c.groups + i % t.channels / group_channels;
  };
  std::vector<Moments> all;
  for (int64_t g = 0; g < c.images * c.groups; ++g) {
    all.push_back(moments(t.x, [&](int64_t i) { return group_of(i) == g; }));
  }
  std::vector<int8_t> expected;
  for (int64_t i = 0; i < static_cast<int64_t>(t.x.size()); ++i) {
    expected.push_back(expected_code(c, t, i, all[group_of(i)]));
  }
  const std::vector<int8_t> portable = group_norm(c, t, cpu::Isa::kPortable);
  expect_codes(portable, expected);
  for (cpu::Isa isa : supported_isas()) EXPECT_EQ(group_norm(c, t, isa), portable) << cpu::isa_name(isa);
}

void expect_layer_norm(const Case& c, unsigned seed) {
  const Tensors t = random_tensors(c, seed);
  std::vector<int8_t> expected;
  for (int64_t row = 0; row < c.images * c.pixels; ++row) {
    const Moments m = moments(t.x, [&](int64_t i) { return i / t.channels == row; });
    for (int64_t channel = 0; channel < t.channels; ++channel) {
      expected.push_back(expected_code(c, t, row * t.channels + channel, m));
    }
  }
  const std::vector<int8_t> portable = layer_norm(c, t, cpu::Isa::kPortable);
  expect_codes(portable, expected);
  for (cpu::Isa isa : supported_isas()) EXPECT_EQ(layer_norm(c, t, isa), portable) << cpu::isa_name(isa);
}

TEST(GroupNormQuantize, HandComputed) {
  // Two pixels, two channels in one group: 1, 3, 5, 7; mean 4, variance 5, so +-3 and +-1 over sqrt(5).
  // Weight 2, bias 1, scale 0.03, zero-point -5: -1.683 -> -56 - 5, 0.1056 -> 4 - 5, 1.894 -> 63 - 5,
  // 3.683 -> 123 - 5.
  Case c;
  c.pixels = 2;
  c.channels = std::vector<int64_t>{2};
  Tensors t = random_tensors(c, 1);
  t.sources[0] = encode({1, 3, 5, 7}, FloatType::kFloat32);
  t.weight = {2, 2};
  t.bias = {1, 1};
  for (cpu::Isa isa : supported_isas()) {
    EXPECT_EQ(group_norm(c, t, isa), (std::vector<int8_t>{-61, -1, 58, 118})) << cpu::isa_name(isa);
  }
}

TEST(GroupNormQuantize, MatchesDefinition) {
  unsigned seed = 0;
  for (FloatType type : testing::kFloatTypes) {
    for (const std::vector<int64_t>& channels :
         std::vector<std::vector<int64_t>>{{4}, {16}, {32}, {48}, {84}, {64, 32}, {20, 12}, {5, 7}}) {
      for (int64_t pixels : {1, 7, 70}) {
        Case c;
        c.images = 2;
        c.pixels = pixels;
        c.channels = channels;
        c.groups = 4;
        c.type = type;
        c.modulated = seed % 2 == 0;
        c.activation = seed % 3 == 0 ? Activation::kNone : Activation::kSilu;
        c.affine = seed % 5 != 0;
        expect_group_norm(c, ++seed * 10);
      }
    }
  }
}

TEST(GroupNormQuantize, KeepsItsPrecisionFarFromZero) {
  // A mean of 100 deviations: plain squares in float32 would lose the fourth digit of the variance, which
  // shows in 1 of 20 codes.
  Case c;
  c.pixels = 500;
  c.channels = std::vector<int64_t>{32};
  c.groups = 4;
  c.mean = 100.0f;
  expect_group_norm(c, 5);
}

TEST(GroupNormQuantize, TakesManyChunksAndRounds) {
  Case c;
  c.images = 3;
  c.pixels = 1500;
  c.channels = std::vector<int64_t>{96, 160};  // 384000 elements an image: one image a round
  c.groups = 32;
  c.activation = Activation::kSilu;
  expect_group_norm(c, 6);
}

TEST(GroupNormQuantize, FewBitsUseTheirRange) {
  Case c;
  c.pixels = 40;
  c.channels = std::vector<int64_t>{16};
  c.num_bits = 4;
  expect_group_norm(c, 7);
}

TEST(GroupNormQuantize, WorkSplitDoesNotChangeCodes) {
  Case c;
  c.images = 2;
  c.pixels = 1024;
  c.channels = std::vector<int64_t>{128};
  c.groups = 32;
  c.activation = Activation::kSilu;
  const Tensors t = random_tensors(c, 8);
  for (cpu::Isa isa : supported_isas()) {
    const std::vector<int8_t> serial = group_norm(c, t, isa);
    const testing::ScatteredThreads threads;
    EXPECT_EQ(group_norm(c, t, isa), serial) << cpu::isa_name(isa);
  }
}

TEST(GroupNormQuantize, NothingToDoAndWrongGroup) {
  Case c;
  c.images = 0;
  c.channels = std::vector<int64_t>{4};
  Tensors t = random_tensors(c, 1);
  for (cpu::Isa isa : supported_isas()) {
    EXPECT_TRUE(group_norm(c, t, isa).empty());
    t.group_index = 2;
    EXPECT_THROW(group_norm(c, t, isa), std::out_of_range);
    t.group_index = 1;
  }
}

TEST(GroupNormQuantizeEach, GivesEachSourceTheCodesOfItsQuantizer) {
  Case c;
  c.images = 2;
  c.pixels = 70;
  c.channels = std::vector<int64_t>{20, 12};
  c.groups = 4;  // the third spans both sources
  c.activation = Activation::kSilu;
  Tensors first = random_tensors(c, 7), second = random_tensors(c, 7);
  second.scale = {1.0f, 0.05f};
  for (cpu::Isa isa : supported_isas()) {
    const std::vector<int8_t> whole[] = {group_norm(c, first, isa), group_norm(c, second, isa)};
    std::vector<int8_t> codes[2];
    const cpu::ScopedIsa scope(isa);
    GroupNormQuantizeArgs args = group_norm_args(c, first);
    NormTarget targets[2];
    for (int s = 0; s < 2; ++s) {
      codes[s].resize(static_cast<size_t>(c.images * c.pixels * c.channels[s]));
      targets[s] = {(s == 0 ? first : second).qparams(), c.num_bits, codes[s].data()};
    }
    cpu::group_norm_quantize_each(args, targets);
    for (int64_t row = 0; row < c.images * c.pixels; ++row) {
      for (int64_t i = 0; i < 32; ++i) {
        const int s = i < 20 ? 0 : 1;
        const int64_t own = row * c.channels[s] + (s == 0 ? i : i - 20);
        EXPECT_EQ(codes[s][own], whole[s][row * 32 + i]) << cpu::isa_name(isa) << " " << row << " " << i;
      }
    }
  }
}

TEST(LayerNormQuantize, MatchesDefinition) {
  unsigned seed = 0;
  for (FloatType type : testing::kFloatTypes) {
    for (int64_t channels : {1, 15, 16, 40, 320, 1100}) {
      for (bool modulated : {false, true}) {
        Case c;
        c.images = 3;
        c.pixels = 4;
        c.channels = std::vector<int64_t>{channels};
        c.type = type;
        c.modulated = modulated;
        c.affine = seed % 3 != 0;
        expect_layer_norm(c, ++seed * 10);
      }
    }
  }
}

TEST(LayerNormQuantize, KeepsItsPrecisionFarFromZero) {
  Case c;
  c.pixels = 20;
  c.channels = std::vector<int64_t>{320};
  c.mean = 100.0f;
  expect_layer_norm(c, 5);
}

}  // namespace
}  // namespace adpdm
