// Registers the operators for CUDA tensors, in builds that have the kernels. Without a CUDA header, so that
// it compiles against any build of torch.
#ifdef ADPDM_WITH_CUDA

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "bindings/elementwise_ops.h"
#include "bindings/igemm_ops.h"
#include "bindings/norm_ops.h"
#include "core/quantize.h"
#include "core/stream.h"
#include "cuda/igemm.h"

namespace adpdm::bindings {
namespace {

// The stream that torch has current on a device.
Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// Uninitialised bytes on the current device. They may be freed before the kernels that use them have run:
// torch gives memory of this stream only to later work on it.
at::Tensor cuda_workspace(int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(c10::DeviceType::CUDA));
}

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

// Selects the device of `input` while it lives, and launches on its current stream.
class CudaBackend {
 public:
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
  static constexpr auto hadamard = cuda::hadamard;
  static constexpr auto hadamard_quantize = cuda::hadamard_quantize;

  explicit CudaBackend(const at::Tensor& input)
      : guard_(input.device()), stream_(current_stream(input.device())) {}

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
                      stream_);
    return codes;
  }

  // function(args..., stream)
  template <typename... P, typename... A>
  void run(void (*function)(P...), const A&... args) const {
    function(args..., stream_);
  }

  void run(const PackWeightArgs& args) const { cuda::pack_weight(args, stream_); }

  void run(const LinearArgs& args) const {
    const cuda::IgemmPlan plan = cuda::plan_linear(args);
    const at::Tensor workspace = cuda_workspace(plan.workspace_bytes);
    cuda::linear(args, plan, workspace.mutable_data_ptr(), stream_);
  }

  void run(const Conv2dArgs& args) const {
    const cuda::IgemmPlan plan = cuda::plan_conv2d(args);
    const at::Tensor workspace = cuda_workspace(plan.workspace_bytes);
    cuda::conv2d(args, plan, workspace.mutable_data_ptr(), stream_);
  }

  void run(const GroupNormQuantizeArgs& args) const {
    const at::Tensor workspace = cuda_workspace(cuda::group_norm_quantize_workspace(args));
    cuda::group_norm_quantize(args, workspace.mutable_data_ptr(), stream_);
  }
  void run(const LayerNormQuantizeArgs& args) const { cuda::layer_norm_quantize(args, stream_); }

 private:
  c10::DeviceGuard guard_;
  Stream stream_;
};

}  // namespace

TORCH_LIBRARY_IMPL(adpdm, CUDA, m) {
  register_elementwise<CudaBackend>(m);
  register_igemm<CudaBackend>(m);
  register_norms<CudaBackend>(m);
  m.impl("group_norm_quantize_each", &group_norm_quantize_each<CudaBackend>);
}

}  // namespace adpdm::bindings

#endif
