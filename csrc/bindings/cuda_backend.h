// What the bindings of CUDA kernels share: the device and the stream of a call, and memory to work in.
// Without a CUDA header, so that they compile against any build of torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "core/stream.h"

namespace adpdm::bindings {

// The stream that torch has current on a device.
inline Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// Uninitialised bytes on the current device. They may be freed before the kernels that use them have run:
// torch gives memory of this stream only to later work on it.
inline at::Tensor cuda_workspace(int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(c10::DeviceType::CUDA));
}

// Selects the device of `input` while it lives, and launches on its current stream.
class CudaBackend {
 public:
  explicit CudaBackend(const at::Tensor& input)
      : guard_(input.device()), stream_(current_stream(input.device())) {}

  Stream stream() const { return stream_; }

  // function(args..., stream)
  template <typename... P, typename... A>
  void run(void (*function)(P...), const A&... args) const {
    function(args..., stream_);
  }

 private:
  c10::DeviceGuard guard_;
  Stream stream_;
};

}  // namespace adpdm::bindings
