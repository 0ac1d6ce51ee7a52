// Registers for CPU tensors the operators that CUDA has as well. One file: most of compiling it is torch's
// headers.
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <stdexcept>
#include <tuple>

#include "bindings/cpu_values.h"
#include "bindings/elementwise_ops.h"
#include "bindings/igemm_ops.h"
#include "bindings/norm_ops.h"
#include "bindings/prepare.h"
#include "core/quantize.h"

namespace adpdm::bindings {
namespace {

struct CpuBackend {
  static constexpr auto quantize = cpu::quantize;
  static constexpr auto quantize_channels_last = cpu::quantize_channels_last;
  static constexpr auto quantize_int4 = cpu::quantize_int4;
  static constexpr auto dequantize = cpu::dequantize;
  static constexpr auto dequantize_int4 = cpu::dequantize_int4;
  static constexpr auto pack_int4 = cpu::pack_int4;
  static constexpr auto unpack_int4 = cpu::unpack_int4;
  static constexpr auto fake_quantize = cpu::fake_quantize;
  static constexpr auto fake_quantize_backward = cpu::fake_quantize_backward;
  static constexpr auto fake_quantize_mixture = cpu::fake_quantize_mixture;
  static constexpr auto fake_quantize_mixture_backward = cpu::fake_quantize_mixture_backward;
  static constexpr auto observe = cpu::observe;
  static constexpr auto hadamard = cpu::hadamard;
  static constexpr auto hadamard_quantize = cpu::hadamard_quantize;

  explicit CpuBackend(const at::Tensor&) {}

  int64_t blob_bytes(int64_t outputs, int64_t group_channels, int64_t taps, int64_t groups,
                     int weight_bits) const {
    return packed_weight_bytes(outputs, group_channels, taps, groups, weight_bits);
  }

  void check_values(const char* op, const char* group_index, const char* zero_point,
                    const GroupedQParams& qparams) const {
    check_current_group(op, group_index, zero_point, qparams);
  }

  bool reads_packed(int /*weight_bits*/, int64_t /*group_channels*/) const { return false; }

  at::Tensor unpack(const at::Tensor& packed) const {  // [.., K / 2] u8, K a multiple of 32
    at::DimVector sizes(packed.sizes().begin(), packed.sizes().end());
    sizes.back() *= 2;
    at::Tensor codes = at::empty(sizes, packed.options().dtype(at::kChar));
    const int64_t rows = sizes.back() == 0 ? 0 : codes.numel() / sizes.back();
    cpu::unpack_int4(packed.const_data_ptr<uint8_t>(), rows, sizes.back(), codes.mutable_data_ptr<int8_t>());
    return codes;
  }

  // The core reports a group or step index out of range as std::out_of_range; Python gets an IndexError.
  template <typename... P, typename... A>
  void run(void (*function)(P...), const A&... args) const {
    try {
      function(args...);
    } catch (const std::out_of_range& error) {
      TORCH_CHECK_INDEX(false, error.what());
    }
  }

  void run(const PackWeightArgs& args) const { cpu::pack_weight(args); }
  void run(const LinearArgs& args) const { cpu::linear(args); }
  void run(const Conv2dArgs& args) const { cpu::conv2d(args); }
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
      inputs, {weight, bias, no_modulation, qparams[0], qparams[1], qparams[2], eps, num_bits[0], 0},
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
  register_elementwise<CpuBackend>(m);
  register_igemm<CpuBackend>(m);
  register_norms<CpuBackend>(m);
  m.impl("group_norm_quantize_each", &group_norm_quantize_both);
}

}  // namespace adpdm::bindings
