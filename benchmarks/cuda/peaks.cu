// Measures the ceilings of a GPU that kernels are judged by: copy bandwidth and integer tensor-core rates.
// Prints one JSON object; needs no Python. Every figure is the median of kRounds launches timed by events.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/device.cuh"

namespace {

using namespace adpdm::cuda;

constexpr int kRounds = 25;
constexpr int kWarmup = 3;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "peaks: %s failed: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Median seconds of one call of `work`, which enqueues on the default stream.
template <typename Work>
double median_seconds(const Work& work) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> seconds;
  for (int round = -kWarmup; round < kRounds; ++round) {
    check(cudaEventRecord(begin), "cudaEventRecord");
    work();
    check(cudaGetLastError(), "launch");
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    if (round >= 0) seconds.push_back(1e-3 * milliseconds);
  }
  check(cudaEventDestroy(begin), "cudaEventDestroy");
  check(cudaEventDestroy(end), "cudaEventDestroy");
  std::nth_element(seconds.begin(), seconds.begin() + kRounds / 2, seconds.end());
  return seconds[kRounds / 2];
}

// Bytes read plus bytes written per second of a copy inside the device.
double copy_bandwidth(int64_t bytes) {
  void* source = nullptr;
  void* target = nullptr;
  check(cudaMalloc(&source, static_cast<size_t>(bytes)), "cudaMalloc");
  check(cudaMalloc(&target, static_cast<size_t>(bytes)), "cudaMalloc");
  check(cudaMemset(source, 1, static_cast<size_t>(bytes)), "cudaMemset");
  const double seconds = median_seconds([&] {
    check(cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice),
          "cudaMemcpyAsync");
  });
  check(cudaFree(source), "cudaFree");
  check(cudaFree(target), "cudaFree");
  return 2.0 * static_cast<double>(bytes) / seconds;
}

constexpr int kThreads = 256;
constexpr int kChains = 8;  // independent accumulators of a warp: covers the latency of the tensor core
constexpr int kSteps = 4096;

// Nothing but mma.sync on registers. The operands come from memory so that no product is known to be zero.
template <bool kNibbles>
ADPDM_KERNEL(kThreads, 2)
mma_peak(const uint32_t* operands,  // [6] u32
         int32_t* sums) {           // [blocks * threads] i32
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = load(operands + i);
  for (int i = 0; i < 2; ++i) b[i] = load(operands + 4 + i);
  int32_t c[kChains][4] = {};
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    ADPDM_UNROLL
    for (int chain = 0; chain < kChains; ++chain) {
      if constexpr (kNibbles) {
        mma_s4(c[chain], a, b);
      } else {
        mma_s8(c[chain], a, b);
      }
    }
  }
  int32_t sum = 0;
  for (int chain = 0; chain < kChains; ++chain) {
    for (int i = 0; i < 4; ++i) sum += c[chain][i];
  }
  store(sums + block_x() * kThreads + thread_index(), sum);
}

// Multiply-adds count twice.
template <bool kNibbles>
double mma_operations_per_second(int num_sms) {
  const int blocks = 2 * num_sms;
  const uint32_t host[6] = {0x01020304u, 0x11121314u, 0x21222324u, 0x31323334u, 0x01010101u, 0x02020202u};
  uint32_t* operands = nullptr;
  int32_t* sums = nullptr;
  check(cudaMalloc(&operands, sizeof host), "cudaMalloc");
  check(cudaMalloc(&sums, sizeof(int32_t) * static_cast<size_t>(blocks) * kThreads), "cudaMalloc");
  check(cudaMemcpy(operands, host, sizeof host, cudaMemcpyHostToDevice), "cudaMemcpy");
  void* arguments[] = {&operands, &sums};
  const auto* kernel = reinterpret_cast<const void*>(&mma_peak<kNibbles>);
  const double seconds = median_seconds([&] {
    check(
        cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, nullptr),
        "cudaLaunchKernel");
  });
  check(cudaFree(operands), "cudaFree");
  check(cudaFree(sums), "cudaFree");
  const double per_mma = 2.0 * 16 * 8 * (kNibbles ? 64 : 32);
  return per_mma * kChains * kSteps * (kThreads / 32) * blocks / seconds;
}

}  // namespace

int main() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  const int arch = 10 * properties.major + properties.minor;
  std::printf("{\n  \"device\": \"%s\",\n  \"arch\": %d,\n  \"num_sms\": %d,\n", properties.name, arch,
              properties.multiProcessorCount);
  for (const int64_t mebibytes : {1, 8, 64, 1024}) {
    std::printf("  \"copy_%lldMiB_GBps\": %.1f,\n", static_cast<long long>(mebibytes),
                1e-9 * copy_bandwidth(mebibytes << 20));
  }
  if (arch < 90) {  // later ones only emulate it
    std::printf("  \"mma_s4_TOPS\": %.1f,\n",
                1e-12 * mma_operations_per_second<true>(properties.multiProcessorCount));
  }
  std::printf("  \"mma_s8_TOPS\": %.1f\n}\n",
              1e-12 * mma_operations_per_second<false>(properties.multiProcessorCount));
  return 0;
}
