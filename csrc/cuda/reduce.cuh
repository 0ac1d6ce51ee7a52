// Reductions over a warp and a block in a fixed order: the same bits in every run.
#pragma once

#include "cuda/device.cuh"

namespace adpdm::cuda {

// Bytes of shared memory a block reduction of T works in: one T per warp.
template <typename T>
constexpr int64_t kReduceScratchBytes = 32 * static_cast<int64_t>(sizeof(T));

struct Sum {
  template <typename T>
  ADPDM_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// Min and Max ignore a NaN beside a number; callers that have to find one keep a flag.
struct Min {
  template <typename T>
  ADPDM_DEVICE T operator()(T a, T b) const {
    return b < a || a != a ? b : a;
  }
};

struct Max {
  template <typename T>
  ADPDM_DEVICE T operator()(T a, T b) const {
    return b > a || a != a ? b : a;
  }
};

// Combines the values of a warp by a commutative function: every lane receives the same bits (after Min and
// Max but for the sign of a zero).
template <typename T, typename Combine>
ADPDM_DEVICE T warp_reduce(T value, Combine combine) {
  ADPDM_UNROLL
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}

// Combines the values of all threads of the block; every thread receives the result. `scratch` is shared
// memory of kReduceScratchBytes<T>, free again on return. Contains barriers: all threads must come.
template <typename T, typename Combine>
ADPDM_DEVICE T block_reduce(T value, T identity, T* scratch, Combine combine) {
  value = warp_reduce(value, combine);
  if (lane_index() == 0) shared_store(scratch + warp_index(), value);
  block_barrier();
  const bool has_warp = lane_index() < num_threads() / kWarpSize;
  value = has_warp ? shared_load(scratch + lane_index()) : identity;
  block_barrier();
  return warp_reduce(value, combine);
}

// For float, double and integers of 4 or 8 bytes.
template <typename T>
ADPDM_DEVICE T block_sum(T value, T* scratch) {
  return block_reduce(value, T(0), scratch, Sum());
}

template <typename T>
ADPDM_DEVICE T block_min(T value, T* scratch) {
  return block_reduce(value, value, scratch, Min());
}

template <typename T>
ADPDM_DEVICE T block_max(T value, T* scratch) {
  return block_reduce(value, value, scratch, Max());
}

}  // namespace adpdm::cuda
