// Registers group_norm_quantize and layer_norm_quantize for CPU tensors.
#include "bindings/cpu_values.h"
#include "bindings/norm_ops.h"

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

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CPU, m) { register_norms<CpuBackend>(m); }

}  // namespace adpdm::bindings
