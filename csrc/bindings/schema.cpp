// The signatures of all operators: the contract between Python, the CPU and the CUDA backends.
#include <torch/library.h>

TORCH_LIBRARY(adpdm, m) {
  // Activations and codes: scale [G] f32, zero_point [G] i32, group_index [1] i32 (read by the kernel).
  m.def("quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor group_index, int num_bits) -> Tensor");
  m.def("quantize_int4(Tensor x, Tensor scale, Tensor zero_point, Tensor group_index) -> Tensor");
  m.def(
      "dequantize(Tensor codes, Tensor scale, Tensor zero_point, Tensor group_index, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "dequantize_int4(Tensor packed, Tensor scale, Tensor zero_point, Tensor group_index, int num_columns, "
      "ScalarType dtype) -> Tensor");

  // Storage of 4-bit codes: [*, K] i8 <-> [*, ceil(K/32) * 16] u8.
  m.def("pack_int4(Tensor codes) -> Tensor");
  m.def("unpack_int4(Tensor packed, int num_columns) -> Tensor");

  // Training: scale and zero_point are float32 [G], or [G, C] with channel_axis >= 0; -1 means per tensor.
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor group_index, int quant_min, int "
      "quant_max, int channel_axis) -> Tensor");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, Tensor group_index, "
      "int "
      "quant_min, int quant_max, int channel_axis) -> (Tensor, Tensor, Tensor)");
  m.def(
      "fake_quantize_mixture(Tensor x, Tensor scale, Tensor zero_point, Tensor importance, int quant_min, "
      "int "
      "quant_max) -> Tensor");
  m.def(
      "fake_quantize_mixture_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, Tensor "
      "importance, int quant_min, int quant_max) -> (Tensor, Tensor, Tensor, Tensor)");

  // Statistics: counts [T, 2049] i64 and extrema [T, 2] f32 (min, max), row step_index [1] i32.
  m.def("observe(Tensor x, Tensor(a!) counts, Tensor(b!) extrema, Tensor step_index) -> ()");

  // Integer layers over one or two input segments, each with its own quantizer and weight columns:
  // y = sum_s scale_s[g] * weight_scale_s[o] * (acc_s - zero_point_s[g] * weight_sum_s[o]) + bias[o].
  m.def("pack_weight(Tensor codes, int num_bits, int groups) -> Tensor");
  m.def(
      "linear(Tensor[] inputs, Tensor[] scales, Tensor[] zero_points, Tensor[] group_indices, Tensor[] "
      "weights, "
      "Tensor[] weight_scales, Tensor[] weight_sums, Tensor? bias, int out_features, int weight_bits, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "conv2d(Tensor[] inputs, Tensor[] scales, Tensor[] zero_points, Tensor[] group_indices, Tensor[] "
      "weights, "
      "Tensor[] weight_scales, Tensor[] weight_sums, Tensor? bias, int out_channels, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, int weight_bits, ScalarType dtype) -> "
      "Tensor");
}
