// What kernels that end in codes of rotated channels share.
#pragma once

#include <type_traits>

#include "core/hadamard.h"
#include "cuda/quantizer.cuh"

namespace adpdm::cuda {

// How the channels of a row are divided among threads: `stride` neighbouring ones have a block each, whose
// channels lie stride apart, so that what neighbours read and write together is one run of memory.
struct RotatedPlace {
  int64_t row, channel, stride;  // the first channel of the block

  ADPDM_DEVICE RotatedPlace(int64_t index, int64_t channels, int block)
      : row(index / (channels / block)), channel(index % (channels / block)), stride(channels / block) {}
};

// The elements first, first + stride, ... of a tensor.
template <FloatType kType, int kBlock>
ADPDM_DEVICE void load_block(const void* data, int64_t first, int64_t stride, float (&values)[kBlock]) {
  ADPDM_UNROLL
  for (int j = 0; j < kBlock; ++j) values[j] = load_float(data, first + j * stride, kType);
}

// Rotates the values of a block, which are used up; their codes go to codes, codes + stride, ...
template <int kBlock>
ADPDM_DEVICE void store_rotated(float (&values)[kBlock], const Quantizer& q, int8_t* codes, int64_t stride) {
  hadamard_block<kBlock>(values);
  ADPDM_UNROLL
  for (int j = 0; j < kBlock; ++j) store(codes + j * stride, code_of(values[j], q));
}

// Calls body(std::integral_constant<int, block>()).
template <typename Body>
void with_hadamard_block(int64_t block, Body&& body) {
  if (block == 4) return body(std::integral_constant<int, 4>());
  if (block == 16) return body(std::integral_constant<int, 16>());
  body(std::integral_constant<int, 64>());
}

}  // namespace adpdm::cuda
