// Products by mma.sync, and the list of all kernels that measure tensor cores.
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/peak_kernels.h"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;

// A warp multiplies each of 4 fragments of A by each of 2 of B, as a tile of core A does. 8 accumulators that
// do not wait for each other cover the latency of the tensor core.
constexpr int kFragmentsA = 4;
constexpr int kFragmentsB = 2;
constexpr int kWords = 4 * kFragmentsA + 2 * kFragmentsB;  // of a thread

template <bool kNibbles>
ADPDM_KERNEL(kThreads, kBlocksPerSm)
mma_peak(const uint32_t* operands,  // [kWords, kThreads] u32: fragments of A, then of B
         int32_t steps,
         int32_t* sums) {  // [blocks * kThreads] i32
  uint32_t a[kFragmentsA][4], b[kFragmentsB][2];
  const uint32_t* mine = operands + thread_index();
  ADPDM_UNROLL
  for (int i = 0; i < 4 * kFragmentsA; ++i) a[i / 4][i % 4] = load(mine + i * kThreads);
  ADPDM_UNROLL
  for (int i = 0; i < 2 * kFragmentsB; ++i) b[i / 2][i % 2] = load(mine + (4 * kFragmentsA + i) * kThreads);
  int32_t c[kFragmentsA * kFragmentsB][4] = {};
  ADPDM_NO_UNROLL
  for (int32_t step = 0; step < steps; ++step) {
    ADPDM_UNROLL
    for (int i = 0; i < kFragmentsA * kFragmentsB; ++i) {
      if constexpr (kNibbles) {
        mma_s4(c[i], a[i / kFragmentsB], b[i % kFragmentsB]);
      } else {
        mma_s8(c[i], a[i / kFragmentsB], b[i % kFragmentsB]);
      }
    }
  }
  uint32_t sum = 0;
  ADPDM_UNROLL
  for (int i = 0; i < 4 * kFragmentsA * kFragmentsB; ++i) sum += static_cast<uint32_t>(c[i / 4][i % 4]);
  store(sums + block_x() * kThreads + thread_index(), static_cast<int32_t>(sum));
}

template <bool kNibbles>
PeakKernel mma_peak_kernel() {
  PeakKernel kernel;
  kernel.name = kNibbles ? "mma_s4" : "mma_s8";
  kernel.operations = 2.0 * 16 * 8 * (kNibbles ? 64 : 32) * kFragmentsA * kFragmentsB * kThreads / kWarpSize;
  kernel.operand_bytes = 4 * kWords * kThreads;
  kernel.threads = kThreads;
  kernel.blocks_per_sm = kBlocksPerSm;
  kernel.launch = [](const void* operands, int32_t steps, int64_t blocks, int32_t* sums) {
    launch(mma_peak<kNibbles>, {blocks, 1, 1, kThreads, 0, nullptr, "peaks"},
           static_cast<const uint32_t*>(operands), steps, sums);
  };
  return kernel;
}

std::string capability(int arch) {
  return "compute capability " + std::to_string(arch / 10) + "." + std::to_string(arch % 10);
}

}  // namespace

std::vector<PeakKernel> peak_kernels(int arch) {
  PeakKernel wgmma;
  wgmma.name = "wgmma_s8";
  if (arch != 90) {
    wgmma.obstacle = capability(arch) + " has no wgmma, only 9.0 has";
  } else {
#ifdef ADPDM_WGMMA
    wgmma = wgmma_peak_kernel();
#else
    wgmma.obstacle = "built without 90a-real in ADPDM_CUDA_ARCHS";
#endif
  }
  PeakKernel nibbles = mma_peak_kernel<true>();
  if (arch >= 90) nibbles.obstacle = capability(arch) + " emulates products of s4";
  return {mma_peak_kernel<false>(), nibbles, wgmma};
}

}  // namespace adpdm::cuda
