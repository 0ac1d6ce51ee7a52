// What follows the sum of conv2d and linear on the CPU, and upsampling and one-sided padding before it: bit
// for bit as defined, on every instruction set.
#include <gtest/gtest.h>

#include <vector>

#include "elementwise_cases.h"
#include "igemm_case.h"
#include "igemm_level.h"
#include "scattered_threads.h"

namespace adpdm::testing {
namespace {

// A case with all pointers set, and the room for its result between guard bytes.
class CpuCase {
 public:
  explicit CpuCase(const HostCase& host)
      : host_(host),
        residual_(stored_as(host.residual, host.epilogue.residual.value_or(FloatType::kFloat32))),
        result_(static_cast<size_t>(host.rows() * host.result_columns() * element_bytes() + kGuard), 0x5a) {}

  std::vector<uint32_t> conv2d(const IgemmLevel& level) {
    return run(level, [&] { cpu::conv2d(args()); });
  }

  std::vector<uint32_t> linear(const IgemmLevel& level) {
    const Conv2dArgs conv = args();
    LinearArgs linear{};
    std::copy(conv.segments, conv.segments + kMaxSegments, linear.segments);
    linear.num_segments = conv.num_segments;
    linear.output = conv.output;
    linear.rows = host_.rows();
    linear.rows_per_image = conv.out.width;
    linear.out_features = conv.out_channels;
    linear.weight_bits = conv.weight_bits;
    return run(level, [&] { cpu::linear(linear); });
  }

 private:
  static constexpr int64_t kGuard = 64;

  int64_t element_bytes() const {
    return host_.epilogue.num_bits > 0 ? 1 : host_.epilogue.type == FloatType::kFloat32 ? 4 : 2;
  }

  Conv2dArgs args() {
    Conv2dArgs args = host_.args();
    for (int s = 0; s < args.num_segments; ++s) args.segments[s] = host_.segments[s].segment();
    IgemmOutput& output = args.output;
    output.bias = host_.bias.empty() ? nullptr : host_.bias.data();
    output.row_scale = host_.row_scale.empty() ? nullptr : host_.row_scale.data();
    output.row_bias = host_.row_bias.empty() ? nullptr : host_.row_bias.data();
    output.residual = residual_.empty() ? nullptr : residual_.data();
    output.qparams = {host_.next_scale.data(), host_.next_zero.data(), &host_.next_group,
                      static_cast<int64_t>(host_.next_scale.size())};
    output.data = result_.data();
    return args;
  }

  template <typename Op>
  std::vector<uint32_t> run(const IgemmLevel& level, Op&& op) {
    const ScopedLevel scope(level);
    std::fill(result_.begin(), result_.end(), uint8_t{0x5a});
    op();
    const auto size = static_cast<size_t>(element_bytes());
    std::vector<uint32_t> bits((result_.size() - kGuard) / size);
    for (size_t i = 0; i < bits.size(); ++i) std::memcpy(&bits[i], result_.data() + i * size, size);
    for (size_t i = bits.size() * size; i < result_.size(); ++i) {
      EXPECT_EQ(result_[i], 0x5a) << "written beyond the output";
    }
    return bits;
  }

  const HostCase& host_;
  std::vector<uint8_t> residual_;
  std::vector<uint8_t> result_;
};

void expect_as_defined(const Layer& layer, const Epilogue& epilogue, uint32_t seed) {
  const HostCase host = random_case(layer, epilogue, seed);
  const std::vector<uint32_t> expected = expected_results(host);
  const bool is_linear = layer.input.height == 1 && layer.kernel.height == 1 && layer.kernel.width == 1;
  CpuCase cpu_case(host);
  for (const IgemmLevel& level : igemm_levels()) {
    EXPECT_EQ(cpu_case.conv2d(level), expected) << level.name << ", seed " << seed;
    if (!is_linear) continue;
    EXPECT_EQ(cpu_case.linear(level), expected) << level.name << ", seed " << seed;
  }
}

// A linear layer of `images` times `rows` rows.
Layer linear_layer(int64_t images, int64_t rows, std::vector<int64_t> features, int64_t outputs) {
  Layer layer;
  layer.batch = images;
  layer.input = {1, rows};
  layer.channels = std::move(features);
  layer.out_channels = outputs;
  layer.kernel = {1, 1};
  layer.padding = layer.padding_end = {0, 0};
  return layer;
}

// Pixels and outputs with and without tails, one and two segments; all outputs even, as geglu wants.
std::vector<Layer> layers() {
  std::vector<Layer> result;
  for (int64_t outputs : {2, 16, 18, 34, 48, 64, 100}) {
    result.push_back(linear_layer(3, 5, {12}, outputs));
    result.push_back(linear_layer(1, 29, {20, 9}, outputs));
  }
  Layer conv;
  conv.batch = 2;
  conv.channels = {20, 8};
  conv.input = {5, 7};
  conv.out_channels = 40;
  result.push_back(conv);
  conv.weight_bits = 4;
  conv.stride = {2, 1};
  result.push_back(conv);
  Layer winograd;
  winograd.batch = 2;
  winograd.channels = {32, 16};
  winograd.input = {4, 6};
  winograd.out_channels = 40;
  result.push_back(winograd);  // tiles of 2x2
  winograd.channels = {32, 64};
  winograd.input = {8, 12};
  result.push_back(winograd);  // 12 tiles of 4x4
  winograd.weight_bits = 4;
  result.push_back(winograd);
  return result;
}

void expect_everywhere(const Epilogue& epilogue) {
  uint32_t seed = 1;
  for (const Layer& layer : layers()) expect_as_defined(layer, epilogue, ++seed);
}

TEST(IgemmEpilogue, AddsARowBiasPerImage) {
  Epilogue epilogue;
  epilogue.row_bias = true;
  expect_everywhere(epilogue);
  epilogue.bias = false;
  epilogue.type = FloatType::kBFloat16;
  expect_everywhere(epilogue);
}

TEST(IgemmEpilogue, MultipliesByARowScalePerImage) {
  Epilogue epilogue;
  epilogue.row_scale = true;
  expect_everywhere(epilogue);
  epilogue.bias = false;
  epilogue.row_bias = true;
  epilogue.residual = FloatType::kFloat32;  // is not multiplied
  expect_everywhere(epilogue);
}

TEST(IgemmEpilogue, AddsAResidualOfEveryType) {
  for (FloatType residual : kFloatTypes) {
    for (FloatType type : kFloatTypes) {
      Epilogue epilogue;
      epilogue.residual = residual;
      epilogue.type = type;
      expect_everywhere(epilogue);
    }
  }
}

TEST(IgemmEpilogue, ScalesTheSumOfAll) {
  Epilogue epilogue;
  epilogue.row_bias = true;
  epilogue.residual = FloatType::kBFloat16;
  epilogue.output_scale = 0.70710678f;
  expect_everywhere(epilogue);
}

TEST(IgemmEpilogue, AppliesActivations) {
  for (Activation activation :
       {Activation::kSilu, Activation::kGeglu, Activation::kGelu, Activation::kGeluTanh}) {
    for (FloatType type : kFloatTypes) {
      Epilogue epilogue;
      epilogue.activation = activation;
      epilogue.type = type;
      expect_everywhere(epilogue);
      epilogue.row_bias = true;
      epilogue.output_scale = 0.25f;
      expect_everywhere(epilogue);
    }
  }
}

TEST(IgemmEpilogue, QuantizesForTheNextLayer) {
  for (int bits : {2, 4, 8}) {
    for (Activation activation :
         {Activation::kNone, Activation::kSilu, Activation::kGeglu, Activation::kGeluTanh}) {
      Epilogue epilogue;
      epilogue.activation = activation;
      epilogue.num_bits = bits;
      expect_everywhere(epilogue);
    }
  }
  Epilogue epilogue;
  epilogue.row_bias = true;
  epilogue.residual = FloatType::kFloat16;
  epilogue.output_scale = 0.5f;
  epilogue.num_bits = 8;
  expect_everywhere(epilogue);
}

TEST(IgemmEpilogue, WorksWithGroups) {
  Layer layer;
  layer.channels = {12};
  layer.input = {4, 5};
  layer.out_channels = 3 * 21;  // slabs at any output
  layer.groups = 3;
  Epilogue epilogue;
  epilogue.row_bias = true;
  epilogue.residual = FloatType::kBFloat16;
  epilogue.activation = Activation::kSilu;
  for (int bits : {0, 8}) {
    epilogue.num_bits = bits;
    expect_as_defined(layer, epilogue, 7);
  }
}

TEST(IgemmEpilogue, WorksDepthwise) {
  Layer layer;
  layer.batch = 2;
  layer.channels = {70};  // a slab, and a tail of 6 channels
  layer.input = {3, 5};
  layer.out_channels = layer.groups = 70;
  Epilogue epilogue;
  epilogue.row_bias = true;
  epilogue.residual = FloatType::kBFloat16;
  epilogue.activation = Activation::kSilu;
  for (int bits : {0, 8}) {
    for (int64_t upsample : {1, 2}) {
      epilogue.num_bits = bits;
      layer.upsample = upsample;
      expect_as_defined(layer, epilogue, 9);
      layer.weight_bits = 4;
      expect_as_defined(layer, epilogue, 10);
      layer.weight_bits = 8;
    }
  }
}

void expect_any_split(const Layer& layer) {
  Epilogue epilogue;
  epilogue.row_bias = true;
  epilogue.residual = FloatType::kFloat32;
  const HostCase host = random_case(layer, epilogue, 3);
  const std::vector<uint32_t> expected = expected_results(host);
  CpuCase cpu_case(host);
  for (const IgemmLevel& level : igemm_levels()) {
    EXPECT_EQ(cpu_case.conv2d(level), expected) << level.name;
    const testing::ScatteredThreads threads;
    EXPECT_EQ(cpu_case.conv2d(level), expected) << level.name << ", scattered";
  }
}

TEST(IgemmEpilogue, WorkSplitDoesNotChangeResults) {
  Layer layer;
  layer.batch = 2;
  layer.channels = {64};
  layer.input = {16, 16};
  layer.out_channels = 96;
  expect_any_split(layer);
}

TEST(IgemmEpilogue, WorksDepthwiseInEveryForm) {
  Layer layer;
  layer.channels = {84};
  layer.input = {4, 5};
  layer.out_channels = layer.groups = 84;  // the second slab has a tail
  for (bool bias : {false, true}) {
    for (FloatType type : {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16}) {
      Epilogue epilogue;
      epilogue.bias = bias;
      epilogue.type = type;
      epilogue.row_scale = true;
      epilogue.output_scale = 0.5f;
      expect_as_defined(layer, epilogue, 11);
    }
  }
  layer.batch = 2;
  layer.dilation = {2, 2};
  layer.upsample = 2;
  layer.channels = {5};  // rows shorter than a vector
  layer.input = {3, 2};
  layer.out_channels = layer.groups = 5;
  expect_as_defined(layer, {}, 12);
}

TEST(IgemmEpilogue, WorkSplitDoesNotChangeDepthwiseResults) {
  Layer layer;
  layer.batch = 2;
  layer.channels = {96};
  layer.input = {16, 16};
  layer.out_channels = layer.groups = 96;
  expect_any_split(layer);
}

TEST(Conv2dGeometry, UpsamplesWhileReading) {
  Layer layer;
  layer.upsample = 2;
  uint32_t seed = 20;
  layer.batch = 2;
  layer.channels = {32};
  layer.input = {4, 6};  // tiles of 4x4
  layer.out_channels = 18;
  expect_as_defined(layer, {}, ++seed);
  for (Size2d input : {Size2d{1, 1}, Size2d{3, 5}, Size2d{4, 7}}) {
    for (int64_t channels : {1, 6, 16}) {
      for (int bits : {4, 8}) {
        layer.batch = 2;
        layer.input = input;
        layer.channels = {channels, channels + 3};
        layer.out_channels = 18;
        layer.weight_bits = bits;
        expect_as_defined(layer, {}, ++seed);
        layer.channels = {channels, channels};
        expect_as_defined(layer, {}, ++seed);
      }
    }
  }
}

TEST(Conv2dGeometry, UpsamplesWithoutPaddingStridedAndInGroups) {
  Layer layer;
  layer.upsample = 2;
  layer.input = {3, 4};
  layer.out_channels = 20;
  layer.padding = layer.padding_end = {0, 0};
  layer.channels = {8};
  expect_as_defined(layer, {}, 1);
  layer.stride = {2, 3};
  layer.groups = 2;
  expect_as_defined(layer, {}, 2);
}

TEST(Conv2dGeometry, PadsEverySideByItsOwnWidth) {
  Layer layer;
  layer.batch = 2;
  layer.input = {6, 5};
  layer.channels = {8};
  layer.out_channels = 20;
  layer.stride = {2, 2};
  uint32_t seed = 40;
  for (Size2d start : {Size2d{0, 0}, Size2d{2, 0}, Size2d{0, 1}}) {
    for (Size2d end : {Size2d{1, 1}, Size2d{0, 3}, Size2d{2, 0}}) {
      for (int64_t upsample : {1, 2}) {
        layer.padding = start;
        layer.padding_end = end;
        layer.upsample = upsample;
        expect_as_defined(layer, {}, ++seed);
        Layer depthwise = layer;
        depthwise.out_channels = depthwise.groups = 8;
        expect_as_defined(depthwise, {}, seed);
      }
    }
  }
}

}  // namespace
}  // namespace adpdm::testing
