// Registers pack_weight, linear and conv2d for CPU tensors.
#include <ATen/Functions.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "bindings/igemm_prepare.h"

namespace adpdm::bindings {
namespace {

// What only the host can check: values that live in tensors. Codes and zero-points share the range of int8.
void check_current_group(const char* op, int s, const GroupedQParams& qparams) {
  const int64_t group = *qparams.group_index;
  TORCH_CHECK_INDEX(group >= 0 && group < qparams.num_groups, op, ": group_indices[", s,
                    "] must be in [0, num_groups=", qparams.num_groups, "), got ", group);
  const int32_t zero_point = qparams.zero_point[group];
  TORCH_CHECK_VALUE(zero_point >= -128 && zero_point <= 127, op, ": zero_points[", s, "][", group,
                    "] must be a code in [-128, 127], got ", zero_point);
}

void check_blob(const char* op, size_t s, const at::Tensor& weight, int64_t bytes) {
  TORCH_CHECK_VALUE(weight.numel() == bytes, op, ": weights[", s, "] must have ", bytes,
                    " bytes for this shape and weight_bits, got ", weight.numel());
}

at::Tensor pack_weight(const at::Tensor& codes, int64_t num_bits, int64_t groups) {
  PackWeightArgs args = prepare_pack_weight(codes, num_bits, groups);
  const at::Tensor dense = codes.contiguous();
  const int64_t bytes =
      packed_weight_bytes(args.out_channels, args.group_channels, args.taps, args.groups, args.num_bits);
  at::Tensor packed = at::empty({bytes}, codes.options().dtype(at::kByte));
  args.codes = dense.const_data_ptr<int8_t>();
  args.packed = packed.mutable_data_ptr<uint8_t>();
  cpu::pack_weight(args);
  return packed;
}

at::Tensor linear(at::TensorList inputs, at::TensorList scales, at::TensorList zero_points,
                  at::TensorList group_indices, at::TensorList weights, at::TensorList weight_scales,
                  at::TensorList weight_sums, const std::optional<at::Tensor>& bias, int64_t out_features,
                  int64_t weight_bits, at::ScalarType dtype) {
  PreparedLinear prepared =
      prepare_linear({inputs, scales, zero_points, group_indices, weights, weight_scales, weight_sums}, bias,
                     out_features, weight_bits, dtype);
  const LinearArgs& args = prepared.args;
  for (int s = 0; s < args.num_segments; ++s) {
    check_current_group("linear", s, args.segments[s].qparams);
    check_blob("linear", s, weights[s],
               packed_weight_bytes(out_features, args.segments[s].channels, 1, 1, args.weight_bits));
  }
  cpu::linear(args);
  return prepared.output;
}

at::Tensor conv2d(at::TensorList inputs, at::TensorList scales, at::TensorList zero_points,
                  at::TensorList group_indices, at::TensorList weights, at::TensorList weight_scales,
                  at::TensorList weight_sums, const std::optional<at::Tensor>& bias, int64_t out_channels,
                  at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                  at::IntArrayRef dilation, int64_t groups, int64_t weight_bits, at::ScalarType dtype) {
  PreparedConv2d prepared =
      prepare_conv2d({inputs, scales, zero_points, group_indices, weights, weight_scales, weight_sums}, bias,
                     {out_channels, kernel_size, stride, padding, dilation, groups}, weight_bits, dtype);
  const Conv2dArgs& args = prepared.args;
  for (int s = 0; s < args.num_segments; ++s) {
    check_current_group("conv2d", s, args.segments[s].qparams);
    check_blob("conv2d", s, weights[s],
               packed_weight_bytes(out_channels, args.segments[s].channels / groups,
                                   args.kernel.height * args.kernel.width, groups, args.weight_bits));
  }
  cpu::conv2d(args);
  return prepared.output;
}

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CPU, m) {
  m.impl("pack_weight", &pack_weight);
  m.impl("linear", &linear);
  m.impl("conv2d", &conv2d);
}

}  // namespace adpdm::bindings
