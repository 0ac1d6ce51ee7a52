// Starting kernels, on the device or (ADPDM_SIMT) on the host executor, with every status checked. For .cu
// files only.
#pragma once

#include <cstdint>
#include <tuple>
#include <type_traits>

#include "core/stream.h"
#include "cuda/device_info.h"

#ifdef ADPDM_SIMT
#include "simt/executor.h"
#endif

namespace adpdm::cuda {

struct LaunchShape {
  int64_t grid_x;
  int64_t grid_y;
  int64_t grid_z;
  int threads;           // per block, a multiple of 32 up to 1024
  int64_t shared_bytes;  // dynamic shared memory
  Stream stream;
  const char* op;  // opens every error message
};

// Checks shape against the limits of the current device; false: there is nothing to launch. Throws CudaError.
bool check_shape(const LaunchShape& shape);

// cudaLaunchKernel with the addresses of the parameters. Throws CudaError.
void launch_on_device(const void* kernel, const LaunchShape& shape, void** parameters);

// Runs kernel(args...) on shape.stream; 0 blocks launch nothing. Throws CudaError.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), const LaunchShape& shape, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "launch takes one argument per parameter of the kernel");
  static_assert((std::is_trivially_copyable_v<P> && ...), "parameters of a kernel are copied byte by byte");
  static_assert((sizeof(P) + ... + 0) <= 4096, "CUDA passes at most 4096 bytes of parameters");
  if (!check_shape(shape)) return;
#ifdef ADPDM_SIMT
  const simt::LaunchConfig config = {
      shape.op, {shape.grid_x, shape.grid_y, shape.grid_z}, shape.threads, shape.shared_bytes};
  simt::executor().launch(config, [&] { kernel(args...); });
#else
  std::tuple<P...> parameters(args...);  // converted to the types that the kernel reads
  std::apply(
      [&](P&... parameter) {
        void* addresses[] = {&parameter..., nullptr};
        launch_on_device(reinterpret_cast<const void*>(kernel), shape, addresses);
      },
      parameters);
#endif
}

// Sets `bytes` bytes of global memory to the low byte of value, on the stream. Throws CudaError.
void memset_async(void* data, int value, int64_t bytes, Stream stream, const char* op);

}  // namespace adpdm::cuda
