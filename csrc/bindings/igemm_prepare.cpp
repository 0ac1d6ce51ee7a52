// Implements the checks of igemm_prepare.h.
#include "bindings/igemm_prepare.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "bindings/prepare.h"

namespace adpdm::bindings {
namespace {

constexpr size_t kSegmentTensors = 7;
constexpr size_t kGeometryNumbers = 13;
// Of kernels, strides, padding and dilation: with fewer than 2^46 codes, no step between codes overflows.
constexpr int64_t kMaxGeometry = int64_t{1} << 16;
constexpr double kMaxCodes = 0x1p46;

// The tensors of segment s, by name.
struct SegmentTensors {
  const at::Tensor &input, &scale, &zero_point, &group_index, &weight, &weight_scale, &weight_sum;
};

SegmentTensors segment_tensors(const IgemmTensors& t, int s) {
  const at::TensorList l = t.second;
  if (s == 1) return {l[0], l[1], l[2], l[3], l[4], l[5], l[6]};
  return {t.input, t.scale, t.zero_point, t.group_index, t.weight, t.weight_scale, t.weight_sum};
}

int count_segments(OpName op, const IgemmTensors& tensors) {
  if (tensors.second.empty()) return 1;
  TORCH_CHECK_VALUE(
      tensors.second.size() == kSegmentTensors, op, ": second must be 0 or ", kSegmentTensors,
      " tensors (input, scale, zero_point, group_index, weight, weight_scale, weight_sum), got ",
      tensors.second.size());
  return 2;
}

GroupedQParams checked_qparams(OpName op, OpName scale_name, const at::Tensor& scale, OpName zero_point_name,
                               const at::Tensor& zero_point, OpName group_index_name,
                               const at::Tensor& group_index, const at::Tensor& x) {
  const int64_t num_groups = scale.numel();
  TORCH_CHECK_VALUE(num_groups >= 1, op, ": ", scale_name, " must have at least 1 element, got 0");
  check_vector(op, scale_name, scale, at::kFloat, num_groups, x);
  check_vector(op, zero_point_name, zero_point, at::kInt, num_groups, x);
  check_vector(op, group_index_name, group_index, at::kInt, 1, x);
  return {scale.const_data_ptr<float>(), zero_point.const_data_ptr<int32_t>(),
          group_index.const_data_ptr<int32_t>(), num_groups};
}

bool is_packed(const at::Tensor& input) { return input.scalar_type() == at::kByte; }

void check_input_type(OpName op, OpName name, const at::Tensor& input, const at::Tensor& x) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kChar || is_packed(input), op, ": ", name,
                   " must be torch.int8, or packed codes of torch.uint8, got ", input.scalar_type());
  check_device(op, name, input, x);
}

// Fills everything but codes.
IgemmSegment make_segment(OpName op, const IgemmTensors& tensors, int s, int64_t outputs, int64_t channels) {
  const SegmentNames& names = kSegmentNames[s];
  const SegmentTensors t = segment_tensors(tensors, s);
  const at::Tensor& x = tensors.input;
  IgemmSegment segment{};
  segment.qparams = checked_qparams(op, names.scale, t.scale, names.zero_point, t.zero_point,
                                    names.group_index, t.group_index, x);
  check_vector(op, names.weight, t.weight, at::kByte, t.weight.numel(), x);
  check_vector(op, names.weight_scale, t.weight_scale, at::kFloat, outputs, x);
  check_vector(op, names.weight_sum, t.weight_sum, at::kInt, outputs, x);
  segment.packed = is_packed(t.input);
  segment.channels = channels;
  segment.weight = t.weight.const_data_ptr<uint8_t>();
  segment.weight_scale = t.weight_scale.const_data_ptr<float>();
  segment.weight_sum = t.weight_sum.const_data_ptr<int32_t>();
  return segment;
}

int checked_bits(OpName op, OpName name, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, op, ": ", name, " must be 2..8, got ", bits);
  return static_cast<int>(bits);
}

void check_reduction(OpName op, int64_t reduction) {
  TORCH_CHECK_VALUE(reduction >= 1 && reduction <= kMaxReduction, op,
                    ": channels per group times kernel size must be 1 to ", kMaxReduction,
                    " for exact int32 sums, got ", reduction);
}

Activation checked_activation(OpName op, const OutputOptions& options, int64_t outputs) {
  TORCH_CHECK_VALUE(options.activation >= 0 && options.activation <= 4, op,
                    ": activation must be 0 (none), 1 (silu), 2 (geglu), 3 (gelu) or 4 (gelu_tanh), got ",
                    options.activation);
  const auto activation = static_cast<Activation>(options.activation);
  if (activation != Activation::kGeglu) return activation;
  TORCH_CHECK_VALUE(outputs % 2 == 0, op, ": geglu takes pairs of outputs, got ", outputs, " outputs");
  TORCH_CHECK_VALUE(!options.residual.has_value(), op, ": residual must be missing with geglu, got one");
  return activation;
}

void check_output_qparams(OpName op, const OutputOptions& options, const at::Tensor& x, IgemmOutput& output) {
  const size_t wanted = options.output_bits == 0 ? 0 : 3;
  TORCH_CHECK_VALUE(options.qparams.size() == wanted, op, ": output_qparams must be ", wanted,
                    " tensors with output_bits=", options.output_bits, ", got ", options.qparams.size());
  if (wanted == 0) return;
  output.num_bits = checked_bits(op, "output_bits", options.output_bits);
  output.qparams = checked_qparams(op, "output scale", options.qparams[0], "output zero_point",
                                   options.qparams[1], "output group_index", options.qparams[2], x);
}

// All that does not depend on the shape of the result; residual and data are missing.
IgemmOutput make_output(OpName op, const OutputOptions& options, const at::Tensor& x, int64_t outputs) {
  IgemmOutput output{};
  output.type = float_type(op, "dtype", options.dtype);
  output.activation = checked_activation(op, options, outputs);
  output.output_scale = static_cast<float>(options.output_scale);
  TORCH_CHECK_VALUE(std::isfinite(output.output_scale), op, ": output_scale must be finite, got ",
                    options.output_scale);
  check_output_qparams(op, options, x, output);
  if (options.bias.has_value()) {
    check_vector(op, "bias", *options.bias, at::kFloat, outputs, x);
    output.bias = options.bias->const_data_ptr<float>();
  }
  return output;
}

// Values [images, outputs] f32 that an image's rows share.
const float* image_rows(OpName op, OpName name, const at::Tensor& rows, const at::Tensor& x, int64_t images,
                        int64_t outputs) {
  check_matrix(op, name, rows, at::kFloat, images, outputs, x);
  return rows.const_data_ptr<float>();
}

void set_image_rows(OpName op, const OutputOptions& options, const at::Tensor& x, int64_t images,
                    int64_t outputs, IgemmOutput& output) {
  if (options.row_scale.has_value()) {
    output.row_scale = image_rows(op, "row_scale", *options.row_scale, x, images, outputs);
  }
  if (options.row_bias.has_value()) {
    output.row_bias = image_rows(op, "row_bias", *options.row_bias, x, images, outputs);
  }
}

// Allocates the result, and brings the residual into its layout.
template <typename Args>
void set_tensors(OpName op, const OutputOptions& options, const at::Tensor& x, at::IntArrayRef sizes,
                 at::MemoryFormat format, Prepared<Args>& prepared) {
  IgemmOutput& output = prepared.args.output;
  if (options.residual.has_value()) {
    const at::Tensor& residual = *options.residual;
    output.residual_type = float_type(op, "residual", residual.scalar_type());
    check_device(op, "residual", residual, x);
    TORCH_CHECK_VALUE(residual.sizes() == sizes, op, ": residual must have the shape of the result ", sizes,
                      ", got ", residual.sizes());
    prepared.residual = residual.contiguous(format);
    output.residual = prepared.residual.const_data_ptr();
  }
  const at::ScalarType dtype = output.num_bits > 0 ? at::kChar : options.dtype;
  prepared.output = at::empty(sizes, x.options().dtype(dtype), format);
  output.data = prepared.output.mutable_data_ptr();
}

// Results per row: pairs of outputs become one under geglu.
int64_t result_size(const IgemmOutput& output, int64_t outputs) {
  return output.activation == Activation::kGeglu ? outputs / 2 : outputs;
}

Conv2dArgs checked_geometry(at::IntArrayRef g) {
  TORCH_CHECK_VALUE(g.size() == kGeometryNumbers, "conv2d: geometry must be ", kGeometryNumbers,
                    " numbers (out_channels, kernel h, w, stride h, w, padding top, left, bottom, right, "
                    "dilation h, w, groups, upsample), got ",
                    g.size());
  Conv2dArgs args{};
  args.out_channels = g[0];
  args.kernel = {g[1], g[2]};
  args.stride = {g[3], g[4]};
  args.padding = {g[5], g[6]};
  args.padding_end = {g[7], g[8]};
  args.dilation = {g[9], g[10]};
  args.groups = g[11];
  args.upsample = g[12];
  const auto check_pair = [](OpName name, const Size2d& pair, int64_t minimum) {
    TORCH_CHECK_VALUE(pair.height >= minimum && pair.width >= minimum, "conv2d: ", name,
                      " must be 2 numbers of at least ", minimum, ", got ", pair.height, " and ", pair.width);
    TORCH_CHECK_VALUE(std::max(pair.height, pair.width) < kMaxGeometry, "conv2d: ", name,
                      " must be 2 numbers below ", kMaxGeometry, ", got ", pair.height, " and ", pair.width);
  };
  check_pair("kernel_size", args.kernel, 1);
  check_pair("stride", args.stride, 1);
  check_pair("padding", args.padding, 0);
  check_pair("padding_end", args.padding_end, 0);
  check_pair("dilation", args.dilation, 1);
  TORCH_CHECK_VALUE(args.out_channels >= 1, "conv2d: out_channels must be at least 1, got ",
                    args.out_channels);
  TORCH_CHECK_VALUE(args.groups >= 1 && args.out_channels % args.groups == 0,
                    "conv2d: groups must divide out_channels=", args.out_channels, ", got ", args.groups);
  TORCH_CHECK_VALUE(args.upsample == 1 || args.upsample == 2, "conv2d: upsample must be 1 or 2, got ",
                    args.upsample);
  return args;
}

struct ImageShape {
  int64_t batch, channels;
  Size2d size;
};

// Of codes [N, C, H, W] or packed codes [N, H, W, C / 2].
ImageShape image_shape(OpName name, const at::Tensor& input) {
  const bool packed = is_packed(input);
  TORCH_CHECK_VALUE(input.dim() == 4, "conv2d: ", name, " must have 4 dimensions ",
                    packed ? "[N, H, W, C / 2]" : "[N, C, H, W]", ", got ", input.dim());
  if (!packed) return {input.size(0), input.size(1), {input.size(2), input.size(3)}};
  return {input.size(0), 2 * input.size(3), {input.size(1), input.size(2)}};
}

void check_packed_channels(OpName op, OpName name, const at::Tensor& input, int64_t channels) {
  TORCH_CHECK_VALUE(!is_packed(input) || channels % kInt4Block == 0, op, ": ", name,
                    " holds packed codes, whose last dimension must be a multiple of ", kInt4Block / 2,
                    ", got ", channels / 2);
}

// The sizes that input and geometry give together.
void set_sizes(const ImageShape& image, Conv2dArgs& args) {
  args.batch = image.batch;
  args.input = image.size;
  const int64_t height = args.upsample * image.size.height + args.padding.height + args.padding_end.height;
  const int64_t width = args.upsample * image.size.width + args.padding.width + args.padding_end.width;
  const double codes = static_cast<double>(image.batch) * static_cast<double>(image.channels) *
                       static_cast<double>(height) * static_cast<double>(width);
  TORCH_CHECK_VALUE(codes < kMaxCodes, "conv2d: the padded input must have fewer than 2^46 codes, got ",
                    image.batch, " images of ", image.channels, " channels of ", height, "x", width);
  args.out = {conv_out_size(height, args.kernel.height, args.stride.height, args.dilation.height),
              conv_out_size(width, args.kernel.width, args.stride.width, args.dilation.width)};
  TORCH_CHECK_VALUE(args.out.height >= 1 && args.out.width >= 1,
                    "conv2d: kernel_size with dilation must fit the padded ", height, "x", width,
                    " input, got ", args.dilation.height * (args.kernel.height - 1) + 1, "x",
                    args.dilation.width * (args.kernel.width - 1) + 1);
}

void check_image(const Conv2dArgs& args, OpName name, const at::Tensor& input, const ImageShape& image) {
  const bool same = image.batch == args.batch && image.size.height == args.input.height &&
                    image.size.width == args.input.width;
  TORCH_CHECK_VALUE(same, "conv2d: ", name, " must have the batch and size of input, ", args.batch, " of ",
                    args.input.height, "x", args.input.width, ", got shape ", input.sizes());
  TORCH_CHECK_VALUE(image.channels % args.groups == 0, "conv2d: groups must divide the ", image.channels,
                    " channels of ", name, ", got ", args.groups);
  check_packed_channels("conv2d", name, input, image.channels);
  check_reduction("conv2d", image.channels / args.groups * args.kernel.height * args.kernel.width);
}

int64_t checked_columns(const at::Tensor& first, OpName name, const at::Tensor& input) {
  TORCH_CHECK_VALUE(input.dim() >= 1, "linear: ", name, " must have at least 1 dimension, got 0");
  TORCH_CHECK_VALUE(input.sizes().slice(0, input.dim() - 1).equals(first.sizes().slice(0, first.dim() - 1)),
                    "linear: ", name, " must equal input in all but the last dimension, got ", input.sizes(),
                    " and ", first.sizes());
  const int64_t columns = is_packed(input) ? 2 * input.size(-1) : input.size(-1);
  check_packed_channels("linear", name, input, columns);
  check_reduction("linear", columns);
  return columns;
}

}  // namespace

Prepared<LinearArgs> prepare_linear(const IgemmTensors& tensors, const OutputOptions& options,
                                    int64_t out_features) {
  Prepared<LinearArgs> prepared{};
  LinearArgs& args = prepared.args;
  const at::Tensor& first = tensors.input;
  TORCH_CHECK_VALUE(out_features >= 1, "linear: out_features must be at least 1, got ", out_features);
  args.num_segments = count_segments("linear", tensors);
  args.out_features = out_features;
  args.weight_bits = checked_bits("linear", "weight_bits", options.weight_bits);
  for (int s = 0; s < args.num_segments; ++s) {
    const at::Tensor& input = segment_tensors(tensors, s).input;
    check_input_type("linear", kSegmentNames[s].input, input, first);
    const int64_t columns = checked_columns(first, kSegmentNames[s].input, input);
    args.segments[s] = make_segment("linear", tensors, s, out_features, columns);
  }
  args.output = make_output("linear", options, first, out_features);
  args.rows = args.rows_per_image = first.numel() / first.sizes().back();
  const std::optional<at::Tensor>& rows =
      options.row_scale.has_value() ? options.row_scale : options.row_bias;
  if (rows.has_value()) {
    const int64_t images = rows->dim() > 0 ? rows->size(0) : 0;
    TORCH_CHECK_VALUE(images >= 1 && args.rows % images == 0,
                      "linear: ", options.row_scale.has_value() ? "row_scale" : "row_bias",
                      " must divide the ", args.rows, " rows of input evenly, got ", images, " rows");
    set_image_rows("linear", options, first, images, out_features, args.output);
    args.rows_per_image = args.rows / images;
  }
  at::DimVector sizes(first.sizes().begin(), first.sizes().end());
  sizes.back() = result_size(args.output, out_features);
  set_tensors("linear", options, first, sizes, at::MemoryFormat::Contiguous, prepared);
  for (int s = 0; s < args.num_segments; ++s) {
    prepared.inputs[s] = segment_tensors(tensors, s).input.contiguous();
    args.segments[s].codes = static_cast<const int8_t*>(prepared.inputs[s].const_data_ptr());
  }
  return prepared;
}

Prepared<Conv2dArgs> prepare_conv2d(const IgemmTensors& tensors, const OutputOptions& options,
                                    at::IntArrayRef geometry) {
  Prepared<Conv2dArgs> prepared{};
  Conv2dArgs& args = prepared.args;
  const at::Tensor& first = tensors.input;
  args = checked_geometry(geometry);
  args.num_segments = count_segments("conv2d", tensors);
  args.weight_bits = checked_bits("conv2d", "weight_bits", options.weight_bits);
  TORCH_CHECK_VALUE(args.groups == 1 || args.num_segments == 1,
                    "conv2d: groups must be 1 with two inputs, got ", args.groups);
  for (int s = 0; s < args.num_segments; ++s) {
    const at::Tensor& input = segment_tensors(tensors, s).input;
    check_input_type("conv2d", kSegmentNames[s].input, input, first);
    const ImageShape image = image_shape(kSegmentNames[s].input, input);
    if (s == 0) set_sizes(image, args);
    check_image(args, kSegmentNames[s].input, input, image);
    args.segments[s] = make_segment("conv2d", tensors, s, args.out_channels, image.channels);
  }
  args.output = make_output("conv2d", options, first, args.out_channels);
  TORCH_CHECK_VALUE(args.output.activation != Activation::kGeglu || args.groups == 1,
                    "conv2d: groups must be 1 with geglu, got ", args.groups);
  set_image_rows("conv2d", options, first, args.batch, args.out_channels, args.output);
  const int64_t sizes[] = {args.batch, result_size(args.output, args.out_channels), args.out.height,
                           args.out.width};
  set_tensors("conv2d", options, first, sizes, at::MemoryFormat::ChannelsLast, prepared);
  for (int s = 0; s < args.num_segments; ++s) {
    const at::Tensor& input = segment_tensors(tensors, s).input;
    prepared.inputs[s] =
        is_packed(input) ? input.contiguous() : input.contiguous(at::MemoryFormat::ChannelsLast);
    args.segments[s].codes = static_cast<const int8_t*>(prepared.inputs[s].const_data_ptr());
  }
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
