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

// The parallel lists of the schema, one entry per segment.
struct SegmentLists {
  at::TensorList inputs;         // linear [*, K_s], conv2d [N, C_s, H, W], i8
  at::TensorList scales;         // [G] f32
  at::TensorList zero_points;    // [G] i32
  at::TensorList group_indices;  // [1] i32
  at::TensorList weights;        // blobs of pack_weight, u8
  at::TensorList weight_scales;  // [O] f32
  at::TensorList weight_sums;    // [O] i32
};

struct ConvGeometry {
  int64_t out_channels;
  at::IntArrayRef kernel_size;
  at::IntArrayRef stride;
  at::IntArrayRef padding;
  at::IntArrayRef dilation;
  int64_t groups;
};

struct PreparedLinear {
  LinearArgs args;
  at::Tensor output;
  std::array<at::Tensor, kMaxSegments> inputs;  // what args points into where layouts had to change
};

struct PreparedConv2d {
  Conv2dArgs args;
  at::Tensor output;
  std::array<at::Tensor, kMaxSegments> inputs;
};

// All raise ValueError or TypeError with the reason. The size of the blobs is left to the backend, whose
// layout it is.
PreparedLinear prepare_linear(const SegmentLists& lists, const std::optional<at::Tensor>& bias,
                              int64_t out_features, int64_t weight_bits, at::ScalarType dtype);

PreparedConv2d prepare_conv2d(const SegmentLists& lists, const std::optional<at::Tensor>& bias,
                              const ConvGeometry& geometry, int64_t weight_bits, at::ScalarType dtype);

// codes [O, C / groups, kh, kw] or [O, K] i8, checked against num_bits and groups; `packed` is left unset.
PackWeightArgs prepare_pack_weight(const at::Tensor& codes, int64_t num_bits, int64_t groups);

}  // namespace adpdm::bindings
