// Products by wgmma, with the tile and the inner loop of core B. A build compiles this file for sm_90a only,
// where that is wanted at all.
#include "cuda/igemm_wgmma.cuh"
#include "cuda/launch.cuh"
#include "cuda/peak_kernels.h"

namespace adpdm::cuda {
namespace {

// The widest tile: m64n256k32 reads fewer bytes of shared memory per multiplication than any other product.
using Config = WgmmaConfig<256>;

constexpr int kChunk = 16;  // bytes of a copy
constexpr int kRowChunks = kSwizzleRowBytes / kChunk;

// One k tile, multiplied again and again: no copies, no barriers.
template <typename C>
ADPDM_KERNEL(C::kThreads, 1)
wgmma_peak(const Bytes16* operands,  // [kWgmmaTileRows + kTileOutputs, kRowChunks] of 16 s8: codes, weights
           int32_t steps,
           int32_t* sums) {  // [blocks * kThreads] i32
  uint8_t* stage = shared_memory();
  for (int i = thread_index(); i < C::kStageBytes / kChunk; i += C::kThreads) {
    uint8_t* chunk = stage + swizzled_offset(i / kRowChunks, i % kRowChunks);
    shared_store(reinterpret_cast<Bytes16*>(chunk), load(operands + i));
  }
  fence_proxy_async();
  block_barrier();
  typename C::Accumulators products = {};
  ADPDM_NO_UNROLL
  for (int32_t step = 0; step < steps; ++step) {
    multiply_stage<C>(stage, products);
    wgmma_wait<1>(products);
  }
  wgmma_wait<0>(products);
  uint32_t sum = 0;
  ADPDM_UNROLL
  for (int i = 0; i < C::kTileOutputs / 2; ++i) sum += static_cast<uint32_t>(products[i]);
  store(sums + block_x() * C::kThreads + thread_index(), static_cast<int32_t>(sum));
}

}  // namespace

PeakKernel wgmma_peak_kernel() {
  PeakKernel kernel;
  kernel.name = "wgmma_s8";
  kernel.operations = 2.0 * kWgmmaTileRows * Config::kTileOutputs * kWgmmaRowBytes;
  kernel.operand_bytes = Config::kStageBytes;
  kernel.threads = Config::kThreads;
  kernel.blocks_per_sm = 1;
  kernel.launch = [](const void* operands, int32_t steps, int64_t blocks, int32_t* sums) {
    launch(wgmma_peak<Config>, {blocks, 1, 1, Config::kThreads, Config::kStageBytes, nullptr, "peaks"},
           static_cast<const Bytes16*>(operands), steps, sums);
  };
  return kernel;
}

}  // namespace adpdm::cuda
