// Registers group_norm_quantize and layer_norm_quantize for CPU tensors.
#include <ATen/ops/empty.h>

#include <tuple>

#include "bindings/cpu_values.h"
#include "bindings/norm_ops.h"
#include "bindings/prepare.h"

namespace adpdm::bindings {
namespace {

struct CpuBackend {
  explicit CpuBackend(const at::Tensor&) {}

  void check_values(const char* op, const char* group_index, const char* zero_point,
                    const GroupedQParams& qparams) const {
    check_current_group(op, group_index, zero_point, qparams);
  }

  void run(const GroupNormQuantizeArgs& args) const { cpu::group_norm_quantize(args); }
  void run(const LayerNormQuantizeArgs& args) const { cpu::layer_norm_quantize(args); }
};

// Statistics of both inputs together once, then the codes of each.
std::tuple<at::Tensor, at::Tensor> group_norm_quantize_both(const at::Tensor& first, const at::Tensor& second,
                                                            const std::optional<at::Tensor>& weight,
                                                            const std::optional<at::Tensor>& bias,
                                                            at::TensorList qparams, int64_t norm_groups,
                                                            double eps, int64_t activation,
                                                            at::IntArrayRef num_bits) {
  constexpr OpName kOp = "group_norm_quantize_each";
  check_each(qparams, num_bits);
  const at::Tensor inputs[] = {first, second};
  const std::optional<at::Tensor> no_modulation;
  const auto prepared = describe_group_norm(
      inputs, {weight, bias, no_modulation, qparams[0], qparams[1], qparams[2], eps, num_bits[0]},
      norm_groups, activation);
  NormTarget targets[2];
  at::Tensor codes[2];
  for (size_t s = 0; s < 2; ++s) {
    const at::TensorList q = qparams.slice(3 * s, 3);
    check_num_bits(kOp, num_bits[s]);
    targets[s] = {grouped_qparams(kOp, first, q[0], q[1], q[2]), static_cast<int>(num_bits[s]), nullptr};
    check_current_group(kOp, "group_index", "zero_point", targets[s].qparams);
    codes[s] = at::empty(inputs[s].sizes(), first.options().dtype(at::kChar), at::MemoryFormat::ChannelsLast);
    targets[s].codes = codes[s].mutable_data_ptr<int8_t>();
  }
  cpu::group_norm_quantize_each(prepared.args, targets);
  return {codes[0], codes[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CPU, m) {
  register_norms<CpuBackend>(m);
  m.impl("group_norm_quantize_each", &group_norm_quantize_both);
}

}  // namespace adpdm::bindings
