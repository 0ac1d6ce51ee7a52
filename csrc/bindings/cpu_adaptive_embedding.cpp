// Checks timestep_embedding, silu_linear and adaptive_rows and registers them for CPU tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "bindings/prepare.h"
#include "core/adaptive_embedding.h"

namespace adpdm::bindings {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

DenseLayer dense_layer(OpName op, OpName weight_name, const at::Tensor& weight, OpName bias_name,
                       const OptionalTensor& bias, int64_t columns, const at::Tensor& x) {
  check_matrix(op, weight_name, weight, at::kFloat, kAny, columns, x);
  DenseLayer layer{weight.const_data_ptr<float>(), nullptr, weight.size(0), columns};
  if (bias.has_value()) {
    check_vector(op, bias_name, *bias, at::kFloat, layer.outputs, x);
    layer.bias = bias->const_data_ptr<float>();
  }
  return layer;
}

at::Tensor timestep_embedding(const at::Tensor& waves,            // [1 or N, K] f32
                              const at::Tensor& first_weight,     // [H, K] f32
                              const OptionalTensor& first_bias,   // [H] f32
                              const at::Tensor& second_weight,    // [D, H] f32
                              const OptionalTensor& second_bias,  // [D] f32
                              const OptionalTensor& table,        // [classes, D] f32
                              const OptionalTensor& labels) {     // [N] i64
  constexpr OpName kOp = "timestep_embedding";
  check_matrix(kOp, "waves", waves, at::kFloat, kAny, kAny, waves);
  TimestepEmbeddingArgs args{};
  args.first = dense_layer(kOp, "first_weight", first_weight, "first_bias", first_bias, waves.size(1), waves);
  args.second =
      dense_layer(kOp, "second_weight", second_weight, "second_bias", second_bias, args.first.outputs, waves);
  args.waves = waves.const_data_ptr<float>();
  args.rows = args.wave_rows = waves.size(0);
  TORCH_CHECK_VALUE(table.has_value() == labels.has_value(), kOp,
                    ": wanted table and labels or neither, got one");
  if (table.has_value()) {
    check_matrix(kOp, "table", *table, at::kFloat, kAny, args.second.outputs, waves);
    check_vector(kOp, "labels", *labels, at::kLong, labels->numel(), waves);
    args.table = table->const_data_ptr<float>();
    args.classes = table->size(0);
    args.labels = labels->const_data_ptr<int64_t>();
    args.rows = labels->numel();
    TORCH_CHECK_VALUE(args.wave_rows == 1 || args.wave_rows == args.rows, kOp,
                      ": waves must have 1 row or the ", args.rows, " of labels, got ", args.wave_rows);
  }
  at::Tensor result = at::empty({args.rows, args.second.outputs}, waves.options());
  args.result = result.mutable_data_ptr<float>();
  cpu::timestep_embedding(args);
  return result;
}

at::Tensor silu_linear(const at::Tensor& x,           // [N, K] f32
                       const at::Tensor& weight,      // [O, K] f32
                       const OptionalTensor& bias) {  // [O] f32
  constexpr OpName kOp = "silu_linear";
  check_matrix(kOp, "x", x, at::kFloat, kAny, kAny, x);
  const DenseLayer layer = dense_layer(kOp, "weight", weight, "bias", bias, x.size(1), x);
  at::Tensor result = at::empty({x.size(0), layer.outputs}, x.options());
  cpu::silu_linear({x.const_data_ptr<float>(), x.size(0), layer, result.mutable_data_ptr<float>()});
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> adaptive_rows(
    const at::Tensor& embedding,   // [N, K] f32
    const at::Tensor& weight,      // [6 * C, K] f32
    const OptionalTensor& bias) {  // [6 * C] f32
  constexpr OpName kOp = "adaptive_rows";
  check_matrix(kOp, "embedding", embedding, at::kFloat, kAny, kAny, embedding);
  AdaptiveRowsArgs args{};
  args.layer = dense_layer(kOp, "weight", weight, "bias", bias, embedding.size(1), embedding);
  TORCH_CHECK_VALUE(args.layer.outputs % kAdaptiveParts == 0, kOp, ": weight must have a multiple of ",
                    kAdaptiveParts, " rows, got ", args.layer.outputs);
  args.embedding = embedding.const_data_ptr<float>();
  args.rows = embedding.size(0);
  const int64_t channels = args.layer.outputs / kAdaptiveParts;
  at::Tensor modulation[2], gate[2];
  for (int i = 0; i < 2; ++i) {
    modulation[i] = at::empty({args.rows, 2 * channels}, embedding.options());
    gate[i] = at::empty({args.rows, channels}, embedding.options());
    args.modulation[i] = modulation[i].mutable_data_ptr<float>();
    args.gate[i] = gate[i].mutable_data_ptr<float>();
  }
  cpu::adaptive_rows(args);
  return {modulation[0], gate[0], modulation[1], gate[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CPU, m) {
  m.impl("timestep_embedding", &timestep_embedding);
  m.impl("silu_linear", &silu_linear);
  m.impl("adaptive_rows", &adaptive_rows);
}

}  // namespace adpdm::bindings
