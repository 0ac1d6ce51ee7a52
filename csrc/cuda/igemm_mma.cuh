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
  static constexpr bool kUnpacks = kMode == IgemmMode::kA4W4Unpacked;
  static constexpr int kBlocksPerSm = kTileOutputs == 128 ? 1 : kTileRows == 128 && kUnpacks ? 2 : 3;
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

// ---- operands of one step: 32 bytes of each row ----

// Rows [row, row + 16) at chunks `chunk` and `chunk + 1`, as the A operand of one mma.
ADPDM_DEVICE void load_rows(uint32_t (&a)[4], const uint8_t* tile, int row, int chunk) {
  const int lane = lane_index();
  load_matrix_x4(a, tile + swizzled<kMmaRowBytes>(row + lane % 16, chunk + lane / 16));
}

// Outputs [output, output + 16) at chunks `chunk` and `chunk + 1`, as the B operands of two mma.
ADPDM_DEVICE void load_outputs(uint32_t (&b)[4], const uint8_t* tile, int output, int chunk) {
  const int lane = lane_index();
  load_matrix_x4(b, tile + swizzled<kMmaRowBytes>(output + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}

// A byte holds codes j (low) and j + 16: the operand registers of the first and second 16 of 32 codes,
// times 16.
ADPDM_DEVICE uint32_t low_codes(uint32_t packed) { return packed << 4 & 0xf0f0f0f0u; }
ADPDM_DEVICE uint32_t high_codes(uint32_t packed) { return packed & 0xf0f0f0f0u; }

template <IgemmMode kMode>
ADPDM_DEVICE void multiply(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kMode == IgemmMode::kA4W4) {
    mma_s4(c, a, b);
  } else {
    mma_s8(c, a, b);
  }
}

// One k tile where rows and weights are multiplied as they are stored, and where 4-bit weights meet int8
// rows.
template <typename C>
ADPDM_DEVICE void multiply_tile(const uint8_t* rows, const uint8_t* weights, typename C::Accumulators& sums) {
  ADPDM_UNROLL
  for (int step = 0; step < kMmaRowBytes / 32; ++step) {
    uint32_t a[C::kFragmentRows][4];
    uint32_t b[C::kFragmentOutputs][2];
    ADPDM_UNROLL
    for (int i = 0; i < C::kFragmentRows; ++i) load_rows(a[i], rows, C::warp_row() + 16 * i, 2 * step);
    if constexpr (C::kMode == IgemmMode::kA8W4) {
      // Rows of 32 bytes: one chunk of the 32 outputs of a warp holds the step's 32 codes.
      uint32_t packed[4];
      load_matrix_x4(packed, weights + swizzled<C::kWeightRowBytes>(C::warp_output() + lane_index(), step));
      ADPDM_UNROLL
      for (int j = 0; j < C::kFragmentOutputs; ++j) {
        b[j][0] = low_codes(packed[j]);
        b[j][1] = high_codes(packed[j]);
      }
    } else {
      ADPDM_UNROLL
      for (int j = 0; j < C::kFragmentOutputs; j += 2) {
        uint32_t pair[4];
        load_outputs(pair, weights, C::warp_output() + 8 * j, 2 * step);
        b[j][0] = pair[0];
        b[j][1] = pair[1];
        b[j + 1][0] = pair[2];
        b[j + 1][1] = pair[3];
      }
    }
    ADPDM_UNROLL
    for (int i = 0; i < C::kFragmentRows; ++i) {
      ADPDM_UNROLL
      for (int j = 0; j < C::kFragmentOutputs; ++j) multiply<C::kMode>(sums[i][j], a[i], b[j]);
    }
  }
}

// One k tile of 4-bit rows and weights, both unpacked: a chunk of 32 codes makes one int8 step.
template <typename C>
ADPDM_DEVICE void multiply_unpacked_tile(const uint8_t* rows, const uint8_t* weights,
                                         typename C::Accumulators& sums) {
  ADPDM_UNROLL
  for (int chunk = 0; chunk < kMmaRowBytes / kChunkBytes; chunk += 2) {
    uint32_t rows16[C::kFragmentRows][4];
    uint32_t outputs16[C::kFragmentOutputs / 2][4];
    ADPDM_UNROLL
    for (int i = 0; i < C::kFragmentRows; ++i) load_rows(rows16[i], rows, C::warp_row() + 16 * i, chunk);
    ADPDM_UNROLL
    for (int j = 0; j < C::kFragmentOutputs / 2; ++j) {
      load_outputs(outputs16[j], weights, C::warp_output() + 16 * j, chunk);
    }
    ADPDM_UNROLL
    for (int half = 0; half < 2; ++half) {
      ADPDM_UNROLL
      for (int i = 0; i < C::kFragmentRows; ++i) {
        const uint32_t upper = rows16[i][2 * half];
        const uint32_t lower = rows16[i][2 * half + 1];
        const uint32_t a[4] = {low_codes(upper), low_codes(lower), high_codes(upper), high_codes(lower)};
        ADPDM_UNROLL
        for (int j = 0; j < C::kFragmentOutputs; ++j) {
          const uint32_t packed = outputs16[j / 2][j % 2 * 2 + half];
          const uint32_t b[2] = {low_codes(packed), high_codes(packed)};
          mma_s8(sums[i][j], a, b);
        }
      }
    }
  }
}

// ---- a block ----

// The sums of one source over a range of k tiles. kMmaStages - 1 tiles are on their way while one is
// multiplied.
template <typename C>
ADPDM_DEVICE void sum_products(const IgemmProblem& problem, const IgemmSource& source,
                               const TilePosition& tile, const KRange& range, uint8_t* stages,
                               typename C::Accumulators& sums) {
  typename C::Activations activations(problem, source, tile, range.begin);
  typename C::Weights weights(problem, source, tile, range.begin);
  const int32_t count = range.end - range.begin;
  ADPDM_NO_UNROLL
  for (int stage = 0; stage < kMmaStages - 1; ++stage) {
    if (stage < count) {
      activations.load_tile(problem.geometry, stages + stage * C::kStageBytes);
      weights.load_tile(stages + stage * C::kStageBytes + C::kActivationBytes);
    }
    copy_async_commit();
  }
  int read = 0;
  int write = kMmaStages - 1;
  ADPDM_NO_UNROLL
  for (int32_t k = 0; k < count; ++k) {
    copy_async_wait<kMmaStages - 2>();  // of this thread; the barrier makes it those of all
    block_barrier();                    // and everybody has left the stage that is filled next
    if (k + kMmaStages - 1 < count) {
      activations.load_tile(problem.geometry, stages + write * C::kStageBytes);
      weights.load_tile(stages + write * C::kStageBytes + C::kActivationBytes);
    }
    copy_async_commit();  // empty at the end: the number of groups stays one per tile
    const uint8_t* rows = stages + read * C::kStageBytes;
    if constexpr (C::kMode == IgemmMode::kA4W4Unpacked) {
      multiply_unpacked_tile<C>(rows, rows + C::kActivationBytes, sums);
    } else {
      multiply_tile<C>(rows, rows + C::kActivationBytes, sums);
    }
    read = read + 1 == kMmaStages ? 0 : read + 1;
    write = write + 1 == kMmaStages ? 0 : write + 1;
  }
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
