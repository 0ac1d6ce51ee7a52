// Rotation of the channels of a tensor by Hadamard matrices, before they are quantized: it spreads what
// stands out.
#pragma once

#include "core/quant_math.h"
#include "core/row_view.h"
#include "core/stream.h"
#include "core/types.h"

namespace adpdm {

// Channels that are rotated together, a power of four: then the factor of the matrix is a power of two, and
// a rotation undoes itself but for rounding.
constexpr bool is_hadamard_block(int64_t block) { return block == 4 || block == 16 || block == 64; }

template <int kBlock>
constexpr float kHadamardFactor = kBlock == 4    ? 0.5f
                                  : kBlock == 16 ? 0.25f
                                                 : 0.125f;  // 1 / sqrt(kBlock)

// Registers cannot be indexed: all loops over a block are to be written out.
#if defined(__CUDA_ARCH__) || defined(__clang__)
#define ADPDM_HD_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // what nvcc compiles for the host, and does not run
#define ADPDM_HD_UNROLL
#else
#define ADPDM_HD_UNROLL _Pragma("GCC unroll 64")
#endif

// Two stages of sums and differences, of elements kApart and 2 kApart apart, and all that follow among so
// many.
template <int kApart, int kBlock, typename T>
ADPDM_HD void hadamard_stages(T (&v)[kBlock]) {
  ADPDM_HD_UNROLL
  for (int first = 0; first < kBlock; first += 4 * kApart) {
    ADPDM_HD_UNROLL
    for (int i = first; i < first + kApart; ++i) {
      const T a = v[i] + v[i + kApart], b = v[i] - v[i + kApart];
      const T c = v[i + 2 * kApart] + v[i + 3 * kApart], d = v[i + 2 * kApart] - v[i + 3 * kApart];
      v[i] = a + c;
      v[i + kApart] = b + d;
      v[i + 2 * kApart] = a - c;
      v[i + 3 * kApart] = b - d;
    }
  }
  if constexpr (4 * kApart < kBlock) hadamard_stages<4 * kApart>(v);
}

// Multiplies v by the Hadamard matrix (Sylvester's) over sqrt(kBlock). Sums are taken in this order
// everywhere, so that every backend rounds alike. T is float or a vector type of cpu/vec.h.
template <int kBlock, typename T>
ADPDM_HD void hadamard_block(T (&v)[kBlock]) {
  static_assert(kBlock == 4 || kBlock == 16 || kBlock == 64, "as is_hadamard_block");
  hadamard_stages<1>(v);
  ADPDM_HD_UNROLL
  for (int i = 0; i < kBlock; ++i) v[i] = v[i] * T(kHadamardFactor<kBlock>);
}

namespace cpu {

// Channels k, k + stride, k + 2 stride, ... together, of which there are `block` in a row: stride = columns /
// block. y does not overlap x.
void hadamard(const RowView& x, int64_t block,
              float* y);  // [rows, columns] dense

// The codes of that, in one pass: what is rotated is not stored.
void hadamard_quantize(const RowView& x, int64_t block, const GroupedQParams& qparams, int num_bits,
                       int8_t* codes);  // [rows, columns] dense

}  // namespace cpu

// The same on the stream; an index outside [0, num_groups) acts as the nearest inside. Throw CudaError where
// a launch fails.
namespace cuda {

void hadamard(const RowView& x, int64_t block,
              float* y,  // [rows, columns] dense
              Stream stream);
void hadamard_quantize(const RowView& x, int64_t block, const GroupedQParams& qparams, int num_bits,
                       int8_t* codes,  // [rows, columns] dense
                       Stream stream);

}  // namespace cuda
}  // namespace adpdm
