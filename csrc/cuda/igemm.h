// conv2d, linear and their packed weights on CUDA; no CUDA header, so that the bindings can include it.
#pragma once

#include <optional>

#include "core/conv2d.h"
#include "core/linear.h"
#include "core/pack_weight.h"
#include "core/stream.h"
#include "cuda/planner.h"

namespace adpdm::cuda {

// Bytes of the blob that conv2d and linear read, a layout of its own: igemm_problem.h.
constexpr int64_t packed_weight_bytes(int64_t out_channels, int64_t group_channels, int64_t taps,
                                      int num_bits) {
  return out_channels * weight_row_bytes(group_channels * taps, num_bits) + kFillBytes;
}

// args.packed has packed_weight_bytes at an address that is a multiple of 16. Throws CudaError.
void pack_weight(const PackWeightArgs& args, Stream stream);

// Whether the kernels read codes that are two to a byte (IgemmSegment::packed). Then they have to be that in
// all segments, at addresses that are multiples of 16.
constexpr bool reads_packed(int weight_bits, int64_t group_channels) {
  return stored_in_nibbles(weight_bits) && group_channels % codes_in(kChunkBytes, 4) == 0;
}

// `choice` overrides ADPDM_CUDA_TILE. Throw std::invalid_argument for operands that no kernel takes, and
// CudaError for a device that was not built for.
IgemmPlan plan_conv2d(const Conv2dArgs& args, const std::optional<TileChoice>& choice = std::nullopt);
IgemmPlan plan_linear(const LinearArgs& args, const std::optional<TileChoice>& choice = std::nullopt);

// `plan` is the one of these args; workspace has plan.workspace_bytes at a multiple of 16. Throw CudaError.
void conv2d(const Conv2dArgs& args, const IgemmPlan& plan, void* workspace, Stream stream);
void linear(const LinearArgs& args, const IgemmPlan& plan, void* workspace, Stream stream);

}  // namespace adpdm::cuda
