// Implements the checks of igemm_prepare.h.
#include "bindings/igemm_prepare.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include "bindings/prepare.h"

namespace adpdm::bindings {
namespace {

void check_list(OpName op, OpName name, at::TensorList list, size_t segments) {
  TORCH_CHECK_VALUE(list.size() == segments, op, ": ", name, " must have one tensor per input=", segments,
                    ", got ", list.size());
}

void check_lists(OpName op, const SegmentLists& lists) {
  const size_t segments = lists.inputs.size();
  TORCH_CHECK_VALUE(segments >= 1 && segments <= kMaxSegments, op, ": inputs must be 1 or 2 tensors, got ",
                    segments);
  check_list(op, "scales", lists.scales, segments);
  check_list(op, "zero_points", lists.zero_points, segments);
  check_list(op, "group_indices", lists.group_indices, segments);
  check_list(op, "weights", lists.weights, segments);
  check_list(op, "weight_scales", lists.weight_scales, segments);
  check_list(op, "weight_sums", lists.weight_sums, segments);
}

// Names of list elements in error sentences, ready made because they are passed on every call.
struct ElementNames {
  OpName input, scale, zero_point, group_index, weight, weight_scale, weight_sum;
};
constexpr ElementNames kNames[kMaxSegments] = {
    {"inputs[0]", "scales[0]", "zero_points[0]", "group_indices[0]", "weights[0]", "weight_scales[0]",
     "weight_sums[0]"},
    {"inputs[1]", "scales[1]", "zero_points[1]", "group_indices[1]", "weights[1]", "weight_scales[1]",
     "weight_sums[1]"},
};

// Fills everything but codes.
IgemmSegment make_segment(OpName op, const SegmentLists& lists, size_t s, int64_t outputs, int64_t channels) {
  const ElementNames& names = kNames[s];
  const at::Tensor& x = lists.inputs[0];
  const int64_t num_groups = lists.scales[s].numel();
  check_dtype(op, names.input, lists.inputs[s], at::kChar);
  check_device(op, names.input, lists.inputs[s], x);
  TORCH_CHECK_VALUE(num_groups >= 1, op, ": ", names.scale, " must have at least 1 element, got 0");
  check_vector(op, names.scale, lists.scales[s], at::kFloat, num_groups, x);
  check_vector(op, names.zero_point, lists.zero_points[s], at::kInt, num_groups, x);
  check_vector(op, names.group_index, lists.group_indices[s], at::kInt, 1, x);
  check_vector(op, names.weight, lists.weights[s], at::kByte, lists.weights[s].numel(), x);
  check_vector(op, names.weight_scale, lists.weight_scales[s], at::kFloat, outputs, x);
  check_vector(op, names.weight_sum, lists.weight_sums[s], at::kInt, outputs, x);
  IgemmSegment segment{};
  segment.channels = channels;
  segment.weight = lists.weights[s].const_data_ptr<uint8_t>();
  segment.weight_scale = lists.weight_scales[s].const_data_ptr<float>();
  segment.weight_sum = lists.weight_sums[s].const_data_ptr<int32_t>();
  segment.qparams = {lists.scales[s].const_data_ptr<float>(), lists.zero_points[s].const_data_ptr<int32_t>(),
                     lists.group_indices[s].const_data_ptr<int32_t>(), num_groups};
  return segment;
}

const float* bias_pointer(OpName op, const std::optional<at::Tensor>& bias, const at::Tensor& x,
                          int64_t outputs) {
  if (!bias.has_value()) return nullptr;
  check_vector(op, "bias", *bias, at::kFloat, outputs, x);
  return bias->const_data_ptr<float>();
}

int checked_bits(OpName op, OpName name, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, op, ": ", name, " must be 2..8, got ", bits);
  return static_cast<int>(bits);
}

void check_reduction(OpName op, int64_t reduction) {
  TORCH_CHECK_VALUE(reduction <= kMaxReduction, op, ": channels per group times kernel size must be at most ",
                    kMaxReduction, " for exact int32 sums, got ", reduction);
}

Size2d checked_pair(OpName name, at::IntArrayRef values, int64_t minimum) {
  TORCH_CHECK_VALUE(values.size() == 2 && values[0] >= minimum && values[1] >= minimum, "conv2d: ", name,
                    " must be 2 numbers of at least ", minimum, ", got ", values);
  return {values[0], values[1]};
}

void check_geometry(const Conv2dArgs& args) {
  TORCH_CHECK_VALUE(args.out_channels >= 1, "conv2d: out_channels must be at least 1, got ",
                    args.out_channels);
  TORCH_CHECK_VALUE(args.groups >= 1 && args.out_channels % args.groups == 0,
                    "conv2d: groups must divide out_channels=", args.out_channels, ", got ", args.groups);
  TORCH_CHECK_VALUE(args.groups == 1 || args.num_segments == 1,
                    "conv2d: groups must be 1 with two inputs, got ", args.groups);
  TORCH_CHECK_VALUE(
      args.out.height >= 1 && args.out.width >= 1, "conv2d: kernel_size with dilation must fit the padded ",
      args.input.height + 2 * args.padding.height, "x", args.input.width + 2 * args.padding.width,
      " input, got ", args.dilation.height * (args.kernel.height - 1) + 1, "x",
      args.dilation.width * (args.kernel.width - 1) + 1);
}

// The part of Conv2dArgs that the geometry and the first input decide.
Conv2dArgs conv2d_args(const SegmentLists& lists, const ConvGeometry& geometry) {
  const at::Tensor& first = lists.inputs[0];
  TORCH_CHECK_VALUE(first.dim() == 4, "conv2d: inputs[0] must have 4 dimensions [N, C, H, W], got ",
                    first.dim());
  Conv2dArgs args{};
  args.num_segments = static_cast<int>(lists.inputs.size());
  args.batch = first.size(0);
  args.out_channels = geometry.out_channels;
  args.input = {first.size(2), first.size(3)};
  args.kernel = checked_pair("kernel_size", geometry.kernel_size, 1);
  args.stride = checked_pair("stride", geometry.stride, 1);
  args.padding = checked_pair("padding", geometry.padding, 0);
  args.padding_end = args.padding;
  args.upsample = 1;
  args.dilation = checked_pair("dilation", geometry.dilation, 1);
  args.groups = geometry.groups;
  args.out = {conv_out_size(args.input.height + 2 * args.padding.height, args.kernel.height,
                            args.stride.height, args.dilation.height),
              conv_out_size(args.input.width + 2 * args.padding.width, args.kernel.width, args.stride.width,
                            args.dilation.width)};
  check_geometry(args);
  return args;
}

void check_conv_input(const Conv2dArgs& args, const at::Tensor& input, size_t s) {
  const bool same = input.dim() == 4 && input.size(0) == args.batch && input.size(2) == args.input.height &&
                    input.size(3) == args.input.width;
  TORCH_CHECK_VALUE(same, "conv2d: inputs[", s, "] must be [", args.batch, ", C, ", args.input.height, ", ",
                    args.input.width, "] as inputs[0], got ", input.sizes());
  TORCH_CHECK_VALUE(input.size(1) % args.groups == 0, "conv2d: groups must divide the ", input.size(1),
                    " channels of inputs[", s, "], got ", args.groups);
  check_reduction("conv2d", input.size(1) / args.groups * args.kernel.height * args.kernel.width);
}

void check_linear_input(const at::Tensor& first, const at::Tensor& input, size_t s) {
  TORCH_CHECK_VALUE(input.dim() >= 1, "linear: inputs[", s, "] must have at least 1 dimension, got 0");
  TORCH_CHECK_VALUE(input.sizes().slice(0, input.dim() - 1).equals(first.sizes().slice(0, first.dim() - 1)),
                    "linear: inputs[", s, "] must equal inputs[0] in all but the last dimension, got ",
                    input.sizes(), " and ", first.sizes());
  check_reduction("linear", input.size(-1));
}

}  // namespace

PreparedLinear prepare_linear(const SegmentLists& lists, const std::optional<at::Tensor>& bias,
                              int64_t out_features, int64_t weight_bits, at::ScalarType dtype) {
  check_lists("linear", lists);
  TORCH_CHECK_VALUE(out_features >= 1, "linear: out_features must be at least 1, got ", out_features);
  PreparedLinear prepared{};
  LinearArgs& args = prepared.args;
  const at::Tensor& first = lists.inputs[0];
  args.num_segments = static_cast<int>(lists.inputs.size());
  args.out_features = out_features;
  args.weight_bits = checked_bits("linear", "weight_bits", weight_bits);
  const FloatType type = float_type("linear", "dtype", dtype);
  const float* bias_data = bias_pointer("linear", bias, first, out_features);
  for (size_t s = 0; s < lists.inputs.size(); ++s) {
    const at::Tensor& input = lists.inputs[s];
    check_linear_input(first, input, s);
    args.segments[s] = make_segment("linear", lists, s, out_features, input.size(-1));
  }
  for (size_t s = 0; s < lists.inputs.size(); ++s) {
    prepared.inputs[s] = lists.inputs[s].contiguous();
    args.segments[s].codes = prepared.inputs[s].const_data_ptr<int8_t>();
  }
  at::DimVector sizes(first.sizes().begin(), first.sizes().end());
  sizes.back() = out_features;
  prepared.output = at::empty(sizes, first.options().dtype(dtype));
  args.rows = args.rows_per_image = prepared.output.numel() / out_features;
  args.output = plain_output(bias_data, prepared.output.data_ptr(), type);
  return prepared;
}

PreparedConv2d prepare_conv2d(const SegmentLists& lists, const std::optional<at::Tensor>& bias,
                              const ConvGeometry& geometry, int64_t weight_bits, at::ScalarType dtype) {
  check_lists("conv2d", lists);
  PreparedConv2d prepared{};
  prepared.args = conv2d_args(lists, geometry);
  Conv2dArgs& args = prepared.args;
  const at::Tensor& first = lists.inputs[0];
  args.weight_bits = checked_bits("conv2d", "weight_bits", weight_bits);
  const FloatType type = float_type("conv2d", "dtype", dtype);
  const float* bias_data = bias_pointer("conv2d", bias, first, args.out_channels);
  for (size_t s = 0; s < lists.inputs.size(); ++s) {
    const at::Tensor& input = lists.inputs[s];
    check_conv_input(args, input, s);
    args.segments[s] = make_segment("conv2d", lists, s, args.out_channels, input.size(1));
  }
  for (size_t s = 0; s < lists.inputs.size(); ++s) {
    prepared.inputs[s] = lists.inputs[s].contiguous(at::MemoryFormat::ChannelsLast);
    args.segments[s].codes = prepared.inputs[s].const_data_ptr<int8_t>();
  }
  prepared.output = at::empty({args.batch, args.out_channels, args.out.height, args.out.width},
                              first.options().dtype(dtype), at::MemoryFormat::ChannelsLast);
  args.output = plain_output(bias_data, prepared.output.data_ptr(), type);
  return prepared;
}

PackWeightArgs prepare_pack_weight(const at::Tensor& codes, int64_t num_bits, int64_t groups) {
  PackWeightArgs args{};
  args.num_bits = checked_bits("pack_weight", "num_bits", num_bits);
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kChar, "pack_weight: codes must be Char, got ",
                   codes.scalar_type());
  TORCH_CHECK_VALUE(codes.dim() == 2 || codes.dim() == 4,
                    "pack_weight: codes must be [O, K] or [O, C / groups, kh, kw], got ", codes.sizes());
  TORCH_CHECK_VALUE(groups >= 1 && codes.size(0) % groups == 0,
                    "pack_weight: groups must divide out_channels=", codes.size(0), ", got ", groups);
  args.out_channels = codes.size(0);
  args.group_channels = codes.size(1);
  args.taps = codes.dim() == 4 ? codes.size(2) * codes.size(3) : 1;
  args.groups = groups;
  check_reduction("pack_weight", args.group_channels * args.taps);
  if (codes.numel() == 0) return args;
  const CodeRange range = signed_range(args.num_bits);
  const int lowest = codes.min().item<int8_t>();
  const int highest = codes.max().item<int8_t>();
  TORCH_CHECK_VALUE(lowest >= range.quant_min && highest <= range.quant_max,
                    "pack_weight: codes must be in [", range.quant_min, ", ", range.quant_max,
                    "] for num_bits=", num_bits, ", got [", lowest, ", ", highest, "]");
  return args;
}

}  // namespace adpdm::bindings
