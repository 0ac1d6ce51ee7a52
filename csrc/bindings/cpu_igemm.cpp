// Registers pack_weight, linear and conv2d for CPU tensors.
#include "bindings/cpu_values.h"
#include "bindings/igemm_ops.h"
#include "core/quantize.h"

namespace adpdm::bindings {
namespace {

struct CpuBackend {
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

  void run(const PackWeightArgs& args) const { cpu::pack_weight(args); }
  void run(const LinearArgs& args) const { cpu::linear(args); }
  void run(const Conv2dArgs& args) const { cpu::conv2d(args); }
};

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CPU, m) { register_igemm<CpuBackend>(m); }

}  // namespace adpdm::bindings
