// Implements the checks of norm_prepare.h.
#include "bindings/norm_prepare.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cmath>

#include "bindings/prepare.h"

namespace adpdm::bindings {
namespace {

constexpr OpName kGroupNorm = "group_norm_quantize";
constexpr OpName kLayerNorm = "layer_norm_quantize";
constexpr OpName kInputNames[kMaxSegments] = {"inputs[0]", "inputs[1]"};

const float* optional_row(OpName op, OpName name, const std::optional<at::Tensor>& row, int64_t channels,
                          const at::Tensor& x) {
  if (!row.has_value()) return nullptr;
  check_vector(op, name, *row, at::kFloat, channels, x);
  return row->const_data_ptr<float>();
}

// modulation [images, 2 * channels] f32, images of any number.
const float* checked_modulation(OpName op, const at::Tensor& modulation, int64_t channels,
                                const at::Tensor& x) {
  check_matrix(op, "modulation", modulation, at::kFloat, kAny, 2 * channels, x);
  return modulation.const_data_ptr<float>();
}

// The fields that both kinds of args have.
template <typename Args>
void set_common(OpName op, const NormTensors& tensors, const at::Tensor& x, Args& args) {
  check_num_bits(op, tensors.num_bits);
  TORCH_CHECK_VALUE(std::isfinite(tensors.eps) && tensors.eps >= 0, op,
                    ": eps must be finite and not negative, got ", tensors.eps);
  args.weight = optional_row(op, "weight", tensors.weight, args.channels, x);
  args.bias = optional_row(op, "bias", tensors.bias, args.channels, x);
  if (tensors.modulation.has_value()) {
    args.modulation = checked_modulation(op, *tensors.modulation, args.channels, x);
  }
  args.eps = static_cast<float>(tensors.eps);
  args.qparams = grouped_qparams(op, x, tensors.scale, tensors.zero_point, tensors.group_index);
  args.num_bits = static_cast<int>(tensors.num_bits);
  args.hadamard = tensors.hadamard;
  if (args.hadamard != 0) check_hadamard(op, "hadamard", args.hadamard, args.channels);
}

void check_source(const at::Tensor& first, OpName name, const at::Tensor& input) {
  check_device(kGroupNorm, name, input, first);
  check_dtype(kGroupNorm, name, input, first.scalar_type());
  TORCH_CHECK_VALUE(input.dim() == 4, kGroupNorm, ": ", name, " must have 4 dimensions [N, C, H, W], got ",
                    input.dim());
  const bool same =
      input.size(0) == first.size(0) && input.size(2) == first.size(2) && input.size(3) == first.size(3);
  TORCH_CHECK_VALUE(same, kGroupNorm, ": ", name, " must equal inputs[0] in all but the channels, got ",
                    input.sizes(), " and ", first.sizes());
}

}  // namespace

PreparedNorm<GroupNormQuantizeArgs> describe_group_norm(at::TensorList inputs, const NormTensors& tensors,
                                                        int64_t norm_groups, int64_t activation) {
  PreparedNorm<GroupNormQuantizeArgs> prepared{};
  GroupNormQuantizeArgs& args = prepared.args;
  TORCH_CHECK_VALUE(inputs.size() >= 1 && inputs.size() <= kMaxSegments, kGroupNorm,
                    ": inputs must be 1 or 2 tensors, got ", inputs.size());
  const at::Tensor& first = inputs[0];
  args.type = float_type(kGroupNorm, "inputs[0]", first.scalar_type());
  args.num_sources = static_cast<int>(inputs.size());
  for (int s = 0; s < args.num_sources; ++s) {
    check_source(first, kInputNames[s], inputs[s]);
    args.sources[s].channels = inputs[s].size(1);
    args.channels += inputs[s].size(1);
  }
  args.batch = first.size(0);
  args.pixels = first.size(2) * first.size(3);
  args.norm_groups = norm_groups;
  TORCH_CHECK_VALUE(norm_groups >= 1 && args.channels % norm_groups == 0, kGroupNorm,
                    ": norm_groups must divide the ", args.channels, " channels, got ", norm_groups);
  TORCH_CHECK_VALUE(activation == 0 || activation == 1, kGroupNorm,
                    ": activation must be 0 (none) or 1 (silu), got ", activation);
  args.activation = static_cast<Activation>(activation);
  set_common(kGroupNorm, tensors, first, args);
  TORCH_CHECK_VALUE(args.hadamard == 0 || args.num_sources == 1, kGroupNorm,
                    ": wanted one input where its channels are rotated, got 2");
  TORCH_CHECK_VALUE(!tensors.modulation.has_value() || tensors.modulation->size(0) == args.batch, kGroupNorm,
                    ": modulation must have a row for each of ", args.batch, " images, got ",
                    args.modulation ? tensors.modulation->size(0) : 0);
  for (int s = 0; s < args.num_sources; ++s) {
    prepared.inputs[s] = inputs[s].contiguous(at::MemoryFormat::ChannelsLast);
    args.sources[s].data = prepared.inputs[s].const_data_ptr();
  }
  return prepared;
}

PreparedNorm<GroupNormQuantizeArgs> prepare_group_norm(at::TensorList inputs, const NormTensors& tensors,
                                                       int64_t norm_groups, int64_t activation) {
  auto prepared = describe_group_norm(inputs, tensors, norm_groups, activation);
  const at::Tensor& first = inputs[0];
  prepared.codes = at::empty({first.size(0), prepared.args.channels, first.size(2), first.size(3)},
                             first.options().dtype(at::kChar), at::MemoryFormat::ChannelsLast);
  prepared.args.codes = prepared.codes.mutable_data_ptr<int8_t>();
  return prepared;
}

void check_each(at::TensorList qparams, at::IntArrayRef num_bits) {
  TORCH_CHECK_VALUE(qparams.size() == 6 && num_bits.size() == 2,
                    "group_norm_quantize_each: qparams must be 6 tensors (scale, zero_point, group_index of "
                    "each input) and num_bits 2 numbers, got ",
                    qparams.size(), " and ", num_bits.size());
}

PreparedNorm<LayerNormQuantizeArgs> prepare_layer_norm(const at::Tensor& x, const NormTensors& tensors) {
  PreparedNorm<LayerNormQuantizeArgs> prepared{};
  LayerNormQuantizeArgs& args = prepared.args;
  args.type = float_type(kLayerNorm, "x", x.scalar_type());
  const MatrixShape shape = matrix_shape(kLayerNorm, "x", x);
  args.rows = args.rows_per_image = shape.rows;
  args.channels = shape.columns;
  set_common(kLayerNorm, tensors, x, args);
  if (tensors.modulation.has_value()) {
    const int64_t images = tensors.modulation->size(0);
    TORCH_CHECK_VALUE(images >= 1 && args.rows % images == 0, kLayerNorm, ": modulation must divide the ",
                      args.rows, " rows of x evenly, got ", images, " rows");
    args.rows_per_image = args.rows / images;
  }
  prepared.inputs[0] = x.contiguous();
  args.x = prepared.inputs[0].const_data_ptr();
  prepared.codes = at::empty(x.sizes(), x.options().dtype(at::kChar));
  args.codes = prepared.codes.mutable_data_ptr<int8_t>();
  return prepared;
}

}  // namespace adpdm::bindings
