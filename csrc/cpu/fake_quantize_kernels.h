// The per-instruction-set part of fake quantization: contiguous elements that share their quantizers.
#pragma once

#include "core/types.h"
#include "cpu/isa.h"

namespace adpdm::cpu {

// A learnable quantizer, unpacked; the zero-point is hidden in the bounds of q - zero_point.
struct FakeQuantizer {
  float scale;
  float inv_scale;
  float low;         // quant_min - zero_point
  float high;        // quant_max - zero_point
  float importance;  // weight in a mixture
};

// Sums over elements from which the gradients of one quantizer follow; added to.
struct FakeQuantizeSums {
  double scale_grad = 0;  // of grad * d/dscale
  double outside = 0;     // of grad where x is clamped
  double steps = 0;       // of grad * (q - zero_point)
};

// x [size] of type -> y [size] of type.
ADPDM_DECLARE_PER_ISA(void fake_quantize_row(const void* x, FloatType type, int64_t size,
                                             const FakeQuantizer& quantizer, void* y))

// One tensor's gradient in and out, [size] of type each.
struct GradRow {
  const void* x;
  const void* grad;
  void* grad_x;
  FloatType type;
  int64_t size;
};

// y = sum of importance * value over the quantizers [num_groups].
ADPDM_DECLARE_PER_ISA(void mixture_row(const void* x, FloatType type, int64_t size,
                                       const FakeQuantizer* quantizers, int64_t num_groups, void* y))

// A mixture of one group of importance 1 is plain fake quantization.
ADPDM_DECLARE_PER_ISA(void mixture_backward_row(const GradRow& row, const FakeQuantizer* quantizers,
                                                int64_t num_groups, FakeQuantizeSums* sums))

}  // namespace adpdm::cpu
