// Global memory for the tests of kernels, which run on the host executor (ADPDM_SIMT) and on a GPU alike.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/stream.h"
#include "cuda/device_info.h"

#ifdef ADPDM_SIMT
#include <cstdlib>

#include "simt/executor.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace adpdm::testing {

inline bool gpu_available() { return cuda::device_count() > 0; }

// First line of every test that launches a kernel.
#define ADPDM_REQUIRE_GPU() \
  if (!::adpdm::testing::gpu_available()) GTEST_SKIP() << "wanted a CUDA device, found none"

namespace detail {

constexpr unsigned char kPoisonByte = 0xFF;  // NaN in every float type, -1 in every integer
constexpr unsigned char kRedZoneByte = 0xA5;
constexpr size_t kRedZoneBytes = 256;  // also the alignment, that of cudaMalloc

#ifdef ADPDM_SIMT
inline unsigned char* allocate(size_t bytes) {
  const size_t rounded = (bytes + kRedZoneBytes - 1) / kRedZoneBytes * kRedZoneBytes;
  auto* p = static_cast<unsigned char*>(std::aligned_alloc(kRedZoneBytes, rounded));
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
inline void deallocate(unsigned char* p) { std::free(p); }
inline void to_device(void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
inline void to_host(void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
#else
inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw CudaError(std::string("test: ") + cudaGetErrorString(status));
}
inline unsigned char* allocate(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes));
  return static_cast<unsigned char*>(p);
}
inline void deallocate(unsigned char* p) { cudaFree(p); }
// Both wait for the kernels before.
inline void to_device(void* device, const void* host, size_t bytes) {
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
}
inline void to_host(void* host, const void* device, size_t bytes) {
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}
#endif

}  // namespace detail

// `size` elements of global memory at an address that is a multiple of 256. Writes beside them fail the test.
template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t size)
      : size_(size), memory_(detail::allocate(bytes() + 2 * detail::kRedZoneBytes)) {
    const std::vector<unsigned char> red(detail::kRedZoneBytes, detail::kRedZoneByte);
    detail::to_device(memory_, red.data(), red.size());
    detail::to_device(memory_ + detail::kRedZoneBytes + bytes(), red.data(), red.size());
    fill_poison();
#ifdef ADPDM_SIMT
    simt::executor().register_buffer(data(), static_cast<int64_t>(bytes()));
#endif
  }

  explicit DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(static_cast<int64_t>(values.size())) {
    set(values);
  }

  ~DeviceBuffer() {
#ifdef ADPDM_SIMT
    simt::executor().unregister_buffer(data());
#endif
    try {
      expect_red(memory_, "before");
      expect_red(memory_ + detail::kRedZoneBytes + bytes(), "behind");
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
    }
    detail::deallocate(memory_);
  }

  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  T* data() { return reinterpret_cast<T*>(memory_ + detail::kRedZoneBytes); }
  const T* data() const { return reinterpret_cast<const T*>(memory_ + detail::kRedZoneBytes); }
  int64_t size() const { return size_; }

  // A copy of the elements, after all kernels launched so far.
  std::vector<T> host() const {
    std::vector<T> values(static_cast<size_t>(size_));
    if (size_ != 0) detail::to_host(values.data(), data(), bytes());
    return values;
  }

  void set(const std::vector<T>& values) {
    if (static_cast<int64_t>(values.size()) != size_) throw std::logic_error("DeviceBuffer: another size");
    if (size_ != 0) detail::to_device(data(), values.data(), bytes());
  }

  // Every byte becomes 0xFF: NaN in float types, -1 in integers.
  void fill_poison() {
    const std::vector<unsigned char> poison(bytes(), detail::kPoisonByte);
    if (size_ != 0) detail::to_device(data(), poison.data(), bytes());
  }

 private:
  static_assert(std::is_trivially_copyable_v<T> && !std::is_same_v<T, bool>);

  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }

  static void expect_red(const unsigned char* zone, const char* where) {
    std::vector<unsigned char> bytes(detail::kRedZoneBytes);
    detail::to_host(bytes.data(), zone, bytes.size());
    EXPECT_EQ(bytes, std::vector<unsigned char>(detail::kRedZoneBytes, detail::kRedZoneByte))
        << "something was written " << where << " a buffer";
  }

  int64_t size_;
  unsigned char* memory_;
};

}  // namespace adpdm::testing
