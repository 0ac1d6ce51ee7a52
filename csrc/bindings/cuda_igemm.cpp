// Registers pack_weight, linear and conv2d for CUDA tensors, in builds that have the kernels.
#ifdef ADPDM_WITH_CUDA

#include "bindings/cuda_backend.h"
#include "bindings/igemm_ops.h"
#include "core/quantize.h"
#include "cuda/igemm.h"

namespace adpdm::bindings {
namespace {

struct Backend : CudaBackend {
  using CudaBackend::CudaBackend;

  int64_t blob_bytes(int64_t outputs, int64_t group_channels, int64_t taps, int64_t /*groups*/,
                     int weight_bits) const {
    return cuda::packed_weight_bytes(outputs, group_channels, taps, weight_bits);
  }

  // Values in device memory are the kernels' business.
  void check_values(const char*, const char*, const char*, const GroupedQParams&) const {}

  bool reads_packed(int weight_bits, int64_t group_channels) const {
    return cuda::reads_packed(weight_bits, group_channels);
  }

  at::Tensor unpack(const at::Tensor& packed) const {  // [.., K / 2] u8, K a multiple of 32
    at::DimVector sizes(packed.sizes().begin(), packed.sizes().end());
    sizes.back() *= 2;
    at::Tensor codes = at::empty(sizes, packed.options().dtype(at::kChar));
    const int64_t rows = sizes.back() == 0 ? 0 : codes.numel() / sizes.back();
    cuda::unpack_int4(packed.const_data_ptr<uint8_t>(), rows, sizes.back(), codes.mutable_data_ptr<int8_t>(),
                      stream());
    return codes;
  }

  void run(const PackWeightArgs& args) const { cuda::pack_weight(args, stream()); }

  void run(const LinearArgs& args) const {
    const cuda::IgemmPlan plan = cuda::plan_linear(args);
    const at::Tensor workspace = cuda_workspace(plan.workspace_bytes);
    cuda::linear(args, plan, workspace.mutable_data_ptr(), stream());
  }

  void run(const Conv2dArgs& args) const {
    const cuda::IgemmPlan plan = cuda::plan_conv2d(args);
    const at::Tensor workspace = cuda_workspace(plan.workspace_bytes);
    cuda::conv2d(args, plan, workspace.mutable_data_ptr(), stream());
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CUDA, m) { register_igemm<Backend>(m); }

}  // namespace adpdm::bindings

#endif
