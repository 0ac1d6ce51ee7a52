// Queries of the current device, and whether this build has code for it.
#include <map>
#include <mutex>
#include <sstream>

#include "core/stream.h"
#include "cuda/device_info.h"

#ifndef ADPDM_SIMT
#include <cuda_runtime_api.h>
#endif

namespace adpdm::cuda {
namespace {

// One entry of the list: its number, whether it is bound to its own architecture, and what was kept of it.
struct BuiltArch {
  std::string name;  // "80", "90a"
  int number;
  bool specific;
  bool machine_code;
  bool ptx;
};

BuiltArch parse_arch(const std::string& entry) {
  BuiltArch arch{};
  arch.name = entry.substr(0, entry.find('-'));
  arch.number = std::stoi(arch.name);
  arch.specific = arch.name.back() == 'a';
  const std::string kind = entry.substr(arch.name.size());
  arch.machine_code = kind != "-virtual";
  arch.ptx = kind != "-real";
  return arch;
}

bool covers(const BuiltArch& built, int device_arch) {
  if (built.specific) return built.number == device_arch;
  const bool same_major = built.number / 10 == device_arch / 10;
  return built.number <= device_arch && (built.ptx || (built.machine_code && same_major));
}

#ifdef ADPDM_SIMT
DeviceInfo emulated_device = kEmulatedA100;
#else
void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw CudaError(std::string("adpdm: CUDA cannot describe the current device: ") +
                    cudaGetErrorString(status));
  }
}

DeviceInfo query(int device) {
  int major = 0, minor = 0, num_sms = 0, shared_bytes = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return {10 * major + minor, num_sms, shared_bytes};
}
#endif

}  // namespace

#ifdef ADPDM_SIMT
int device_count() { return 1; }

const DeviceInfo& current_device_info() { return emulated_device; }

void set_emulated_device(const DeviceInfo& info) { emulated_device = info; }
#else
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // else the next launch would report it
  return 0;
}

const DeviceInfo& current_device_info() {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, query(device)).first->second;
}
#endif

bool archs_cover(const std::string& archs, int device_arch) {
  std::istringstream list(archs);
  for (std::string entry; std::getline(list, entry, ',');) {
    if (covers(parse_arch(entry), device_arch)) return true;
  }
  return false;
}

bool built_for(const std::string& name) {
  std::istringstream list(ADPDM_BUILT_ARCHS);
  for (std::string entry; std::getline(list, entry, ',');) {
    const BuiltArch arch = parse_arch(entry);
    if (arch.name == name && arch.machine_code) return true;
  }
  return false;
}

void require_built_arch(const char* op) {
  const int arch = current_device_info().arch;
  if (archs_cover(ADPDM_BUILT_ARCHS, arch)) return;
  const char* real = arch == 90 ? "a-real" : "-real";  // sm_90a has wgmma
  throw CudaError(std::string(op) + ": the CUDA kernels were built for " + ADPDM_BUILT_ARCHS +
                  ", which the current device (sm_" + std::to_string(arch) +
                  ") cannot run; build adpdm again with ADPDM_CUDA_ARCHS=" + std::to_string(arch) + real +
                  " (sm_80 is the oldest architecture supported)");
}

}  // namespace adpdm::cuda
