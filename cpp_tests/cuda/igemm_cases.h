// Integer layers on the device beside their definition on the host, shared by the CUDA tests of conv2d and
// linear.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "core/activation_math.h"
#include "core/float_convert.h"
#include "core/quantize.h"
#include "cuda/device_memory.h"
#include "cuda/igemm.h"
#include "igemm_problem.h"

namespace adpdm::testing {

// Runs body as the executor's schedules differ: late and eager copies, several orders of warps. Once on a
// GPU.
inline void on_schedules(int num_seeds, const std::function<void()>& body) {
#ifdef ADPDM_SIMT
  for (int seed = 1; seed <= num_seeds; ++seed) {
    for (bool late : {true, false}) {
      if (!late && seed > 1) continue;
      const simt::ScopedOptions scope({static_cast<uint64_t>(seed), late});
      body();
    }
  }
#else
  (void)num_seeds;
  body();
#endif
}

// Devices whose code paths differ; the current one on a GPU.
inline void on_devices(const std::function<void()>& body) {
#ifdef ADPDM_SIMT
  for (int arch : {80, 90}) {
    cuda::set_emulated_device({arch, 108, 163 * 1024});
    body();
  }
  cuda::set_emulated_device(cuda::kEmulatedA100);
#else
  body();
#endif
}

// A convolution; a linear layer is one of {1, rows} pixels and a 1x1 kernel.
struct Layer {
  int64_t batch = 1;
  std::vector<int64_t> channels;  // of each segment
  Size2d input{1, 1};
  int64_t out_channels = 1;
  Size2d kernel{3, 3};
  Size2d stride{1, 1};
  Size2d padding{1, 1};
  Size2d padding_end{1, 1};
  Size2d dilation{1, 1};
  int64_t groups = 1;
  int64_t upsample = 1;
  int weight_bits = 8;
  int activation_bits = 8;  // 4: codes are packed
};

// What follows the sum; tensors of random values are made where asked for.
struct Epilogue {
  bool bias = true;
  bool row_bias = false;
  std::optional<FloatType> residual;
  float output_scale = 1.0f;
  Activation activation = Activation::kNone;
  int num_bits = 0;
  FloatType type = FloatType::kFloat32;
};

inline uint32_t float_bits_as(float x, FloatType type) {
  return type == FloatType::kFloat32    ? float_to_bits(x)
         : type == FloatType::kBFloat16 ? float_to_bf16(x)
                                        : float_to_f16(x);
}

inline float bits_as_float(uint32_t bits, FloatType type) {
  return type == FloatType::kFloat32    ? bits_to_float(bits)
         : type == FloatType::kBFloat16 ? bf16_to_float(static_cast<uint16_t>(bits))
                                        : f16_to_float(static_cast<uint16_t>(bits));
}

// Values as a tensor of that type.
inline std::vector<uint8_t> stored_as(const std::vector<float>& values, FloatType type) {
  const size_t size = type == FloatType::kFloat32 ? 4 : 2;
  std::vector<uint8_t> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t bits = float_bits_as(values[i], type);
    std::memcpy(bytes.data() + i * size, &bits, size);
  }
  return bytes;
}

// A layer with random operands, on the host.
struct HostCase {
  Layer layer;
  Epilogue epilogue;
  std::vector<SegmentData> segments;
  std::vector<float> bias;         // [O]
  std::vector<float> row_bias;     // [N, O]
  std::vector<float> residual;     // [M, O], representable in its type
  std::vector<float> next_scale;   // [3], of the output's quantizer
  std::vector<int32_t> next_zero;  // [3]
  int32_t next_group = 1;

  Size2d out() const {
    const auto padded = [&](int64_t size, int64_t before, int64_t after) {
      return size * layer.upsample + before + after;
    };
    return {conv_out_size(padded(layer.input.height, layer.padding.height, layer.padding_end.height),
                          layer.kernel.height, layer.stride.height, layer.dilation.height),
            conv_out_size(padded(layer.input.width, layer.padding.width, layer.padding_end.width),
                          layer.kernel.width, layer.stride.width, layer.dilation.width)};
  }
  int64_t rows() const { return layer.batch * out().height * out().width; }
  int64_t taps() const { return layer.kernel.height * layer.kernel.width; }
  int64_t result_columns() const {
    return epilogue.activation == Activation::kGeglu ? layer.out_channels / 2 : layer.out_channels;
  }

  // Everything but pointers.
  Conv2dArgs args() const {
    Conv2dArgs args{};
    args.num_segments = static_cast<int>(segments.size());
    args.batch = layer.batch;
    args.out_channels = layer.out_channels;
    args.upsample = layer.upsample;
    args.input = layer.input;
    args.out = out();
    args.kernel = layer.kernel;
    args.stride = layer.stride;
    args.padding = layer.padding;
    args.padding_end = layer.padding_end;
    args.dilation = layer.dilation;
    args.groups = layer.groups;
    args.weight_bits = layer.weight_bits;
    args.output.output_scale = epilogue.output_scale;
    args.output.activation = epilogue.activation;
    args.output.num_bits = epilogue.num_bits;
    args.output.type = epilogue.type;
    args.output.residual_type = epilogue.residual.value_or(FloatType::kFloat32);
    return args;
  }
};

inline HostCase random_case(const Layer& layer, const Epilogue& epilogue, uint32_t seed) {
  std::mt19937 random(seed);
  HostCase host;
  host.layer = layer;
  host.epilogue = epilogue;
  const int64_t pixels = layer.batch * layer.input.height * layer.input.width;
  for (int64_t channels : layer.channels) {
    SegmentData data = random_segment(random, pixels, channels, layer.out_channels, host.taps(), layer.groups,
                                      layer.weight_bits, false);
    if (layer.activation_bits == 4) {
      for (int8_t& code : data.codes) code = static_cast<int8_t>(code >> 4);
      for (int32_t& zero_point : data.zero_point) zero_point >>= 4;
    }
    host.segments.push_back(data);
  }
  std::uniform_real_distribution<float> value(-2.0f, 2.0f);
  const auto fill = [&](std::vector<float>& values, int64_t size) {
    for (int64_t i = 0; i < size; ++i) values.push_back(value(random));
  };
  if (epilogue.bias) fill(host.bias, layer.out_channels);
  if (epilogue.row_bias) fill(host.row_bias, layer.batch * layer.out_channels);
  if (epilogue.residual) {
    fill(host.residual, host.rows() * layer.out_channels);
    for (float& x : host.residual)
      x = bits_as_float(float_bits_as(x, *epilogue.residual), *epilogue.residual);
  }
  host.next_scale = {0.5f, 0.037f, 2.0f};
  host.next_zero = {1, -3, 0};
  return host;
}

// ---- the definition ----

// Every pixel repeated: what upsampling means.
inline std::vector<int8_t> upsampled(const std::vector<int8_t>& codes, const Layer& layer, int64_t channels) {
  std::vector<int8_t> result;
  const int64_t u = layer.upsample;
  for (int64_t n = 0; n < layer.batch; ++n) {
    for (int64_t y = 0; y < layer.input.height * u; ++y) {
      for (int64_t x = 0; x < layer.input.width * u; ++x) {
        const int64_t pixel = (n * layer.input.height + y / u) * layer.input.width + x / u;
        result.insert(result.end(), codes.begin() + pixel * channels, codes.begin() + (pixel + 1) * channels);
      }
    }
  }
  return result;
}

// The results as bits of the output type, or codes; the sums and their fma chain from the definition.
inline std::vector<uint32_t> expected_results(const HostCase& host) {
  std::vector<SegmentData> segments = host.segments;
  Conv2dArgs args = host.args();
  for (SegmentData& data : segments) data.codes = upsampled(data.codes, host.layer, data.channels);
  args.input = {args.input.height * args.upsample, args.input.width * args.upsample};
  args.output.bias = host.bias.empty() ? nullptr : host.bias.data();
  std::vector<float> y = naive_conv2d(args, segments);
  const int64_t outputs = host.layer.out_channels;
  const int64_t rows_per_image = args.out.height * args.out.width;
  std::vector<uint32_t> results;
  for (size_t i = 0; i < y.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / outputs;
    const int64_t o = static_cast<int64_t>(i) % outputs;
    if (!host.row_bias.empty())
      y[i] += host.row_bias[static_cast<size_t>(row / rows_per_image * outputs + o)];
    if (!host.residual.empty()) y[i] += host.residual[i];
    y[i] *= host.epilogue.output_scale;
    if (host.epilogue.activation == Activation::kSilu) y[i] = silu(y[i]);
    if (host.epilogue.activation == Activation::kGeglu && o % 2 == 0) continue;
    const float result = host.epilogue.activation == Activation::kGeglu ? y[i - 1] * gelu(y[i]) : y[i];
    if (host.epilogue.num_bits == 0) {
      results.push_back(float_bits_as(result, host.epilogue.type));
    } else {
      const CodeRange range = signed_range(host.epilogue.num_bits);
      const auto group = static_cast<size_t>(host.next_group);
      const float code =
          quantize_value(result, 1.0f / host.next_scale[group], static_cast<float>(host.next_zero[group]),
                         static_cast<float>(range.quant_min), static_cast<float>(range.quant_max));
      results.push_back(static_cast<uint8_t>(static_cast<int8_t>(code)));
    }
  }
  return results;
}

// ---- the device ----

// The tensors of a segment on the device.
struct DeviceSegment {
  DeviceSegment(const HostCase& host, const SegmentData& data)
      : codes(stored_codes(host, data)),
        plain_weight(data.weight_codes),
        weight(cuda::packed_weight_bytes(host.layer.out_channels, data.channels / host.layer.groups,
                                         host.taps(), host.layer.weight_bits)),
        weight_scale(data.weight_scale),
        weight_sum(data.weight_sum),
        scale(data.scale),
        zero_point(data.zero_point),
        group_index(std::vector<int32_t>{data.group_index}) {
    cuda::pack_weight(
        {plain_weight.data(), weight.data(), host.layer.out_channels, data.channels / host.layer.groups,
         host.taps(), host.layer.groups, host.layer.weight_bits},
        nullptr);
  }

  // int8, or packed by pixel.
  static std::vector<uint8_t> stored_codes(const HostCase& host, const SegmentData& data) {
    if (host.layer.activation_bits == 8) return {data.codes.begin(), data.codes.end()};
    const int64_t pixels = static_cast<int64_t>(data.codes.size()) / data.channels;
    std::vector<uint8_t> packed(static_cast<size_t>(pixels * int4_row_bytes(data.channels)));
    cpu::pack_int4(data.codes.data(), pixels, data.channels, packed.data());
    return packed;
  }

  DeviceBuffer<uint8_t> codes;
  DeviceBuffer<int8_t> plain_weight;
  DeviceBuffer<uint8_t> weight;
  DeviceBuffer<float> weight_scale;
  DeviceBuffer<int32_t> weight_sum;
  DeviceBuffer<float> scale;
  DeviceBuffer<int32_t> zero_point;
  DeviceBuffer<int32_t> group_index;
};

// A case on the device; the result is poisoned before every run.
class DeviceCase {
 public:
  explicit DeviceCase(const HostCase& host)
      : host_(host),
        bias_(host.bias),
        row_bias_(host.row_bias),
        residual_(stored_as(host.residual, host.epilogue.residual.value_or(FloatType::kFloat32))),
        next_scale_(host.next_scale),
        next_zero_(host.next_zero),
        next_group_(std::vector<int32_t>{host.next_group}),
        result_(host.rows() * host.result_columns() * element_bytes()) {
    for (const SegmentData& data : host.segments) {
      segments_.push_back(std::make_unique<DeviceSegment>(host, data));
    }
  }

  Conv2dArgs args() {
    Conv2dArgs args = host_.args();
    for (size_t s = 0; s < segments_.size(); ++s) {
      DeviceSegment& data = *segments_[s];
      args.segments[s] = {
          reinterpret_cast<const int8_t*>(data.codes.data()),
          host_.segments[s].channels,
          data.weight.data(),
          data.weight_scale.data(),
          data.weight_sum.data(),
          {data.scale.data(), data.zero_point.data(), data.group_index.data(), data.scale.size()}};
    }
    IgemmOutput& output = args.output;
    output.bias = bias_.size() == 0 ? nullptr : bias_.data();
    output.row_bias = row_bias_.size() == 0 ? nullptr : row_bias_.data();
    output.residual = residual_.size() == 0 ? nullptr : residual_.data();
    output.qparams = {next_scale_.data(), next_zero_.data(), next_group_.data(), next_scale_.size()};
    output.data = result_.data();
    return args;
  }

  // The result of conv2d, as bits.
  std::vector<uint32_t> conv2d(const std::optional<cuda::TileChoice>& choice = std::nullopt) {
    const cuda::IgemmPlan plan = cuda::plan_conv2d(args(), host_.layer.activation_bits, choice);
    return run(plan, [&](void* workspace) { cuda::conv2d(args(), plan, workspace, nullptr); });
  }

  // The result of linear, for a layer of {1, rows per image} pixels and a 1x1 kernel.
  std::vector<uint32_t> linear(const std::optional<cuda::TileChoice>& choice = std::nullopt) {
    const Conv2dArgs conv = args();
    LinearArgs linear{};
    std::copy(conv.segments, conv.segments + kMaxSegments, linear.segments);
    linear.num_segments = conv.num_segments;
    linear.output = conv.output;
    linear.rows = host_.rows();
    linear.rows_per_image = conv.out.width;
    linear.out_features = conv.out_channels;
    linear.weight_bits = conv.weight_bits;
    const cuda::IgemmPlan plan = cuda::plan_linear(linear, host_.layer.activation_bits, choice);
    return run(plan, [&](void* workspace) { cuda::linear(linear, plan, workspace, nullptr); });
  }

 private:
  int64_t element_bytes() const {
    return host_.epilogue.num_bits > 0 ? 1 : host_.epilogue.type == FloatType::kFloat32 ? 4 : 2;
  }

  std::vector<uint32_t> run(const cuda::IgemmPlan& plan, const std::function<void(void*)>& op) {
    result_.fill_poison();
    DeviceBuffer<uint8_t> workspace(plan.workspace_bytes);
    op(workspace.data());
    const std::vector<uint8_t> bytes = result_.host();
    const auto size = static_cast<size_t>(element_bytes());
    std::vector<uint32_t> bits(bytes.size() / size);
    for (size_t i = 0; i < bits.size(); ++i) std::memcpy(&bits[i], bytes.data() + i * size, size);
    return bits;
  }

  const HostCase& host_;
  std::vector<std::unique_ptr<DeviceSegment>> segments_;
  DeviceBuffer<float> bias_, row_bias_;
  DeviceBuffer<uint8_t> residual_;
  DeviceBuffer<float> next_scale_;
  DeviceBuffer<int32_t> next_zero_, next_group_;
  DeviceBuffer<uint8_t> result_;
};

// conv2d gives the defined results, bit for bit, under every given choice.
inline void expect_conv2d(const Layer& layer, const Epilogue& epilogue, uint32_t seed,
                          const std::vector<std::optional<cuda::TileChoice>>& choices = {std::nullopt}) {
  const HostCase host = random_case(layer, epilogue, seed);
  const std::vector<uint32_t> expected = expected_results(host);
  DeviceCase device(host);
  for (const std::optional<cuda::TileChoice>& choice : choices) {
    const cuda::IgemmPlan plan = cuda::plan_conv2d(device.args(), layer.activation_bits, choice);
    EXPECT_EQ(device.conv2d(choice), expected) << cuda::describe(plan) << ", seed " << seed;
  }
}

}  // namespace adpdm::testing
