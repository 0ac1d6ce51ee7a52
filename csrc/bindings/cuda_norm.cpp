// Registers group_norm_quantize and layer_norm_quantize for CUDA tensors, in builds that have the kernels.
#ifdef ADPDM_WITH_CUDA

#include "bindings/cuda_backend.h"
#include "bindings/norm_ops.h"

namespace adpdm::bindings {
namespace {

struct Backend : CudaBackend {
  using CudaBackend::CudaBackend;

  // Values in device memory are the kernels' business.
  void check_values(const char*, const char*, const char*, const GroupedQParams&) const {}

  void run(const GroupNormQuantizeArgs& args) const {
    const at::Tensor workspace = cuda_workspace(cuda::group_norm_quantize_workspace(args));
    cuda::group_norm_quantize(args, workspace.mutable_data_ptr(), stream());
  }
  void run(const LayerNormQuantizeArgs& args) const { cuda::layer_norm_quantize(args, stream()); }
};

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CUDA, m) {
  register_norms<Backend>(m);
  m.impl("group_norm_quantize_each", &group_norm_quantize_each<Backend>);
}

}  // namespace adpdm::bindings

#endif
