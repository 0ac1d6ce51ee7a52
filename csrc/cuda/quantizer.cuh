// The quantizer of the current group, read on the device: the host never has to know which group it is.
#pragma once

#include "core/quant_math.h"
#include "cuda/device.cuh"

namespace adpdm::cuda {

// index[0], moved to the nearest of [0, count): a kernel cannot raise, and must not read elsewhere.
ADPDM_DEVICE int64_t clamped_index(const int32_t* index, int64_t count) {
  const int64_t i = load(index);
  return i < 0 ? 0 : (i < count ? i : count - 1);
}

struct Quantizer {
  float scale;
  float inv_scale;
  float zero_point;
  float quant_min;
  float quant_max;
};

ADPDM_DEVICE Quantizer current_quantizer(const GroupedQParams& qparams, CodeRange range) {
  const int64_t group = clamped_index(qparams.group_index, qparams.num_groups);
  const float scale = load(qparams.scale + group);
  return {scale, reciprocal(scale), static_cast<float>(load(qparams.zero_point + group)),
          static_cast<float>(range.quant_min), static_cast<float>(range.quant_max)};
}

// The code of x in the low byte; the bits above are not zero. Adding kRoundMagic to an integer puts it there,
// which saves the conversion instruction, of a quarter of the throughput.
ADPDM_DEVICE uint32_t code_bits(float x, const Quantizer& q) {
  return float_to_bits(quantize_value(x, q.inv_scale, q.zero_point, q.quant_min, q.quant_max) + kRoundMagic);
}

ADPDM_DEVICE int8_t code_of(float x, const Quantizer& q) { return static_cast<int8_t>(code_bits(x, q)); }

// Four codes in memory order.
ADPDM_DEVICE uint32_t code_word(const float* x, const Quantizer& q) {  // [4]
  return (code_bits(x[0], q) & 0xffu) | (code_bits(x[1], q) & 0xffu) << 8 |
         (code_bits(x[2], q) & 0xffu) << 16 | code_bits(x[3], q) << 24;
}

}  // namespace adpdm::cuda
