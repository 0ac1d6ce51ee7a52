// Random integer layers with fused outputs and their definition, shared by the tests of all backends.
#pragma once

#include <cstring>
#include <optional>
#include <random>
#include <vector>

#include "core/activation_math.h"
#include "core/float_convert.h"
#include "igemm_problem.h"

namespace adpdm::testing {

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
  bool row_scale = false;
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
  std::vector<float> row_scale;    // [N, O]
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
  if (epilogue.row_scale) fill(host.row_scale, layer.batch * layer.out_channels);
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
    const auto of_image = static_cast<size_t>(row / rows_per_image * outputs + o);
    if (!host.row_scale.empty()) y[i] *= host.row_scale[of_image];
    if (!host.row_bias.empty()) y[i] += host.row_bias[of_image];
    if (!host.residual.empty()) y[i] += host.residual[i];
    y[i] *= host.epilogue.output_scale;
    if (host.epilogue.activation == Activation::kSilu) y[i] = silu(y[i]);
    if (host.epilogue.activation == Activation::kGelu) y[i] = gelu(y[i]);
    if (host.epilogue.activation == Activation::kGeluTanh) y[i] = gelu_tanh(y[i]);
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

}  // namespace adpdm::testing
