// The plain structs that every op of the core is described with: no torch, no CUDA, no ownership.
#pragma once

#include <cstdint>

namespace adpdm {

// Element type of floating-point tensors.
enum class FloatType : uint8_t { kFloat32, kBFloat16, kFloat16 };

// Inclusive range of integer codes; b signed bits give [-2^(b-1), 2^(b-1) - 1].
struct CodeRange {
  int32_t quant_min;
  int32_t quant_max;
};

constexpr CodeRange signed_range(int num_bits) { return {-(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1}; }

// One quantization function per group; the kernel itself reads which one is current, so the host never has
// to.
struct GroupedQParams {
  const float* scale;          // [num_groups] step size, > 0
  const int32_t* zero_point;   // [num_groups] code of real 0
  const int32_t* group_index;  // [1] current group
  int64_t num_groups;
};

}  // namespace adpdm
