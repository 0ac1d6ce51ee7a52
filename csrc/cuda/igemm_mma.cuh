// The implicit GEMM on mma.sync, ldmatrix and cp.async: one source for every device from compute
// capability 8.0 on.
#pragma once

#include "cuda/igemm_epilogue.cuh"
#include "cuda/igemm_mma.h"

namespace adpdm::cuda {

// The constants of one kernel. Warps lie in a grid of [kTileRows / kWarpRows, kTileOutputs / 32].
template <IgemmMode kMode_, int kTileRows_, int kTileOutputs_, int kWarpRows_, bool kGather_>
struct MmaConfig {
  static constexpr IgemmMode kMode = kMode_;
  static constexpr int kTileRows = kTileRows_;
  static constexpr int kTileOutputs = kTileOutputs_;
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kWarpOutputs = 32;
  static constexpr int kFragmentRows = kWarpRows / 16;
  static constexpr int kFragmentOutputs = kWarpOutputs / 8;
  static constexpr int kWarpsDown = kTileRows / kWarpRows;
  static constexpr int kThreads = kWarpsDown * (kTileOutputs / kWarpOutputs) * kWarpSize;
  // At work at once on a multiprocessor: as many as registers allow without spills.
  static constexpr int kBlocksPerSm = kTileOutputs == 128 ? 1 : kTileRows == 128 ? 2 : 3;
  static constexpr int kWeightRowBytes = kMmaRowBytes * weight_bits(kMode) / activation_bits(kMode);
  static constexpr int kActivationBytes = kTileRows * kMmaRowBytes;
  static constexpr int kStageBytes = kActivationBytes + kTileOutputs * kWeightRowBytes;
  static constexpr IgemmTile kTile = {kTileRows, kTileOutputs};

  using Activations = ActivationLoader<activation_bits(kMode), kTileRows, kMmaRowBytes, kThreads, kGather_>;
  using Weights = WeightLoader<kTileOutputs, kWeightRowBytes, kThreads>;
  using Accumulators = int32_t[kFragmentRows][kFragmentOutputs][4];

  ADPDM_DEVICE static int warp_row() { return warp_index() % kWarpsDown * kWarpRows; }
  ADPDM_DEVICE static int warp_output() { return warp_index() / kWarpsDown * kWarpOutputs; }
};

// ---- one step: 32 bytes of each row, half a k tile ----

// The operands of a warp as they are stored.
template <typename C>
struct Fragments {
  uint32_t rows[C::kFragmentRows][4];  // 16 rows each: rows 0-7 and 8-15 of a chunk, then of the next
  uint32_t outputs[C::kFragmentOutputs / 2][4];  // 16 outputs each: both chunks of outputs 0-7, then of 8-15
};

// 4-bit weights of int8 rows: the step is one chunk of 32 codes.
template <int kTileRows, int kTileOutputs, int kWarpRows, bool kGather>
struct Fragments<MmaConfig<IgemmMode::kA8W4, kTileRows, kTileOutputs, kWarpRows, kGather>> {
  uint32_t rows[kWarpRows / 16][4];
  uint32_t outputs[1][4];  // a chunk of 4 times 8 outputs
};

template <typename C>
ADPDM_DEVICE void load_fragments(const uint8_t* stage, int step, Fragments<C>& fragments) {
  const int lane = lane_index();
  ADPDM_UNROLL
  for (int i = 0; i < C::kFragmentRows; ++i) {
    const int row = C::warp_row() + 16 * i + lane % 16;
    load_matrix_x4(fragments.rows[i], stage + swizzled<kMmaRowBytes>(row, 2 * step + lane / 16));
  }
  const uint8_t* weights = stage + C::kActivationBytes;
  if constexpr (C::kMode == IgemmMode::kA8W4) {
    load_matrix_x4(fragments.outputs[0],
                   weights + swizzled<C::kWeightRowBytes>(C::warp_output() + lane, step));
  } else {
    ADPDM_UNROLL
    for (int j = 0; j < C::kFragmentOutputs / 2; ++j) {
      const int output = C::warp_output() + 16 * j + lane / 16 * 8 + lane % 8;
      load_matrix_x4(fragments.outputs[j], weights + swizzled<kMmaRowBytes>(output, 2 * step + lane / 8 % 2));
    }
  }
}

// A byte holds codes j (low) and j + 16: the operand registers of the first and second 16 of 32 codes, times
// 16.
ADPDM_DEVICE uint32_t low_codes(uint32_t packed) { return packed << 4 & 0xf0f0f0f0u; }
ADPDM_DEVICE uint32_t high_codes(uint32_t packed) { return packed & 0xf0f0f0f0u; }

// One mma per 16 x 8 sums; the rows as they are stored, 4-bit weights of int8 rows unpacked.
template <typename C>
ADPDM_DEVICE void multiply(const Fragments<C>& fragments, typename C::Accumulators& sums) {
  ADPDM_UNROLL
  for (int j = 0; j < C::kFragmentOutputs; ++j) {
    uint32_t b[2];
    if constexpr (C::kMode == IgemmMode::kA8W4) {
      b[0] = low_codes(fragments.outputs[0][j]);
      b[1] = high_codes(fragments.outputs[0][j]);
    } else {
      b[0] = fragments.outputs[j / 2][j % 2 * 2];
      b[1] = fragments.outputs[j / 2][j % 2 * 2 + 1];
    }
    ADPDM_UNROLL
    for (int i = 0; i < C::kFragmentRows; ++i) {
      if constexpr (C::kMode == IgemmMode::kA4W4) {
        mma_s4(sums[i][j], fragments.rows[i], b);
      } else {
        mma_s8(sums[i][j], fragments.rows[i], b);
      }
    }
  }
}

// Rows and weights of 4 bits, both unpacked: a chunk of 32 codes makes one mma, a step two.
template <typename C>
ADPDM_DEVICE void multiply_unpacked(const Fragments<C>& fragments, typename C::Accumulators& sums) {
  ADPDM_UNROLL
  for (int half = 0; half < 2; ++half) {
    ADPDM_UNROLL
    for (int i = 0; i < C::kFragmentRows; ++i) {
      const uint32_t upper = fragments.rows[i][2 * half];
      const uint32_t lower = fragments.rows[i][2 * half + 1];
      const uint32_t a[4] = {low_codes(upper), low_codes(lower), high_codes(upper), high_codes(lower)};
      ADPDM_UNROLL
      for (int j = 0; j < C::kFragmentOutputs; ++j) {
        const uint32_t packed = fragments.outputs[j / 2][j % 2 * 2 + half];
        const uint32_t b[2] = {low_codes(packed), high_codes(packed)};
        mma_s8(sums[i][j], a, b);
      }
    }
  }
}

template <typename C>
ADPDM_DEVICE void multiply_step(const Fragments<C>& fragments, typename C::Accumulators& sums) {
  if constexpr (C::kMode == IgemmMode::kA4W4Unpacked) {
    multiply_unpacked<C>(fragments, sums);
  } else {
    multiply<C>(fragments, sums);
  }
}

// ---- a block ----

ADPDM_DEVICE int next_stage(int stage) { return stage + 1 == kMmaStages ? 0 : stage + 1; }

// The sums of one source over a range of k tiles. kMmaStages - 1 tiles are on their way while one is
// multiplied. A tile's second step is multiplied behind the barrier that lets the next tile in: the products
// cover the time in which that tile's first operands are read. (With the barrier between the two steps of a
// tile, ptxas moves both before it.) Nothing branches between two barriers.
template <typename C>
ADPDM_DEVICE void sum_products(const IgemmProblem& problem, const IgemmSource& source,
                               const TilePosition& tile, const KRange& range, uint8_t* stages,
                               typename C::Accumulators& sums) {
  typename C::Activations activations(problem, source, tile, range.begin);
  typename C::Weights weights(problem, source, tile, range.begin);
  const int32_t count = range.end - range.begin;
  const auto load_stage = [&](int stage, bool wanted) {
    uint8_t* target = stages + stage * C::kStageBytes;
    activations.load_tile(problem.geometry, target, wanted);
    weights.load_tile(target + C::kActivationBytes, wanted);
    copy_async_commit();  // empty at the end: the number of groups stays one per tile
  };
  ADPDM_NO_UNROLL
  for (int stage = 0; stage < kMmaStages - 1; ++stage) load_stage(stage, stage < count);
  copy_async_wait<kMmaStages - 2>();  // of this thread; the barrier makes it those of all
  block_barrier();
  Fragments<C> first, second;
  load_fragments<C>(stages, 0, first);
  load_fragments<C>(stages, 1, second);
  load_stage(kMmaStages - 1, kMmaStages - 1 < count);
  multiply_step<C>(first, sums);
  int read = 0;
  ADPDM_NO_UNROLL
  for (int32_t k = 1; k < count; ++k) {
    copy_async_wait<kMmaStages - 2>();
    block_barrier();  // tile k has come, tile k - 1 has been read
    const int free_stage = read;
    read = next_stage(read);
    load_fragments<C>(stages + read * C::kStageBytes, 0, first);
    load_stage(free_stage, k + kMmaStages - 1 < count);
    multiply_step<C>(second, sums);
    load_fragments<C>(stages + read * C::kStageBytes, 1, second);
    multiply_step<C>(first, sums);
  }
  multiply_step<C>(second, sums);
}

template <typename C>
ADPDM_DEVICE void stage_sums(int32_t* staged, const typename C::Accumulators& sums) {
  ADPDM_UNROLL
  for (int i = 0; i < C::kFragmentRows; ++i) {
    ADPDM_UNROLL
    for (int j = 0; j < C::kFragmentOutputs; ++j) {
      stage_fragment<C::kTileOutputs, sum_shift(C::kMode)>(staged, C::warp_row() + 16 * i,
                                                           C::warp_output() + 8 * j, sums[i][j]);
    }
  }
}

// Block (tile, group, share of the reduction). Shared memory: the stages, which the staged sums of the last
// source replace, then the staged sums of a first of two sources.
template <typename C>
ADPDM_KERNEL(C::kThreads, C::kBlocksPerSm)
igemm_mma(const ADPDM_GRID_CONSTANT IgemmProblem problem) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (C::kMode == IgemmMode::kA4W4) {
    __trap();  // never chosen there: ptxas would replace mma_s4 by a slow routine
    return;
  }
#endif
  uint8_t* stages = shared_memory();
  auto* last_sums = reinterpret_cast<int32_t*>(stages);
  auto* first_sums = reinterpret_cast<int32_t*>(stages + mma_working_bytes(C::kMode, C::kTile));
  const TilePosition tile = tile_position(problem, C::kTileRows, C::kTileOutputs);
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
    return store_slice<C::kTileRows, C::kTileOutputs, C::kThreads>(problem, tile, last_sums);
  int32_t* const staged[kMaxSegments] = {problem.num_sources == 1 ? last_sums : first_sums, last_sums};
  finish_tile<C::kTileRows, C::kTileOutputs, C::kThreads>(problem, tile, staged);
}

template <IgemmMode kMode, int kTileRows, int kTileOutputs, int kWarpRows, bool kGather>
MmaKernel mma_kernel() {
  using Config = MmaConfig<kMode, kTileRows, kTileOutputs, kWarpRows, kGather>;
  static_assert(kMmaStages * Config::kStageBytes <= mma_working_bytes(kMode, Config::kTile));
  return {kMode, Config::kTile, kGather, Config::kThreads, igemm_mma<Config>};
}

}  // namespace adpdm::cuda
