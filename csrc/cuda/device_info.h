// What the backend has to know about the current device; no CUDA header, so that the bindings can include it.
#pragma once

#include <cstdint>
#include <string>

namespace adpdm::cuda {

struct DeviceInfo {
  int arch;                  // compute capability: 80, 89, 90, 120
  int num_sms;               // multiprocessors
  int64_t max_shared_bytes;  // dynamic shared memory a block may opt in to
};

// Devices of this machine; 0 where there is no driver.
int device_count();

// Facts about the calling thread's current device, read once per device. Throws CudaError without a device.
const DeviceInfo& current_device_info();

// Whether code built for `archs` (ADPDM_CUDA_ARCHS with commas, "80-real,90a-real,80-virtual") runs on a
// device: machine code on the same major and a not smaller minor version, PTX on every later one, the
// variants "90a" on exactly their own.
bool archs_cover(const std::string& archs, int device_arch);

// Whether machine code of the architecture-specific kind, for instance "90a" (wgmma), was built.
bool built_for(const std::string& arch);

// Throws CudaError, with what was built and how to build more, unless the current device can run it.
void require_built_arch(const char* op);

#ifdef ADPDM_SIMT
// The device that the emulation pretends to be from now on, in all threads.
void set_emulated_device(const DeviceInfo& info);
constexpr DeviceInfo kEmulatedA100 = {80, 108, 163 * 1024};
#endif

}  // namespace adpdm::cuda
