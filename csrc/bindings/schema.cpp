// The signatures of all operators: the contract between Python, the CPU and the CUDA backends.
#include <torch/library.h>

TORCH_LIBRARY(adpdm, m) {
  // Activations and codes: scale [G] f32, zero_point [G] i32, group_index [1] i32 (read by the kernel).
  // channels_last: codes of x [N, C, H, W] in that format, whatever the layout of x; else in x's own layout.
  // hadamard: block of channels of x [*, C] that are rotated together first, 0 for none.
  m.def(
      "quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor group_index, int num_bits, bool "
      "channels_last=False, int hadamard=0) -> Tensor");
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

  // x [*, C] as float32, `block` channels C / block apart times a Hadamard matrix; block: 4, 16 or 64.
  m.def("hadamard(Tensor x, int block) -> Tensor");

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

  // The step of timesteps [T] f32 nearest to a timestep [1], and its rows of table [T, S] i32 and of
  // correction [T, 2] f32; on the CPU.
  m.def(
      "set_step(Tensor timestep, Tensor timesteps, Tensor table, Tensor? correction, Tensor(a!) step_index, "
      "Tensor(b!) group_index, Tensor(c!) current_correction) -> ()");

  // Integer layers over one or two input segments, each with its own quantizer and weight columns:
  // y = sum_s scale_s[g] * weight_scale_s[o] * (acc_s - zero_point_s[g] * weight_sum_s[o]) + bias[o], then
  // (y * row_scale + row_bias + residual) * output_scale, the activation, and the result as dtype or as
  // codes. input: i8 codes, or u8 packed by quantize_int4 (conv2d: [N, H, W, C / 2]; C, K a multiple of 32).
  // second: empty, or the second segment's seven tensors (input .. weight_sum).
  // output_qparams: empty, or scale, zero_point and group_index of the codes.
  // geometry: out_channels, kernel h, w, stride h, w, padding top, left, bottom, right, dilation h, w,
  // groups, upsample (1|2). activation: 0 none, 1 silu, 2 geglu, 3 gelu, 4 its tanh form. output_bits: 0
  // float, 2..8 codes.
  m.def("pack_weight(Tensor codes, int num_bits, int groups) -> Tensor");
  m.def(
      "linear(Tensor input, Tensor scale, Tensor zero_point, Tensor group_index, Tensor weight, Tensor "
      "weight_scale, Tensor weight_sum, Tensor[] second, Tensor? bias, Tensor? row_scale, Tensor? row_bias, "
      "Tensor? residual, "
      "Tensor[] output_qparams, int out_features, int weight_bits, int activation, float output_scale, int "
      "output_bits, ScalarType dtype) -> Tensor");
  m.def(
      "conv2d(Tensor input, Tensor scale, Tensor zero_point, Tensor group_index, Tensor weight, Tensor "
      "weight_scale, Tensor weight_sum, Tensor[] second, Tensor? bias, Tensor? row_scale, Tensor? row_bias, "
      "Tensor? residual, "
      "Tensor[] output_qparams, int[] geometry, int weight_bits, int activation, float output_scale, int "
      "output_bits, ScalarType dtype) -> Tensor");

  // Normalisation that ends in codes. inputs: 1 or 2 tensors [N, C_s, H, W], read as one of C = C_1 + C_2
  // channels; modulation: [N, 2 * C] f32 scale and shift, y * (1 + scale) + shift. hadamard: as of quantize,
  // of one input on the CPU.
  m.def(
      "group_norm_quantize(Tensor[] inputs, Tensor? weight, Tensor? bias, Tensor? modulation, Tensor scale, "
      "Tensor zero_point, Tensor group_index, int norm_groups, float eps, int activation, int num_bits, "
      "int hadamard=0) -> Tensor");
  // The same with the codes of each input under a quantizer of its own; qparams: scale, zero_point and
  // group_index of the first, then of the second.
  m.def(
      "group_norm_quantize_each(Tensor first, Tensor second, Tensor? weight, Tensor? bias, Tensor[] qparams, "
      "int norm_groups, float eps, int activation, int[] num_bits) -> (Tensor, Tensor)");
  m.def(
      "layer_norm_quantize(Tensor x, Tensor? weight, Tensor? bias, Tensor? modulation, Tensor scale, Tensor "
      "zero_point, Tensor group_index, float eps, int num_bits, int hadamard=0) -> Tensor");

  // Attention of each head that ends in codes, on the CPU: query [N, L, heads * D], key and value
  // [N, M, heads * D], codes [N, L, heads * D]. int8: products of 8-bit codes.
  m.def(
      "attention_quantize(Tensor query, Tensor key, Tensor value, Tensor scale, Tensor zero_point, Tensor "
      "group_index, int heads, int num_bits, bool int8=False, int hadamard=0) -> Tensor");

  // Float rows of blocks, on the CPU: second(silu(first(waves))) + table[labels] [N, D] of waves [1 or N, K];
  // layer(silu(x)) [N, O]; and layer(silu(embedding)) [N, 6 * C] of a transformer block as scale beside shift
  // [N, 2 * C] and gate [N, C] of the attention, then of the feed-forward net. The layer's outputs are shift,
  // scale and gate, twice.
  m.def(
      "timestep_embedding(Tensor waves, Tensor first_weight, Tensor? first_bias, Tensor second_weight, "
      "Tensor? second_bias, Tensor? table, Tensor? labels) -> Tensor");
  m.def("silu_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("adaptive_rows(Tensor embedding, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor)");
}
