// Checks around a launch, and the operations on streams that are no kernels.
#include <string>

#include "cuda/launch.cuh"

#ifdef ADPDM_SIMT
#include <cstring>
#else
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>
#endif

namespace adpdm::cuda {
namespace {

constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGridYZ = 65535;

std::string describe(const LaunchShape& shape) {
  return std::to_string(shape.grid_x) + " x " + std::to_string(shape.grid_y) + " x " +
         std::to_string(shape.grid_z) + " blocks of " + std::to_string(shape.threads) + " threads and " +
         std::to_string(shape.shared_bytes) + " bytes of shared memory";
}

#ifndef ADPDM_SIMT
void check(cudaError_t status, const char* op, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else whoever asks next would be told of this error
  throw CudaError(std::string(op) + ": CUDA reports '" + cudaGetErrorString(status) + "' at " + what);
}

// A kernel that wants more than 48 KiB must say so once per device.
void allow_shared_memory(const void* kernel, const LaunchShape& shape) {
  constexpr int64_t kGranted = 48 * 1024;
  if (shape.shared_bytes <= kGranted) return;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int64_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), shape.op, "the choice of the device");
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& bytes = allowed[{device, kernel}];
  if (shape.shared_bytes <= bytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes)),
        shape.op, "the request for " + std::to_string(shape.shared_bytes) + " bytes of shared memory");
  bytes = shape.shared_bytes;
}
#endif

}  // namespace

bool check_shape(const LaunchShape& shape) {
  const auto within = [](int64_t value, int64_t most) { return value >= 0 && value <= most; };
  const int64_t max_shared = current_device_info().max_shared_bytes;
  if (within(shape.grid_x, kMaxGridX) && within(shape.grid_y, kMaxGridYZ) &&
      within(shape.grid_z, kMaxGridYZ) && within(shape.threads, 1024) && shape.threads > 0 &&
      shape.threads % 32 == 0 && within(shape.shared_bytes, max_shared)) {
    return shape.grid_x != 0 && shape.grid_y != 0 && shape.grid_z != 0;
  }
  throw CudaError(std::string(shape.op) +
                  ": wanted a launch of at most 2147483647 x 65535 x 65535 blocks of a " +
                  "multiple of 32 up to 1024 threads and at most " + std::to_string(max_shared) +
                  " bytes of shared memory, got " + describe(shape));
}

#ifdef ADPDM_SIMT
void memset_async(void* data, int value, int64_t bytes, Stream, const char* op) {
  if (bytes == 0) return;
  simt::executor().check_host_access(data, bytes, op);
  std::memset(data, value, static_cast<size_t>(bytes));
}
#else
void launch_on_device(const void* kernel, const LaunchShape& shape, void** parameters) {
  allow_shared_memory(kernel, shape);
  const dim3 grid(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y),
                  static_cast<unsigned>(shape.grid_z));
  const cudaError_t status =
      cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(shape.threads)), parameters,
                       static_cast<size_t>(shape.shared_bytes), static_cast<cudaStream_t>(shape.stream));
  if (status == cudaErrorNoKernelImageForDevice) require_built_arch(shape.op);  // says what to build
  check(status, shape.op, "the launch of " + describe(shape));
}

void memset_async(void* data, int value, int64_t bytes, Stream stream, const char* op) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(data, value, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), op,
        "setting " + std::to_string(bytes) + " bytes");
}
#endif

}  // namespace adpdm::cuda
