// The instructions of cuda/device.cuh that move data between the lanes of a warp, on the executor.
#pragma once

#include <cstdint>
#include <cstring>

#include "simt/executor.h"

namespace adpdm::simt {

// The value of lane `source`, which is this lane's own where source is no lane of the warp.
template <typename T>
T shuffle(const char* name, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  const Messages& messages = executor().exchange(name, &value, sizeof value);
  if (source < 0 || source >= kWarpSize) return value;
  T other;
  std::memcpy(&other, messages[static_cast<size_t>(source)].bytes, sizeof other);
  return other;
}

// 16 bytes from global to shared memory, seen after commit and wait.
void copy_async16(void* shared, const void* global);

// ldmatrix.x4: four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8
// and receives of matrix i, as r[i], the elements 2 * (l % 4) and the next of row l / 4.
void load_matrix_x4(uint32_t (&r)[4], const void* shared_row);

// mma.m16n8k32, A [16, 32] s8 by rows, B [32, 8] s8 by columns: c += A B. Fails where a sum leaves int32.
void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// mma.m16n8k64, A [16, 64] s4, B [64, 8] s4.
void mma_s4(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace adpdm::simt
