// Measures the ceilings of a GPU that kernels are judged by: copy bandwidth and integer tensor-core rates.
// Prints one JSON object; needs no Python. Every figure is the median of kRounds samples timed by events,
// each of enough work to last kSampleSeconds; null stands where the device has no such instruction, with the
// reason beside it.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/peak_kernels.h"

namespace {

using namespace adpdm::cuda;

constexpr int kRounds = 25;
constexpr double kWarmupSeconds = 0.5;   // of the same work: clock and power reach what a long run has
constexpr double kSampleSeconds = 2e-3;  // at least: long against a start and the 2 us that an event resolves
constexpr uint32_t kSeed = 1;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status));
}

// Two events around work.
class Timer {
 public:
  Timer() {
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  // Of one call of `work`, which enqueues on the default stream.
  template <typename Work>
  double seconds(const Work& work) const {
    check(cudaEventRecord(begin_), "cudaEventRecord");
    work();
    check(cudaEventRecord(end_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return 1e-3 * milliseconds;
  }

 private:
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

// Doubles `amount`, on which `work` depends, until one call of `work` lasts kSampleSeconds.
template <typename Amount, typename Work>
void fill_sample(Amount& amount, const Work& work) {
  const Timer timer;
  // Of two: the first launch of all loads the kernel.
  while (std::min(timer.seconds(work), timer.seconds(work)) < kSampleSeconds) amount *= 2;
}

template <typename Work>
double median_seconds(const Work& work) {
  using Clock = std::chrono::steady_clock;
  const Timer timer;
  const std::chrono::duration<double> warmup(kWarmupSeconds);
  for (const auto start = Clock::now(); Clock::now() - start < warmup;) timer.seconds(work);
  std::vector<double> seconds;
  for (int round = 0; round < kRounds; ++round) seconds.push_back(timer.seconds(work));
  std::nth_element(seconds.begin(), seconds.begin() + kRounds / 2, seconds.end());
  return seconds[kRounds / 2];
}

// Bytes read plus bytes written per second of copies inside the device, one after the other: small ones stay
// in its L2 cache, and what it takes the host to start one counts.
double copy_bandwidth(int64_t bytes) {
  void* source = nullptr;
  void* target = nullptr;
  check(cudaMalloc(&source, static_cast<size_t>(bytes)), "cudaMalloc");
  check(cudaMalloc(&target, static_cast<size_t>(bytes)), "cudaMalloc");
  check(cudaMemset(source, 1, static_cast<size_t>(bytes)), "cudaMemset");
  int copies = 1;
  const auto work = [&] {
    for (int copy = 0; copy < copies; ++copy)
      check(cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice),
            "cudaMemcpyAsync");
  };
  fill_sample(copies, work);
  const double seconds = median_seconds(work);
  check(cudaFree(source), "cudaFree");
  check(cudaFree(target), "cudaFree");
  return 2.0 * static_cast<double>(bytes) * copies / seconds;
}

// Multiply-adds count twice. Random operands, and launches that fill the device once.
double operations_per_second(const PeakKernel& kernel, int num_sms) {
  std::vector<uint32_t> random(static_cast<size_t>(kernel.operand_bytes) / sizeof(uint32_t));
  std::generate(random.begin(), random.end(), std::mt19937(kSeed));
  const int64_t blocks = int64_t{kernel.blocks_per_sm} * num_sms;
  void* operands = nullptr;
  int32_t* sums = nullptr;
  check(cudaMalloc(&operands, static_cast<size_t>(kernel.operand_bytes)), "cudaMalloc");
  check(cudaMalloc(&sums, sizeof(int32_t) * static_cast<size_t>(blocks * kernel.threads)), "cudaMalloc");
  check(
      cudaMemcpy(operands, random.data(), static_cast<size_t>(kernel.operand_bytes), cudaMemcpyHostToDevice),
      "cudaMemcpy");
  int32_t steps = 64;
  const auto work = [&] { kernel.launch(operands, steps, blocks, sums); };
  fill_sample(steps, work);
  const double seconds = median_seconds(work);
  check(cudaFree(operands), "cudaFree");
  check(cudaFree(sums), "cudaFree");
  return kernel.operations * steps * static_cast<double>(blocks) / seconds;
}

// A number where the device has such products, else null and why.
void print_rate(const PeakKernel& kernel, int num_sms) {
  if (kernel.obstacle.empty()) {
    std::printf(",\n  \"%s_TOPS\": %.1f", kernel.name, 1e-12 * operations_per_second(kernel, num_sms));
  } else {
    std::printf(",\n  \"%s_TOPS\": null,\n  \"%s_obstacle\": \"%s\"", kernel.name, kernel.name,
                kernel.obstacle.c_str());
  }
}

void run() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  const int arch = 10 * properties.major + properties.minor;
  std::printf("{\n  \"device\": \"%s\",\n  \"arch\": %d,\n  \"num_sms\": %d", properties.name, arch,
              properties.multiProcessorCount);
  for (const int64_t mebibytes : {1, 8, 64, 1024}) {
    std::printf(",\n  \"copy_%lldMiB_GBps\": %.1f", static_cast<long long>(mebibytes),
                1e-9 * copy_bandwidth(mebibytes << 20));
  }
  for (const PeakKernel& kernel : peak_kernels(arch)) print_rate(kernel, properties.multiProcessorCount);
  std::printf("\n}\n");
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "peaks: %s\n", error.what());
    return 1;
  }
  return 0;
}
