// Registers the element-wise operators for CUDA tensors, in builds that have the kernels.
#ifdef ADPDM_WITH_CUDA

#include "bindings/cuda_backend.h"
#include "bindings/elementwise_ops.h"

namespace adpdm::bindings {
namespace {

void fake_quantize_backward(const FakeQuantizeArgs& args, const void* grad, void* grad_x, float* grad_scale,
                            float* grad_zero_point, Stream stream) {
  const at::Tensor workspace = cuda_workspace(cuda::fake_quantize_backward_workspace(args));
  cuda::fake_quantize_backward(args, grad, grad_x, grad_scale, grad_zero_point, workspace.mutable_data_ptr(),
                               stream);
}

void fake_quantize_mixture_backward(const MixtureArgs& args, const void* grad, const MixtureGrads& grads,
                                    Stream stream) {
  const at::Tensor workspace = cuda_workspace(cuda::fake_quantize_mixture_backward_workspace(args));
  cuda::fake_quantize_mixture_backward(args, grad, grads, workspace.mutable_data_ptr(), stream);
}

struct Backend : CudaBackend {
  using CudaBackend::CudaBackend;

  static constexpr auto quantize = cuda::quantize;
  static constexpr auto quantize_channels_last = cuda::quantize_channels_last;
  static constexpr auto quantize_int4 = cuda::quantize_int4;
  static constexpr auto dequantize = cuda::dequantize;
  static constexpr auto dequantize_int4 = cuda::dequantize_int4;
  static constexpr auto pack_int4 = cuda::pack_int4;
  static constexpr auto unpack_int4 = cuda::unpack_int4;
  static constexpr auto fake_quantize = cuda::fake_quantize;
  static constexpr auto fake_quantize_backward = bindings::fake_quantize_backward;
  static constexpr auto fake_quantize_mixture = cuda::fake_quantize_mixture;
  static constexpr auto fake_quantize_mixture_backward = bindings::fake_quantize_mixture_backward;
  static constexpr auto observe = cuda::observe;
};

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CUDA, m) { register_elementwise<Backend>(m); }

}  // namespace adpdm::bindings

#endif
