// A learnable quantizer on the device, and what the two halves of fake quantization call of each other.
#pragma once

#include "core/fake_quantize.h"
#include "core/quant_math.h"
#include "cuda/quantizer.cuh"

namespace adpdm::cuda {

// The zero-point is hidden in the bounds of q - zero_point.
struct alignas(16) FakeQuantizer {
  float scale;
  float inv_scale;
  float low;         // quant_min - zero_point
  float high;        // quant_max - zero_point
  float importance;  // weight in a mixture
  float unused[3];   // so that 16-byte loads fetch it
};

// Entry `index` of the tables; importance [num_groups] f32 or nullptr: 1.
ADPDM_DEVICE FakeQuantizer load_fake_quantizer(const float* scale, const float* zero_point,
                                               const float* importance, int64_t index, CodeRange range) {
  const float quant_min = static_cast<float>(range.quant_min);
  const float quant_max = static_cast<float>(range.quant_max);
  const float code = effective_zero_point(load(zero_point + index), quant_min, quant_max);
  const float step = load(scale + index);
  return {step,
          reciprocal(step),
          quant_min - code,
          quant_max - code,
          importance == nullptr ? 1.0f : load(importance + index),
          {}};
}

ADPDM_DEVICE void store_shared_quantizer(FakeQuantizer* shared, const FakeQuantizer& q) {
  Bytes16 halves[2];
  memcpy(halves, &q, sizeof q);
  shared_store(reinterpret_cast<Bytes16*>(shared), halves[0]);
  shared_store(reinterpret_cast<Bytes16*>(shared) + 1, halves[1]);
}

ADPDM_DEVICE FakeQuantizer load_shared_quantizer(const FakeQuantizer* shared) {
  const Bytes16 half = shared_load(reinterpret_cast<const Bytes16*>(shared));
  FakeQuantizer q{};
  memcpy(&q, &half, sizeof half);
  q.importance = shared_load(&shared->importance);
  return q;
}

// grad_x [size] = grad * the importance of the groups that x is within.
void mixture_grad_x(const MixtureArgs& args,
                    const void* grad,  // [size] of type
                    void* grad_x,      // [size] of type
                    Stream stream);

}  // namespace adpdm::cuda
