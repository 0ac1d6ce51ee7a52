// Random integer layers and their naive int64 reference, shared by the tests of linear and conv2d.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "core/conv2d.h"
#include "core/linear.h"
#include "core/pack_weight.h"

namespace adpdm::testing {

// Owns the tensors of one segment; weights as plain codes [O, C / groups, kh, kw] and packed.
struct SegmentData {
  std::vector<int8_t> codes;
  std::vector<int8_t> weight_codes;
  std::vector<uint8_t> weight;
  std::vector<float> weight_scale;
  std::vector<int32_t> weight_sum;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  int32_t group_index;
  int64_t channels;

  IgemmSegment segment() const {
    return {codes.data(),
            channels,
            weight.data(),
            weight_scale.data(),
            weight_sum.data(),
            {scale.data(), zero_point.data(), &group_index, static_cast<int64_t>(scale.size())}};
  }
};

inline void pack(SegmentData& data, int64_t outputs, int64_t taps, int64_t groups, int weight_bits) {
  const int64_t group_channels = data.channels / groups;
  data.weight.resize(packed_weight_bytes(outputs, group_channels, taps, groups, weight_bits));
  cpu::pack_weight(
      {data.weight_codes.data(), data.weight.data(), outputs, group_channels, taps, groups, weight_bits});
  const int64_t k = group_channels * taps;
  data.weight_sum.assign(outputs, 0);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < k; ++i) data.weight_sum[o] += data.weight_codes[o * k + i];
  }
}

// Three quantizer groups, the middle one current; with `unit_scales` outputs are integers.
inline SegmentData random_segment(std::mt19937& random, int64_t pixels, int64_t channels, int64_t outputs,
                                  int64_t taps, int64_t groups, int weight_bits, bool unit_scales) {
  SegmentData data{};
  data.channels = channels;
  const CodeRange range = signed_range(weight_bits);
  std::uniform_int_distribution<int> code(-128, 127);
  std::uniform_int_distribution<int> weight(range.quant_min, range.quant_max);
  std::uniform_real_distribution<float> scale(0.001f, 0.1f);
  for (int64_t i = 0; i < pixels * channels; ++i) data.codes.push_back(static_cast<int8_t>(code(random)));
  for (int64_t i = 0; i < outputs * channels / groups * taps; ++i) {
    data.weight_codes.push_back(static_cast<int8_t>(weight(random)));
  }
  for (int64_t o = 0; o < outputs; ++o) data.weight_scale.push_back(unit_scales ? 1.0f : scale(random));
  data.scale = {scale(random), unit_scales ? 1.0f : scale(random), scale(random)};
  data.zero_point = {code(random), code(random), code(random)};
  data.group_index = 1;
  pack(data, outputs, taps, groups, weight_bits);
  return data;
}

// acc - zero_point * weight_sum of one output, from the definition: real 0 outside the image.
inline int64_t naive_centred(const Conv2dArgs& args, const SegmentData& data, int64_t n, int64_t y, int64_t x,
                             int64_t o) {
  const int64_t group_channels = data.channels / args.groups;
  const int64_t group = o / (args.out_channels / args.groups);
  const int64_t zero_point = data.zero_point[data.group_index];
  int64_t sum = 0;
  for (int64_t ky = 0; ky < args.kernel.height; ++ky) {
    for (int64_t kx = 0; kx < args.kernel.width; ++kx) {
      const int64_t iy = y * args.stride.height - args.padding.height + ky * args.dilation.height;
      const int64_t ix = x * args.stride.width - args.padding.width + kx * args.dilation.width;
      if (iy < 0 || iy >= args.input.height || ix < 0 || ix >= args.input.width) continue;
      for (int64_t c = 0; c < group_channels; ++c) {
        const int64_t pixel = (n * args.input.height + iy) * args.input.width + ix;
        const int64_t code = data.codes[pixel * data.channels + group * group_channels + c];
        const int64_t tap = ky * args.kernel.width + kx;
        const int64_t taps = args.kernel.height * args.kernel.width;
        sum += (code - zero_point) * data.weight_codes[(o * group_channels + c) * taps + tap];
      }
    }
  }
  return sum;
}

// [N, Ho, Wo, O] f32: exact integers, then one fused multiply-add per segment, as the kernels are specified.
inline std::vector<float> naive_conv2d(const Conv2dArgs& args, const std::vector<SegmentData>& segments) {
  std::vector<float> result;
  for (int64_t n = 0; n < args.batch; ++n) {
    for (int64_t y = 0; y < args.out.height; ++y) {
      for (int64_t x = 0; x < args.out.width; ++x) {
        for (int64_t o = 0; o < args.out_channels; ++o) {
          float value = args.output.bias ? args.output.bias[o] : 0.0f;
          for (const SegmentData& data : segments) {
            const float factor = data.scale[data.group_index] * data.weight_scale[o];
            value = std::fma(static_cast<float>(naive_centred(args, data, n, y, x, o)), factor, value);
          }
          result.push_back(value);
        }
      }
    }
  }
  return result;
}

}  // namespace adpdm::testing
