// Checks of arguments and description of tensors as plain structs, shared by the CPU and CUDA bindings.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "core/fake_quantize.h"
#include "core/quantize.h"
#include "core/row_view.h"

namespace adpdm::bindings {

// The op being prepared, for sentences like "quantize: scale must be float32, got torch.int64".
using OpName = const char*;

// float32, bfloat16 or float16, else TypeError.
FloatType float_type(OpName op, const char* name, at::ScalarType dtype);

// Raise TypeError unless the tensor has that dtype; ValueError unless it is on the device of `x`.
void check_dtype(OpName op, const char* name, const at::Tensor& tensor, at::ScalarType dtype);
void check_device(OpName op, const char* name, const at::Tensor& tensor, const at::Tensor& x);

// A contiguous vector of `size` elements of that dtype on the device of x.
void check_vector(OpName op, const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t size,
                  const at::Tensor& x);

constexpr int64_t kAny = -1;

// A contiguous matrix of that dtype on the device of x, of as many rows and columns as given or kAny.
void check_matrix(OpName op, const char* name, const at::Tensor& matrix, at::ScalarType dtype, int64_t rows,
                  int64_t columns, const at::Tensor& x);

void check_num_bits(OpName op, int64_t num_bits);

// ValueError unless `block` of so many channels can be rotated together (core/hadamard.h).
void check_hadamard(OpName op, const char* name, int64_t block, int64_t channels);

// scale [G] f32, zero_point [G] i32, group_index [1] i32, all on x's device.
GroupedQParams grouped_qparams(OpName op, const at::Tensor& x, const at::Tensor& scale,
                               const at::Tensor& zero_point, const at::Tensor& group_index);

// The layout of results of x's shape: channels_last for 4-D x that is (or is a channel slice of)
// channels_last.
at::MemoryFormat result_format(const at::Tensor& x);

// An uninitialised dense tensor of x's shape.
at::Tensor empty_like(const at::Tensor& x, at::ScalarType dtype);

// x dense in result_format(x); a copy only where it is not.
at::Tensor dense(const at::Tensor& x);

// A float tensor as rows in the order of empty_like(x): in place where its rows are contiguous, else a copy.
struct Rows {
  at::Tensor owner;  // keeps view.data alive
  RowView view;
};
Rows rows_in_result_order(OpName op, const at::Tensor& x);

// Whether x [N, C, H, W], or the tensor it is a channel slice of, has its channels last in memory:
// rows_in_result_order then gives the order of a channels_last result.
bool has_channels_last(const at::Tensor& x);

// A float tensor [N, C, H, W] with its channels first: in place where its images are dense, else a copy.
struct Planes {
  at::Tensor owner;  // keeps view.data alive
  PlanesView view;
};
Planes planes_of(OpName op, const at::Tensor& x);

// A tensor [*, K] whose rows are its last dimension.
struct MatrixShape {
  int64_t rows;
  int64_t columns;
};
MatrixShape matrix_shape(OpName op, const char* name, const at::Tensor& x);

// A float tensor [*, K] with its last dimension as rows; a copy only if their distance varies.
Rows rows_of_last_dim(OpName op, const at::Tensor& x);

// packed [*, int4_row_bytes(num_columns)] u8, contiguous afterwards.
at::Tensor checked_packed(OpName op, const at::Tensor& packed, int64_t num_columns);

// Shape [*, last] of a result that replaces x's last dimension.
at::DimVector with_last_dim(const at::Tensor& x, int64_t last);

// x dense; scale and zero_point [G] f32, or [G, C] with channel_axis >= 0; group_index [1] i32.
struct FakeQuantizeCall {
  at::Tensor x;  // keeps args.x alive, in result_format
  FakeQuantizeArgs args;
};
FakeQuantizeCall prepare_fake_quantize(OpName op, const at::Tensor& x, const at::Tensor& scale,
                                       const at::Tensor& zero_point, const at::Tensor& group_index,
                                       int64_t quant_min, int64_t quant_max, int64_t channel_axis);

// x dense; scale, zero_point, importance [G] f32.
struct MixtureCall {
  at::Tensor x;
  MixtureArgs args;
};
MixtureCall prepare_mixture(OpName op, const at::Tensor& x, const at::Tensor& scale,
                            const at::Tensor& zero_point, const at::Tensor& importance, int64_t quant_min,
                            int64_t quant_max);

// grad of x's shape, dtype and device, in the layout of the dense x.
at::Tensor checked_grad(OpName op, const at::Tensor& grad, const at::Tensor& x);

// counts [T, kHistogramBins] i64, extrema [T, 2] f32, step_index [1] i32, all contiguous on x's device.
void check_observer_tables(OpName op, const at::Tensor& x, const at::Tensor& counts,
                           const at::Tensor& extrema, const at::Tensor& step_index);

}  // namespace adpdm::bindings
