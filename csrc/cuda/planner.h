// Chooses the kernel of an integer layer: instruction, tile and number of shares of the reduction. Host code
// only.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cuda/device_info.h"
#include "cuda/igemm_problem.h"

namespace adpdm::cuda {

// The families of kernels.
enum class IgemmCore : uint8_t {
  kMma,        // igemm_mma.cuh: compute capability 8.0 and later
  kWgmma,      // igemm_wgmma.cuh: compute capability 9.0 only
  kDepthwise,  // depthwise.cu: no tensor cores; never a choice of the caller's
};

// What the choice depends on.
struct IgemmRequest {
  const char* op;  // opens every error message
  int64_t rows;
  int64_t outputs;  // of one group
  int64_t groups;
  std::vector<int64_t> reductions;  // of each source: taps * channels of one group
  int activation_bits;              // as stored: 8 or 4
  int weight_bits;                  // as stored: 8 or 4
  bool whole_chunks;   // channels are whole chunks of 16 bytes at addresses that are multiples of 16
  bool wgmma = false;  // wgmma kernels are built and not refused
};

// Codes of a k tile.
int codes_per_tile(IgemmCore core, IgemmMode mode);

// Whether this build has wgmma kernels and ADPDM_FORCE_MMA_SYNC does not refuse them. Throws
// std::invalid_argument where the variable is neither 0 nor 1.
bool wgmma_allowed();

// A choice made by the caller, or by ADPDM_CUDA_TILE.
struct TileChoice {
  IgemmTile tile;
  int splits;                                    // 0: the planner's choice
  std::optional<IgemmCore> core = std::nullopt;  // of a tile that both have; nothing: the planner's choice
};

struct IgemmPlan {
  IgemmCore core;
  IgemmMode mode;
  IgemmTile tile;
  bool gather;              // byte by byte, where channels are not whole chunks
  int splits;               // shares of the reduction; 1: not split
  int splits_of_first;      // shares of the first source
  int64_t workspace_bytes;  // of the slices of a split reduction
};

constexpr int kMaxSplits = 8;

// The fastest plan by the model of tile_table.inc, or the one that was chosen. A chosen number of splits is
// lowered to the number of k tiles, and the gathering kernel has its own tile. Throws std::invalid_argument
// for a tile that does not exist or does not fit the device, and for operands no kernel takes.
IgemmPlan plan_igemm(const IgemmRequest& request, const DeviceInfo& device,
                     const std::optional<TileChoice>& choice);

// ADPDM_CUDA_TILE as "ROWSxOUTPUTS" or "ROWSxOUTPUTS/SPLITS", for instance 128x64/2 or, of one core,
// wgmma:128x128/1; nothing if it is not set. Throws std::invalid_argument for any other text.
std::optional<TileChoice> tile_from_environment();

// For example "mma a8w4 128x64 splits=2 gather", or "depthwise a8w8".
std::string describe(const IgemmPlan& plan);

}  // namespace adpdm::cuda
