// The instances of the wgmma kernel (compute capability 9.0), and what the planner has to know about them.
#pragma once

#include "cuda/igemm_problem.h"

namespace adpdm::cuda {

// The kernel takes int8 codes, int8 weights and whole chunks of channels; igemm_mma.h takes everything.
constexpr int kWgmmaRowBytes = 128;  // of activations and of weights in a k tile: the widest swizzle there is
constexpr int kWgmmaTileRows = 128;  // two warpgroups of 64

// Narrow to wide. 160 divides the 320, 640 and 1280 channels of the Stable Diffusion U-Nets.
constexpr IgemmTile kWgmmaTiles[] = {{kWgmmaTileRows, 128}, {kWgmmaTileRows, 160}, {kWgmmaTileRows, 256}};

// K tiles in shared memory: with 128 and 160 outputs, as many as leave room for the sums of a second source.
constexpr int wgmma_stages(int tile_outputs) { return tile_outputs == 128 ? 5 : 4; }

constexpr int wgmma_stage_bytes(int tile_outputs) { return (kWgmmaTileRows + tile_outputs) * kWgmmaRowBytes; }

// The pipeline, which the tile of int32 sums replaces in the end.
constexpr int wgmma_working_bytes(int tile_outputs) {
  return wgmma_stages(tile_outputs) * wgmma_stage_bytes(tile_outputs);
}

// Of a block: a first source's sums wait behind the pipeline while the second one is summed up.
constexpr int wgmma_shared_bytes(IgemmTile tile, int sources_per_block) {
  return wgmma_working_bytes(tile.outputs) + (sources_per_block - 1) * tile.rows * tile.outputs * 4;
}

struct WgmmaKernel {
  int tile_outputs;
  int threads;
  void (*function)(IgemmProblem);
};

// The kernel of a tile of kWgmmaTiles. Throws std::logic_error otherwise. Defined where ADPDM_WGMMA is.
const WgmmaKernel& find_wgmma_kernel(IgemmTile tile);

}  // namespace adpdm::cuda
