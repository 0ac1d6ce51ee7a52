// The instances of the mma.sync kernel, and what the planner has to know about them.
#pragma once

#include <iterator>

#include "cuda/igemm_problem.h"

namespace adpdm::cuda {

// Bytes of an activation row in one k tile, and how many k tiles shared memory holds.
constexpr int kMmaRowBytes = 64;
constexpr int kMmaStages = 4;

// Every mode has these tiles, narrow to wide; the gathering loader has the first only.
constexpr IgemmTile kMmaTiles[] = {{64, 64}, {128, 64}, {128, 128}};

constexpr int mma_codes_per_tile(IgemmMode mode) { return codes_in(kMmaRowBytes, activation_bits(mode)); }

// Shared memory of the pipeline, or of the tile of int32 sums that takes its place.
constexpr int mma_working_bytes(IgemmMode mode, IgemmTile tile) {
  const int weight_row = kMmaRowBytes * weight_bits(mode) / activation_bits(mode);
  const int pipeline = kMmaStages * (tile.rows * kMmaRowBytes + tile.outputs * weight_row);
  const int sums = tile.rows * tile.outputs * 4;
  return pipeline > sums ? pipeline : sums;
}

// Of a block: a first source's sums wait behind the pipeline while the second one is summed up.
constexpr int mma_shared_bytes(IgemmMode mode, IgemmTile tile, int sources_per_block) {
  return mma_working_bytes(mode, tile) + (sources_per_block - 1) * tile.rows * tile.outputs * 4;
}

struct MmaKernel {
  IgemmMode mode;
  IgemmTile tile;
  bool gather;
  int threads;
  void (*function)(IgemmProblem);
};

// The kernel of that description; every mode and tile of kMmaTiles exists. Throws std::logic_error otherwise.
const MmaKernel& find_mma_kernel(IgemmMode mode, IgemmTile tile, bool gather);

// One list per mode, each in a file of its own so that they compile in parallel.
struct MmaKernelList {
  const MmaKernel* begin;
  const MmaKernel* end;
};
MmaKernelList mma_kernels_a8w8();
MmaKernelList mma_kernels_a8w4();
MmaKernelList mma_kernels_a4w4();
MmaKernelList mma_kernels_a4w4_unpacked();

}  // namespace adpdm::cuda
