// The bodies of group_norm_quantize and layer_norm_quantize, the same for all devices: check, allocate, run
// on a Backend.
#pragma once

#include <torch/library.h>

#include <tuple>
#include <utility>

#include "bindings/norm_prepare.h"

namespace adpdm::bindings {

// A Backend is made once per call and has
//   explicit Backend(const at::Tensor& input)        selects input's device and stream while it lives
//   void check_values(op, "group_index", "zero_point", qparams)    what only it can check about values
//   void run(const GroupNormQuantizeArgs&), run(const LayerNormQuantizeArgs&)

template <typename Backend>
at::Tensor group_norm_quantize(at::TensorList inputs, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& modulation, const at::Tensor& scale,
                               const at::Tensor& zero_point, const at::Tensor& group_index,
                               int64_t norm_groups, double eps, int64_t activation, int64_t num_bits,
                               int64_t hadamard) {
  PreparedNorm<GroupNormQuantizeArgs> prepared = prepare_group_norm(
      inputs, {weight, bias, modulation, scale, zero_point, group_index, eps, num_bits, hadamard},
      norm_groups, activation);
  const Backend backend(inputs[0]);
  backend.check_values("group_norm_quantize", "group_index", "zero_point", prepared.args.qparams);
  backend.run(prepared.args);
  return std::move(prepared.codes);
}

// Codes of each input under a quantizer of its own, where there is no kernel for that: of both under each.
template <typename Backend>
std::tuple<at::Tensor, at::Tensor> group_norm_quantize_each(const at::Tensor& first, const at::Tensor& second,
                                                            const std::optional<at::Tensor>& weight,
                                                            const std::optional<at::Tensor>& bias,
                                                            at::TensorList qparams, int64_t norm_groups,
                                                            double eps, int64_t activation,
                                                            at::IntArrayRef num_bits) {
  check_each(qparams, num_bits);
  const at::Tensor inputs[] = {first, second};
  const auto codes = [&](size_t which) {
    const at::TensorList q = qparams.slice(3 * which, 3);
    return group_norm_quantize<Backend>(inputs, weight, bias, std::nullopt, q[0], q[1], q[2], norm_groups,
                                        eps, activation, num_bits[which], 0);
  };
  const int64_t split = first.size(1);
  return {codes(0).narrow(1, 0, split).contiguous(at::MemoryFormat::ChannelsLast),
          codes(1).narrow(1, split, second.size(1)).contiguous(at::MemoryFormat::ChannelsLast)};
}

template <typename Backend>
at::Tensor layer_norm_quantize(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& modulation, const at::Tensor& scale,
                               const at::Tensor& zero_point, const at::Tensor& group_index, double eps,
                               int64_t num_bits, int64_t hadamard) {
  PreparedNorm<LayerNormQuantizeArgs> prepared = prepare_layer_norm(
      x, {weight, bias, modulation, scale, zero_point, group_index, eps, num_bits, hadamard});
  const Backend backend(x);
  backend.check_values("layer_norm_quantize", "group_index", "zero_point", prepared.args.qparams);
  backend.run(prepared.args);
  return std::move(prepared.codes);
}

template <typename Backend>
void register_norms(torch::Library& m) {
  m.impl("group_norm_quantize", &group_norm_quantize<Backend>);
  m.impl("layer_norm_quantize", &layer_norm_quantize<Backend>);
}

}  // namespace adpdm::bindings
