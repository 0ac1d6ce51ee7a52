// Kernels that exist only for device_test.cpp: one for each part of cuda/device.cuh and cuda/reduce.cuh.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace adpdm::testing {

// y[i] = x[i] converted to float32.
void convert_to_float(const uint16_t* x, float* y, int64_t size, FloatType type);

// y[i] = x[i] rounded to the 16-bit type.
void convert_from_float(const float* x, uint16_t* y, int64_t size, FloatType type);

// y[i] = fma(a[i], b[i], c[i]); z[i] = 1 / a[i].
void multiply_add_and_invert(const float* a, const float* b, const float* c, float* y, float* z,
                             int64_t size);

struct Reduced {
  float sum;
  double precise_sum;
  float smallest;
  float largest;
};

// One block of `threads` threads reduces x [threads] f32; result [threads], what every thread received.
void reduce_block(const float* x, Reduced* result, int threads);

// Adds 1 to every counter from every thread of 3 blocks of 64 threads, by way of shared memory for the first.
void count_threads(int32_t* by_block, int32_t* total, uint64_t* wide_total, int32_t* extrema);

// Copies 16 x 32 codes a and 8 x 32 codes b to shared memory and writes c [16, 8] = a b^T, all in one warp.
void multiply_tile(const int8_t* a, const int8_t* b, int32_t* c);

// A launch of `blocks` blocks that writes value to x[0], with that much shared memory and that many threads.
void launch_anything(int32_t* x, int32_t value, int64_t blocks, int threads, int64_t shared_bytes);

// remainder[0] = the address of a block's shared memory modulo 1024.
void find_shared_alignment(int32_t* remainder);

// memset_async on the default stream.
void set_bytes(uint8_t* x, int value, int64_t bytes);

}  // namespace adpdm::testing
