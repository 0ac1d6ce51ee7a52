// Checks of arguments, one sentence each, and the choice of layouts.
#include "bindings/prepare.h"

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <string>

#include "core/hadamard.h"
#include "core/quant_math.h"

namespace adpdm::bindings {
namespace {

// "torch.int64", as the user wrote it.
std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kHalf:
      return "torch.float16";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kByte:
      return "torch.uint8";
    case at::kChar:
      return "torch.int8";
    case at::kShort:
      return "torch.int16";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    case at::kBool:
      return "torch.bool";
    default:
      return c10::toString(dtype);
  }
}

void check_range(OpName op, int64_t quant_min, int64_t quant_max) {
  TORCH_CHECK_VALUE(quant_min < quant_max && quant_min >= -128 && quant_max <= 255, op,
                    ": quant_min < quant_max must lie in [-128, 255], got quant_min=", quant_min,
                    " and quant_max=", quant_max);
}

CodeRange code_range(int64_t quant_min, int64_t quant_max) {
  return {static_cast<int32_t>(quant_min), static_cast<int32_t>(quant_max)};
}

void check_group_index(OpName op, const at::Tensor& group_index, const at::Tensor& x) {
  check_vector(op, "group_index", group_index, at::kInt, 1, x);
}

void check_num_groups(OpName op, const at::Tensor& scale) {
  TORCH_CHECK_VALUE(scale.dim() >= 1 && scale.size(0) > 0, op,
                    ": scale must have num_groups > 0 rows, got shape ", scale.sizes());
}

// Learnable parameters: the dimensions of scale, and zero_point of the same shape.
void check_learnable(OpName op, const char* name, const at::Tensor& tensor, const at::Tensor& scale,
                     const at::Tensor& x) {
  check_dtype(op, name, tensor, at::kFloat);
  check_device(op, name, tensor, x);
  TORCH_CHECK_VALUE(tensor.sizes() == scale.sizes(), op, ": ", name, " must have the shape of scale ",
                    scale.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                    tensor.strides());
}

// The distance between rows if the elements of all dimensions but the last are evenly spaced and the last is
// contiguous, else -1.
int64_t row_stride(const at::Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) return -1;
  int64_t stride = x.size(last);  // of one row alone: any
  int64_t expected = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (expected >= 0 && x.stride(d) != expected) return -1;
    if (expected < 0) stride = x.stride(d);
    expected = x.stride(d) * x.size(d);
  }
  return stride >= x.size(last) ? stride : -1;  // expanded and overlapping tensors are copied
}

Rows make_rows(const at::Tensor& owner, FloatType type, int64_t rows, int64_t columns, int64_t stride) {
  return {owner, {owner.const_data_ptr(), type, rows, columns, stride}};
}

// Whether each image of x [N, C, H, W] is contiguous by itself.
bool images_are_dense(const at::Tensor& x) {
  int64_t expected = 1;
  for (int64_t d = 3; d > 0; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

ChannelView channel_view(OpName op, const at::Tensor& x, int64_t channel_axis, bool channels_last) {
  if (channel_axis < 0) return {1, 1, x.numel()};
  TORCH_CHECK_VALUE(channel_axis < x.dim(), op, ": channel_axis must be -1 or in [0, ", x.dim(), "), got ",
                    channel_axis);
  // In memory, channels_last puts dimension 1 after 2 and 3.
  const int64_t order_contiguous[4] = {0, 1, 2, 3}, order_last[4] = {0, 2, 3, 1};
  ChannelView view{1, x.size(channel_axis), 1};
  bool before = true;
  for (int64_t d = 0; d < x.dim(); ++d) {
    const int64_t axis = x.dim() == 4 ? (channels_last ? order_last[d] : order_contiguous[d]) : d;
    if (axis == channel_axis) {
      before = false;
    } else {
      (before ? view.outer : view.inner) *= x.size(axis);
    }
  }
  return view;
}

}  // namespace

FloatType float_type(OpName op, const char* name, at::ScalarType dtype) {
  if (dtype == at::kFloat) return FloatType::kFloat32;
  if (dtype == at::kBFloat16) return FloatType::kBFloat16;
  TORCH_CHECK_TYPE(dtype == at::kHalf, op, ": ", name,
                   " must be torch.float32, torch.bfloat16 or torch.float16, got ", dtype_name(dtype));
  return FloatType::kFloat16;
}

void check_dtype(OpName op, const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
                   dtype_name(tensor.scalar_type()));
}

void check_device(OpName op, const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", name, " must be on ", x.device(),
                    " with the input, got ", tensor.device());
}

void check_vector(OpName op, const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t size,
                  const at::Tensor& x) {
  check_dtype(op, name, tensor, dtype);
  check_device(op, name, tensor, x);
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == size, op, ": ", name, " must have shape [", size,
                    "], got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got stride ",
                    tensor.stride(0));
}

void check_matrix(OpName op, const char* name, const at::Tensor& matrix, at::ScalarType dtype, int64_t rows,
                  int64_t columns, const at::Tensor& x) {
  check_dtype(op, name, matrix, dtype);
  check_device(op, name, matrix, x);
  const auto fits = [](int64_t size, int64_t wanted) { return wanted == kAny || size == wanted; };
  const auto word = [](int64_t wanted) { return wanted == kAny ? "any" : std::to_string(wanted); };
  TORCH_CHECK_VALUE(matrix.dim() == 2 && fits(matrix.size(0), rows) && fits(matrix.size(1), columns), op,
                    ": ", name, " must have shape [", word(rows), ", ", word(columns), "], got ",
                    matrix.sizes());
  TORCH_CHECK_VALUE(matrix.is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                    matrix.strides());
}

void check_num_bits(OpName op, int64_t num_bits) {
  TORCH_CHECK_VALUE(num_bits >= 2 && num_bits <= 8, op, ": num_bits must be in [2, 8], got ", num_bits);
}

void check_hadamard(OpName op, const char* name, int64_t block, int64_t channels) {
  TORCH_CHECK_VALUE(is_hadamard_block(block), op, ": ", name, " must be 4, 16 or 64, got ", block);
  TORCH_CHECK_VALUE(channels % block == 0, op, ": x must have a multiple of ", name, "=", block,
                    " channels, got ", channels);
}

GroupedQParams grouped_qparams(OpName op, const at::Tensor& x, const at::Tensor& scale,
                               const at::Tensor& zero_point, const at::Tensor& group_index) {
  check_num_groups(op, scale);
  const int64_t num_groups = scale.size(0);
  check_vector(op, "scale", scale, at::kFloat, num_groups, x);
  check_vector(op, "zero_point", zero_point, at::kInt, num_groups, x);
  check_group_index(op, group_index, x);
  return {scale.const_data_ptr<float>(), zero_point.const_data_ptr<int32_t>(),
          group_index.const_data_ptr<int32_t>(), num_groups};
}

at::MemoryFormat result_format(const at::Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous() || x.stride(1) != 1) return at::MemoryFormat::Contiguous;
  const bool channels_last = x.size(1) > 1 || x.stride(3) == x.size(1);
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

at::Tensor empty_like(const at::Tensor& x, at::ScalarType dtype) {
  return at::empty(x.sizes(), x.options().dtype(dtype).memory_format(result_format(x)));
}

at::Tensor dense(const at::Tensor& x) { return x.contiguous(result_format(x)); }

Rows rows_in_result_order(OpName op, const at::Tensor& x) {
  const FloatType type = float_type(op, "x", x.scalar_type());
  const int64_t size = x.numel();
  const at::MemoryFormat format = result_format(x);
  if (x.is_contiguous(format) || size == 0) return make_rows(x, type, 1, size, size);
  const at::Tensor ordered = format == at::MemoryFormat::ChannelsLast ? x.permute({0, 2, 3, 1}) : x;
  const int64_t stride = ordered.dim() == 0 ? -1 : row_stride(ordered);
  if (stride < 0) return make_rows(dense(x), type, 1, size, size);
  const int64_t columns = ordered.size(-1);
  return make_rows(x, type, size / columns, columns, stride);
}

bool has_channels_last(const at::Tensor& x) {
  constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;
  return x.is_contiguous(kChannelsLast) || result_format(x) == kChannelsLast;
}

Planes planes_of(OpName op, const at::Tensor& x) {
  const FloatType type = float_type(op, "x", x.scalar_type());
  const at::Tensor owner = images_are_dense(x) ? x : x.contiguous();
  const int64_t pixels = x.size(2) * x.size(3);
  return {owner, {owner.const_data_ptr(), type, x.size(0), x.size(1), pixels, owner.stride(0)}};
}

MatrixShape matrix_shape(OpName op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": ", name, " must have at least one dimension, got a scalar");
  const int64_t columns = x.size(-1);
  return {columns == 0 ? 0 : x.numel() / columns, columns};
}

Rows rows_of_last_dim(OpName op, const at::Tensor& x) {
  const FloatType type = float_type(op, "x", x.scalar_type());
  const MatrixShape shape = matrix_shape(op, "x", x);
  if (x.numel() == 0) return make_rows(x, type, 0, shape.columns, shape.columns);
  const int64_t stride = row_stride(x);
  if (stride < 0) return make_rows(x.contiguous(), type, shape.rows, shape.columns, shape.columns);
  return make_rows(x, type, shape.rows, shape.columns, stride);
}

at::Tensor checked_packed(OpName op, const at::Tensor& packed, int64_t num_columns) {
  check_dtype(op, "packed", packed, at::kByte);
  TORCH_CHECK_VALUE(num_columns >= 0, op, ": num_columns must not be negative, got ", num_columns);
  TORCH_CHECK_VALUE(packed.dim() >= 1, op, ": packed must have at least one dimension, got a scalar");
  TORCH_CHECK_VALUE(packed.size(-1) == int4_row_bytes(num_columns), op, ": packed must have ",
                    int4_row_bytes(num_columns), " bytes per row for num_columns=", num_columns, ", got ",
                    packed.size(-1));
  return packed.contiguous();
}

at::DimVector with_last_dim(const at::Tensor& x, int64_t last) {
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return shape;
}

FakeQuantizeCall prepare_fake_quantize(OpName op, const at::Tensor& x, const at::Tensor& scale,
                                       const at::Tensor& zero_point, const at::Tensor& group_index,
                                       int64_t quant_min, int64_t quant_max, int64_t channel_axis) {
  const FloatType type = float_type(op, "x", x.scalar_type());
  check_range(op, quant_min, quant_max);
  check_num_groups(op, scale);
  check_learnable(op, "scale", scale, scale, x);
  check_learnable(op, "zero_point", zero_point, scale, x);
  check_group_index(op, group_index, x);
  TORCH_CHECK_VALUE(channel_axis >= -1, op, ": channel_axis must be -1 or a dimension of x, got ",
                    channel_axis);
  const ChannelView view =
      channel_view(op, x, channel_axis, result_format(x) == at::MemoryFormat::ChannelsLast);
  const int64_t num_groups = scale.size(0);
  if (channel_axis < 0) {
    TORCH_CHECK_VALUE(scale.dim() == 1, op, ": scale must have shape [num_groups] without channel_axis, got ",
                      scale.sizes());
  } else {
    TORCH_CHECK_VALUE(scale.dim() == 2 && scale.size(1) == view.channels, op,
                      ": scale must have shape [num_groups, ", view.channels,
                      "] for channel_axis=", channel_axis, ", got ", scale.sizes());
  }
  FakeQuantizeCall call{dense(x), {}};
  call.args = {call.x.const_data_ptr(),
               type,
               view,
               scale.const_data_ptr<float>(),
               zero_point.const_data_ptr<float>(),
               group_index.const_data_ptr<int32_t>(),
               num_groups,
               code_range(quant_min, quant_max)};
  return call;
}

MixtureCall prepare_mixture(OpName op, const at::Tensor& x, const at::Tensor& scale,
                            const at::Tensor& zero_point, const at::Tensor& importance, int64_t quant_min,
                            int64_t quant_max) {
  const FloatType type = float_type(op, "x", x.scalar_type());
  check_range(op, quant_min, quant_max);
  check_num_groups(op, scale);
  const int64_t num_groups = scale.size(0);
  check_vector(op, "scale", scale, at::kFloat, num_groups, x);
  check_vector(op, "zero_point", zero_point, at::kFloat, num_groups, x);
  check_vector(op, "importance", importance, at::kFloat, num_groups, x);
  MixtureCall call{dense(x), {}};
  call.args = {call.x.const_data_ptr(),
               type,
               x.numel(),
               scale.const_data_ptr<float>(),
               zero_point.const_data_ptr<float>(),
               importance.const_data_ptr<float>(),
               num_groups,
               code_range(quant_min, quant_max)};
  return call;
}

at::Tensor checked_grad(OpName op, const at::Tensor& grad, const at::Tensor& x) {
  check_dtype(op, "grad", grad, x.scalar_type());
  check_device(op, "grad", grad, x);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), op, ": grad must have the shape of x ", x.sizes(), ", got ",
                    grad.sizes());
  return grad.contiguous(result_format(x));
}

void check_observer_tables(OpName op, const at::Tensor& x, const at::Tensor& counts,
                           const at::Tensor& extrema, const at::Tensor& step_index) {
  check_matrix(op, "counts", counts, at::kLong, kAny, kHistogramBins, x);
  check_matrix(op, "extrema", extrema, at::kFloat, counts.size(0), 2, x);
  check_vector(op, "step_index", step_index, at::kInt, 1, x);
}

}  // namespace adpdm::bindings
