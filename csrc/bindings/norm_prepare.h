// Checks the tensors of the normalisations that end in codes, on any device, and describes them to the core.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "core/norm_quantize.h"

namespace adpdm::bindings {

// What both normalisations share of their schemas; refers to the arguments of one call.
struct NormTensors {
  const std::optional<at::Tensor>& weight;      // [C] f32
  const std::optional<at::Tensor>& bias;        // [C] f32
  const std::optional<at::Tensor>& modulation;  // [images, 2 * C] f32: scale, shift
  const at::Tensor& scale;                      // [G] f32
  const at::Tensor& zero_point;                 // [G] i32
  const at::Tensor& group_index;                // [1] i32
  double eps;
  int64_t num_bits;
  int64_t hadamard;  // channels rotated together, 0: none
};

// Args is GroupNormQuantizeArgs or LayerNormQuantizeArgs; it points into the tensors beside it.
template <typename Args>
struct PreparedNorm {
  Args args;
  at::Tensor codes;
  std::array<at::Tensor, kMaxSegments> inputs;  // in the layout that args describes
};

// All raise ValueError or TypeError with the reason.
PreparedNorm<GroupNormQuantizeArgs> prepare_group_norm(at::TensorList inputs,  // [N, C_s, H, W] f32|bf16|f16
                                                       const NormTensors& tensors, int64_t norm_groups,
                                                       int64_t activation);

// The same without codes, which the caller allocates.
PreparedNorm<GroupNormQuantizeArgs> describe_group_norm(at::TensorList inputs, const NormTensors& tensors,
                                                        int64_t norm_groups, int64_t activation);

// Of group_norm_quantize_each: scale, zero_point and group_index of each of two sources, and their bits.
void check_each(at::TensorList qparams, at::IntArrayRef num_bits);

PreparedNorm<LayerNormQuantizeArgs> prepare_layer_norm(const at::Tensor& x,  // [*, C] f32|bf16|f16
                                                       const NormTensors& tensors);

}  // namespace adpdm::bindings
