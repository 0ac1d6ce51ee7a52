// The bodies of pack_weight, linear and conv2d, the same for all devices: check, allocate, run on a Backend.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <utility>

#include "bindings/igemm_prepare.h"

namespace adpdm::bindings {

// A Backend is made once per call and has
//   explicit Backend(const at::Tensor& input)
//       selects input's device and stream while it lives
//   int64_t blob_bytes(outputs, group_channels, taps, groups, weight_bits)
//       size of a packed weight
//   void check_values(op, names of group_index and zero_point, qparams)
//       what only it can check: values
//   bool reads_packed(weight_bits, group_channels)
//       whether kernels take two codes to a byte, if all inputs are so
//   at::Tensor unpack(const at::Tensor& packed)
//       [.., K / 2] u8 to [.., K] i8
//   void run(const PackWeightArgs&), run(const LinearArgs&), run(const Conv2dArgs&)

inline int64_t kernel_taps(const LinearArgs&) { return 1; }
inline int64_t kernel_taps(const Conv2dArgs& args) { return args.kernel.height * args.kernel.width; }
inline int64_t kernel_groups(const LinearArgs&) { return 1; }
inline int64_t kernel_groups(const Conv2dArgs& args) { return args.groups; }
inline int64_t kernel_outputs(const LinearArgs& args) { return args.out_features; }
inline int64_t kernel_outputs(const Conv2dArgs& args) { return args.out_channels; }

// The checks that depend on the backend, and codes in a form that it reads.
template <typename Backend, typename Args>
void finish_preparing(const Backend& backend, const char* op, const int64_t* weight_bytes,
                      Prepared<Args>& prepared) {
  Args& args = prepared.args;
  const int64_t groups = kernel_groups(args);
  for (int s = 0; s < args.num_segments; ++s) {
    const SegmentNames& names = kSegmentNames[s];
    const IgemmSegment& segment = args.segments[s];
    const int64_t bytes = backend.blob_bytes(kernel_outputs(args), segment.channels / groups,
                                             kernel_taps(args), groups, args.weight_bits);
    TORCH_CHECK_VALUE(weight_bytes[s] == bytes, op, ": ", names.weight, " must have ", bytes,
                      " bytes for this shape and weight_bits, got ", weight_bytes[s]);
    backend.check_values(op, names.group_index, names.zero_point, segment.qparams);
  }
  if (args.output.num_bits > 0) {
    backend.check_values(op, "output group_index", "output zero_point", args.output.qparams);
  }
  bool read_packed = true;
  for (int s = 0; s < args.num_segments; ++s) {
    const IgemmSegment& segment = args.segments[s];
    read_packed =
        read_packed && segment.packed && backend.reads_packed(args.weight_bits, segment.channels / groups);
  }
  if (read_packed) return;
  for (int s = 0; s < args.num_segments; ++s) {
    IgemmSegment& segment = args.segments[s];
    if (!segment.packed) continue;
    prepared.inputs[s] = backend.unpack(prepared.inputs[s]);
    segment.codes = prepared.inputs[s].template const_data_ptr<int8_t>();
    segment.packed = false;
  }
}

template <typename Backend>
at::Tensor pack_weight(const at::Tensor& codes, int64_t num_bits, int64_t groups) {
  PackWeightArgs args = prepare_pack_weight(codes, num_bits, groups);
  const Backend backend(codes);
  const at::Tensor dense = codes.contiguous();
  const int64_t bytes =
      backend.blob_bytes(args.out_channels, args.group_channels, args.taps, args.groups, args.num_bits);
  at::Tensor packed = at::empty({bytes}, codes.options().dtype(at::kByte));
  args.codes = dense.const_data_ptr<int8_t>();
  args.packed = packed.mutable_data_ptr<uint8_t>();
  backend.run(args);
  return packed;
}

template <typename Backend>
at::Tensor linear(const at::Tensor& input, const at::Tensor& scale, const at::Tensor& zero_point,
                  const at::Tensor& group_index, const at::Tensor& weight, const at::Tensor& weight_scale,
                  const at::Tensor& weight_sum, at::TensorList second, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& row_scale, const std::optional<at::Tensor>& row_bias,
                  const std::optional<at::Tensor>& residual, at::TensorList output_qparams,
                  int64_t out_features, int64_t weight_bits, int64_t activation, double output_scale,
                  int64_t output_bits, at::ScalarType dtype) {
  Prepared<LinearArgs> prepared =
      prepare_linear({input, scale, zero_point, group_index, weight, weight_scale, weight_sum, second},
                     {bias, row_scale, row_bias, residual, output_qparams, weight_bits, activation,
                      output_scale, output_bits, dtype},
                     out_features);
  const Backend backend(input);
  const int64_t weight_bytes[] = {weight.numel(), second.empty() ? 0 : second[4].numel()};
  finish_preparing(backend, "linear", weight_bytes, prepared);
  backend.run(prepared.args);
  return std::move(prepared.output);
}

template <typename Backend>
at::Tensor conv2d(const at::Tensor& input, const at::Tensor& scale, const at::Tensor& zero_point,
                  const at::Tensor& group_index, const at::Tensor& weight, const at::Tensor& weight_scale,
                  const at::Tensor& weight_sum, at::TensorList second, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& row_scale, const std::optional<at::Tensor>& row_bias,
                  const std::optional<at::Tensor>& residual, at::TensorList output_qparams,
                  at::IntArrayRef geometry, int64_t weight_bits, int64_t activation, double output_scale,
                  int64_t output_bits, at::ScalarType dtype) {
  Prepared<Conv2dArgs> prepared =
      prepare_conv2d({input, scale, zero_point, group_index, weight, weight_scale, weight_sum, second},
                     {bias, row_scale, row_bias, residual, output_qparams, weight_bits, activation,
                      output_scale, output_bits, dtype},
                     geometry);
  const Backend backend(input);
  const int64_t weight_bytes[] = {weight.numel(), second.empty() ? 0 : second[4].numel()};
  finish_preparing(backend, "conv2d", weight_bytes, prepared);
  backend.run(prepared.args);
  return std::move(prepared.output);
}

template <typename Backend>
void register_igemm(torch::Library& m) {
  m.impl("pack_weight", &pack_weight<Backend>);
  m.impl("linear", &linear<Backend>);
  m.impl("conv2d", &conv2d<Backend>);
}

}  // namespace adpdm::bindings
