// The implicit GEMM on wgmma and cp.async: int8 codes times int8 weights on Hopper (sm_90a).
#pragma once

#include "cuda/igemm_epilogue.cuh"
#include "cuda/igemm_wgmma.h"
#include "cuda/wgmma.cuh"

namespace adpdm::cuda {

// The constants of one kernel: a warpgroup for each 64 rows, both work on all outputs of the tile.
template <int kTileOutputs_>
struct WgmmaConfig {
  static constexpr int kTileOutputs = kTileOutputs_;
  static constexpr int kThreads = kWgmmaTileRows / kWgmmaRows * kWarpgroupThreads;
  static constexpr int kStages = wgmma_stages(kTileOutputs);
  static constexpr int kActivationBytes = kWgmmaTileRows * kWgmmaRowBytes;
  static constexpr int kStageBytes = wgmma_stage_bytes(kTileOutputs);

  using Activations = ActivationLoader<8, kWgmmaTileRows, kWgmmaRowBytes, kThreads, false>;
  using Weights = WeightLoader<kTileOutputs, kWgmmaRowBytes, kThreads>;
  using Accumulators = int32_t[kTileOutputs / 2];  // of [64, kTileOutputs] sums, by 128 threads

  static_assert(kWgmmaRowBytes == kSwizzleRowBytes && kActivationBytes % kSwizzleAtomBytes == 0 &&
                    kStageBytes % kSwizzleAtomBytes == 0,
                "operands begin at atoms");
  static_assert(kStages * kStageBytes >= kWgmmaTileRows * kTileOutputs * 4,
                "the sums take the stages' place");
};

// Starts the products of one k tile.
template <typename C>
ADPDM_DEVICE void multiply_stage(const uint8_t* stage, typename C::Accumulators& sums) {
  const int warpgroup = warp_index() / (kWarpgroupThreads / kWarpSize);
  const uint64_t rows = wgmma_descriptor(stage + warpgroup * kWgmmaRows * kWgmmaRowBytes);
  const uint64_t weights = wgmma_descriptor(stage + C::kActivationBytes);
  wgmma_fence(sums);
  ADPDM_UNROLL
  for (int step = 0; step < kWgmmaRowBytes / kWgmmaDepth; ++step) {
    wgmma_s8(sums, rows + step * kWgmmaDepthStep, weights + step * kWgmmaDepthStep);
  }
  wgmma_commit();
}

// The sums of one source over a range of k tiles. While a tile is multiplied, kStages - 2 are on their way:
// the stage before it may still be read by the other warpgroup.
template <typename C>
ADPDM_DEVICE void sum_products(const IgemmProblem& problem, const IgemmSource& source,
                               const TilePosition& tile, const KRange& range, uint8_t* stages,
                               typename C::Accumulators& sums) {
  typename C::Activations activations(problem, source, tile, range.begin);
  typename C::Weights weights(problem, source, tile, range.begin);
  const int32_t count = range.end - range.begin;
  constexpr int kAhead = C::kStages - 2;
  ADPDM_UNROLL
  for (int stage = 0; stage < kAhead; ++stage) {
    if (stage < count) {
      activations.load_tile(problem.geometry, stages + stage * C::kStageBytes);
      weights.load_tile(stages + stage * C::kStageBytes + C::kActivationBytes);
    }
    copy_async_commit();
  }
  int read = 0;
  int write = kAhead;
  ADPDM_NO_UNROLL
  for (int32_t k = 0; k < count; ++k) {
    copy_async_wait<kAhead - 1>();  // the copies of tile k by this thread
    fence_proxy_async();            // for wgmma to see them, and the halo
    block_barrier();  // those of all threads; and tile k - 2 has been multiplied in all warpgroups
    multiply_stage<C>(stages + read * C::kStageBytes, sums);
    if (k + kAhead < count) {
      activations.load_tile(problem.geometry, stages + write * C::kStageBytes);
      weights.load_tile(stages + write * C::kStageBytes + C::kActivationBytes);
    }
    copy_async_commit();  // empty at the end: the number of groups stays one per tile
    wgmma_wait<1>(sums);  // tile k - 1 has been multiplied, k goes on during the next barrier
    read = read + 1 == C::kStages ? 0 : read + 1;
    write = write + 1 == C::kStages ? 0 : write + 1;
  }
  wgmma_wait<0>(sums);
}

template <typename C>
ADPDM_DEVICE void stage_sums(int32_t* staged, const typename C::Accumulators& sums) {
  ADPDM_UNROLL
  for (int j = 0; j < C::kTileOutputs / 8; ++j) {
    const int32_t fragment[4] = {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]};
    stage_fragment<C::kTileOutputs, 0>(staged, 16 * warp_index(), 8 * j, fragment);
  }
}

// Block (tile, group, share of the reduction). Shared memory as in igemm_mma.
template <typename C>
ADPDM_KERNEL(C::kThreads, 1)
igemm_wgmma(const ADPDM_GRID_CONSTANT IgemmProblem problem) {
  uint8_t* stages = shared_memory();
  auto* last_sums = reinterpret_cast<int32_t*>(stages);
  auto* first_sums = reinterpret_cast<int32_t*>(stages + wgmma_working_bytes(C::kTileOutputs));
  const TilePosition tile = tile_position(problem, kWgmmaTileRows, C::kTileOutputs);
  const int z = static_cast<int>(block_z());
  const int end = end_source(problem, z);
  ADPDM_NO_UNROLL
  for (int s = first_source(problem, z); s < end; ++s) {
    typename C::Accumulators sums = {};
    sum_products<C>(problem, problem.sources[s], tile, k_range(problem, s, z), stages, sums);
    block_barrier();  // the last stages have been read
    stage_sums<C>(s + 1 == end ? last_sums : first_sums, sums);
  }
  block_barrier();
  if (problem.splits > 1)
    return store_slice<kWgmmaTileRows, C::kTileOutputs, C::kThreads>(problem, tile, last_sums);
  int32_t* const staged[kMaxSegments] = {problem.num_sources == 1 ? last_sums : first_sums, last_sums};
  finish_tile<kWgmmaTileRows, C::kTileOutputs, C::kThreads>(problem, tile, staged);
}

template <int kTileOutputs>
WgmmaKernel wgmma_kernel() {
  using Config = WgmmaConfig<kTileOutputs>;
  return {kTileOutputs, Config::kThreads, igemm_wgmma<Config>};
}

}  // namespace adpdm::cuda
