// Checks the tensors of linear and conv2d on any device, allocates the output and describes all of it to the
// core.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "core/conv2d.h"
#include "core/linear.h"
#include "core/pack_weight.h"

namespace adpdm::bindings {

// What linear and conv2d share of their schemas; refers to the arguments of one call.
struct IgemmTensors {
  const at::Tensor& input;         // linear [*, K], conv2d [N, C, H, W], i8; or packed u8, see schema.cpp
  const at::Tensor& scale;         // [G] f32
  const at::Tensor& zero_point;    // [G] i32
  const at::Tensor& group_index;   // [1] i32
  const at::Tensor& weight;        // blob of pack_weight, u8
  const at::Tensor& weight_scale;  // [O] f32
  const at::Tensor& weight_sum;    // [O] i32
  at::TensorList second;           // empty, or those seven of the second segment
};

struct OutputOptions {
  const std::optional<at::Tensor>& bias;       // [O] f32
  const std::optional<at::Tensor>& row_scale;  // [images, O] f32
  const std::optional<at::Tensor>& row_bias;   // [images, O] f32
  const std::optional<at::Tensor>& residual;   // the shape of the result, f32|bf16|f16
  at::TensorList qparams;                      // empty, or scale [G] f32, zero_point [G] i32, group_index [1]
  int64_t weight_bits;
  int64_t activation;
  double output_scale;
  int64_t output_bits;
  at::ScalarType dtype;
};

// Args is LinearArgs or Conv2dArgs; it points into the tensors beside it.
template <typename Args>
struct Prepared {
  Args args;
  at::Tensor output;
  std::array<at::Tensor, kMaxSegments> inputs;  // the codes in the layout that args describes
  at::Tensor residual;
};

// All raise ValueError or TypeError with the reason. What depends on a backend is left to it: the size of the
// blobs, and values that lie on the device.
Prepared<LinearArgs> prepare_linear(const IgemmTensors& tensors, const OutputOptions& options,
                                    int64_t out_features);

Prepared<Conv2dArgs> prepare_conv2d(const IgemmTensors& tensors, const OutputOptions& options,
                                    at::IntArrayRef geometry);

// codes [O, C / groups, kh, kw] or [O, K] i8, checked against num_bits and groups; `packed` is left unset.
PackWeightArgs prepare_pack_weight(const at::Tensor& codes, int64_t num_bits, int64_t groups);

// Names of the tensors of a segment in sentences, ready made because they are passed on every call.
struct SegmentNames {
  const char *input, *scale, *zero_point, *group_index, *weight, *weight_scale, *weight_sum;
};
constexpr SegmentNames kSegmentNames[kMaxSegments] = {
    {"input", "scale", "zero_point", "group_index", "weight", "weight_scale", "weight_sum"},
    {"second input", "second scale", "second zero_point", "second group_index", "second weight",
     "second weight_scale", "second weight_sum"},
};

}  // namespace adpdm::bindings
