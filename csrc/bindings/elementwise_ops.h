// The bodies of the element-wise operators, the same for all devices: check, allocate, run on a Backend.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "bindings/prepare.h"
#include "core/fake_quantize.h"
#include "core/hadamard.h"
#include "core/observe.h"
#include "core/quantize.h"

namespace adpdm::bindings {
namespace elementwise {

using at::Tensor;

// A Backend is made once per call, from the input whose device and stream it selects while it lives. It has
// the functions of core/quantize.h, core/hadamard.h, core/fake_quantize.h and core/observe.h, with the
// arguments of the CPU's, check_values(op, "group_index", "zero_point", qparams), which checks what only it
// can about values, and run(function, arguments...).

// Codes of rotated rows.
template <typename Backend>
Tensor quantize_rotated(const Tensor& x,  // [*, C]
                        const GroupedQParams& qparams, int num_bits, int64_t block) {
  Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const Rows rows = rows_of_last_dim("quantize", x);
  check_hadamard("quantize", "hadamard", block, rows.view.columns);
  const Backend backend(x);
  backend.check_values("quantize", "group_index", "zero_point", qparams);
  backend.run(Backend::hadamard_quantize, rows.view, block, qparams, num_bits,
              codes.mutable_data_ptr<int8_t>());
  return codes;
}

template <typename Backend>
Tensor quantize(const Tensor& x,            // [*] f32|bf16|f16
                const Tensor& scale,        // [G] f32
                const Tensor& zero_point,   // [G] i32
                const Tensor& group_index,  // [1] i32
                int64_t num_bits, bool channels_last, int64_t block) {
  check_num_bits("quantize", num_bits);
  TORCH_CHECK_VALUE(!channels_last || x.dim() == 4,
                    "quantize: x must have 4 dimensions for channels_last, got ", x.sizes());
  const GroupedQParams qparams = grouped_qparams("quantize", x, scale, zero_point, group_index);
  if (block != 0) {
    TORCH_CHECK_VALUE(!channels_last, "quantize: wanted hadamard of rows or channels_last, got both");
    return quantize_rotated<Backend>(x, qparams, static_cast<int>(num_bits), block);
  }
  const at::MemoryFormat format = channels_last ? at::MemoryFormat::ChannelsLast : result_format(x);
  Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kChar).memory_format(format));
  const Backend backend(x);
  backend.check_values("quantize", "group_index", "zero_point", qparams);
  if (channels_last && !has_channels_last(x)) {
    const Planes planes = planes_of("quantize", x);
    backend.run(Backend::quantize_channels_last, planes.view, qparams, static_cast<int>(num_bits),
                codes.mutable_data_ptr<int8_t>());
    return codes;
  }
  const Rows rows = rows_in_result_order("quantize", x);
  backend.run(Backend::quantize, rows.view, qparams, static_cast<int>(num_bits),
              codes.mutable_data_ptr<int8_t>());
  return codes;
}

template <typename Backend>
Tensor quantize_int4(const Tensor& x,  // [*, K] f32|bf16|f16
                     const Tensor& scale, const Tensor& zero_point, const Tensor& group_index) {
  const GroupedQParams qparams = grouped_qparams("quantize_int4", x, scale, zero_point, group_index);
  const Rows rows = rows_of_last_dim("quantize_int4", x);
  Tensor packed = at::empty(with_last_dim(x, int4_row_bytes(x.size(-1))), x.options().dtype(at::kByte));
  const Backend backend(x);
  backend.check_values("quantize_int4", "group_index", "zero_point", qparams);
  backend.run(Backend::quantize_int4, rows.view, qparams, packed.mutable_data_ptr<uint8_t>());
  return packed;
}

template <typename Backend>
Tensor dequantize(const Tensor& codes,  // [*] i8
                  const Tensor& scale, const Tensor& zero_point, const Tensor& group_index,
                  at::ScalarType dtype) {
  check_dtype("dequantize", "codes", codes, at::kChar);
  const FloatType type = float_type("dequantize", "dtype", dtype);
  const GroupedQParams qparams = grouped_qparams("dequantize", codes, scale, zero_point, group_index);
  const Tensor source = dense(codes);
  Tensor x = empty_like(codes, dtype);
  const Backend backend(codes);
  backend.check_values("dequantize", "group_index", "zero_point", qparams);
  backend.run(Backend::dequantize, source.const_data_ptr<int8_t>(), codes.numel(), qparams, type,
              x.mutable_data_ptr());
  return x;
}

template <typename Backend>
Tensor dequantize_int4(const Tensor& packed,  // [*, ceil(K/32) * 16] u8
                       const Tensor& scale, const Tensor& zero_point, const Tensor& group_index,
                       int64_t num_columns, at::ScalarType dtype) {
  const Tensor source = checked_packed("dequantize_int4", packed, num_columns);
  const FloatType type = float_type("dequantize_int4", "dtype", dtype);
  const GroupedQParams qparams = grouped_qparams("dequantize_int4", packed, scale, zero_point, group_index);
  Tensor x = at::empty(with_last_dim(packed, num_columns), packed.options().dtype(dtype));
  const MatrixShape shape = matrix_shape("dequantize_int4", "packed", x);
  const Backend backend(packed);
  backend.check_values("dequantize_int4", "group_index", "zero_point", qparams);
  backend.run(Backend::dequantize_int4, source.const_data_ptr<uint8_t>(), shape.rows, shape.columns, qparams,
              type, x.mutable_data_ptr());
  return x;
}

template <typename Backend>
Tensor pack_int4(const Tensor& codes) {  // [*, K] i8 in [-8, 7]
  check_dtype("pack_int4", "codes", codes, at::kChar);
  const MatrixShape shape = matrix_shape("pack_int4", "codes", codes);
  const Tensor source = codes.contiguous();
  Tensor packed =
      at::empty(with_last_dim(codes, int4_row_bytes(shape.columns)), codes.options().dtype(at::kByte));
  Backend(codes).run(Backend::pack_int4, source.const_data_ptr<int8_t>(), shape.rows, shape.columns,
                     packed.mutable_data_ptr<uint8_t>());
  return packed;
}

template <typename Backend>
Tensor unpack_int4(const Tensor& packed,  // [*, ceil(K/32) * 16] u8
                   int64_t num_columns) {
  const Tensor source = checked_packed("unpack_int4", packed, num_columns);
  Tensor codes = at::empty(with_last_dim(packed, num_columns), packed.options().dtype(at::kChar));
  const MatrixShape shape = matrix_shape("unpack_int4", "packed", codes);
  Backend(packed).run(Backend::unpack_int4, source.const_data_ptr<uint8_t>(), shape.rows, shape.columns,
                      codes.mutable_data_ptr<int8_t>());
  return codes;
}

template <typename Backend>
Tensor fake_quantize(const Tensor& x,            // [*] f32|bf16|f16
                     const Tensor& scale,        // [G] or [G, C] f32
                     const Tensor& zero_point,   // [G] or [G, C] f32
                     const Tensor& group_index,  // [1] i32
                     int64_t quant_min, int64_t quant_max, int64_t channel_axis) {
  const FakeQuantizeCall call = prepare_fake_quantize("fake_quantize", x, scale, zero_point, group_index,
                                                      quant_min, quant_max, channel_axis);
  Tensor y = empty_like(x, x.scalar_type());
  Backend(x).run(Backend::fake_quantize, call.args, y.mutable_data_ptr());
  return y;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& grad,  // [*] like x
                                                          const Tensor& x, const Tensor& scale,
                                                          const Tensor& zero_point, const Tensor& group_index,
                                                          int64_t quant_min, int64_t quant_max,
                                                          int64_t channel_axis) {
  const FakeQuantizeCall call = prepare_fake_quantize("fake_quantize_backward", x, scale, zero_point,
                                                      group_index, quant_min, quant_max, channel_axis);
  const Tensor dense_grad = checked_grad("fake_quantize_backward", grad, x);
  Tensor grad_x = empty_like(x, x.scalar_type());
  Tensor grad_scale = at::empty(scale.sizes(), scale.options());
  Tensor grad_zero_point = at::empty(scale.sizes(), scale.options());
  Backend(x).run(Backend::fake_quantize_backward, call.args, dense_grad.const_data_ptr(),
                 grad_x.mutable_data_ptr(), grad_scale.mutable_data_ptr<float>(),
                 grad_zero_point.mutable_data_ptr<float>());
  return {grad_x, grad_scale, grad_zero_point};
}

template <typename Backend>
Tensor fake_quantize_mixture(const Tensor& x,           // [*] f32|bf16|f16
                             const Tensor& scale,       // [G] f32
                             const Tensor& zero_point,  // [G] f32
                             const Tensor& importance,  // [G] f32
                             int64_t quant_min, int64_t quant_max) {
  const MixtureCall call =
      prepare_mixture("fake_quantize_mixture", x, scale, zero_point, importance, quant_min, quant_max);
  Tensor y = empty_like(x, x.scalar_type());
  Backend(x).run(Backend::fake_quantize_mixture, call.args, y.mutable_data_ptr());
  return y;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize_mixture_backward(
    const Tensor& grad,  // [*] like x
    const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Tensor& importance,
    int64_t quant_min, int64_t quant_max) {
  const MixtureCall call = prepare_mixture("fake_quantize_mixture_backward", x, scale, zero_point, importance,
                                           quant_min, quant_max);
  const Tensor dense_grad = checked_grad("fake_quantize_mixture_backward", grad, x);
  Tensor grad_x = empty_like(x, x.scalar_type());
  Tensor grad_scale = at::empty(scale.sizes(), scale.options());
  Tensor grad_zero_point = at::empty(scale.sizes(), scale.options());
  Tensor grad_importance = at::empty(scale.sizes(), scale.options());
  Backend(x).run(
      Backend::fake_quantize_mixture_backward, call.args, dense_grad.const_data_ptr(),
      MixtureGrads{grad_x.mutable_data_ptr(), grad_scale.mutable_data_ptr<float>(),
                   grad_zero_point.mutable_data_ptr<float>(), grad_importance.mutable_data_ptr<float>()});
  return {grad_x, grad_scale, grad_zero_point, grad_importance};
}

template <typename Backend>
Tensor hadamard(const Tensor& x,  // [*, C] f32|bf16|f16
                int64_t block) {
  const Rows rows = rows_of_last_dim("hadamard", x);
  check_hadamard("hadamard", "block", block, rows.view.columns);
  Tensor y = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  Backend(x).run(Backend::hadamard, rows.view, block, y.mutable_data_ptr<float>());
  return y;
}

template <typename Backend>
void observe(const Tensor& x,             // [*] f32|bf16|f16
             const Tensor& counts,        // [T, 2049] i64, added to
             const Tensor& extrema,       // [T, 2] f32, widened
             const Tensor& step_index) {  // [1] i32
  check_observer_tables("observe", x, counts, extrema, step_index);
  const Rows rows = rows_in_result_order("observe", x);
  Backend(x).run(Backend::observe, rows.view,
                 ObserverTables{counts.mutable_data_ptr<int64_t>(), extrema.mutable_data_ptr<float>(),
                                step_index.const_data_ptr<int32_t>(), counts.size(0)});
}

}  // namespace elementwise

template <typename Backend>
void register_elementwise(torch::Library& m) {
  m.impl("quantize", &elementwise::quantize<Backend>);
  m.impl("quantize_int4", &elementwise::quantize_int4<Backend>);
  m.impl("dequantize", &elementwise::dequantize<Backend>);
  m.impl("dequantize_int4", &elementwise::dequantize_int4<Backend>);
  m.impl("pack_int4", &elementwise::pack_int4<Backend>);
  m.impl("unpack_int4", &elementwise::unpack_int4<Backend>);
  m.impl("fake_quantize", &elementwise::fake_quantize<Backend>);
  m.impl("fake_quantize_backward", &elementwise::fake_quantize_backward<Backend>);
  m.impl("fake_quantize_mixture", &elementwise::fake_quantize_mixture<Backend>);
  m.impl("fake_quantize_mixture_backward", &elementwise::fake_quantize_mixture_backward<Backend>);
  m.impl("hadamard", &elementwise::hadamard<Backend>);
  m.impl("observe", &elementwise::observe<Backend>);
}

}  // namespace adpdm::bindings
