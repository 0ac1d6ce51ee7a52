// The kernels that measure how fast tensor cores multiply, for peaks.cu and for their test. No CUDA header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace adpdm::cuda {

// Nothing but products. Every block multiplies the same operands again in every step; every thread writes the
// sum of its accumulators, modulo 2^32. Operands are to be random: zeros take less power, so that the clock
// is higher than layers ever see.
struct PeakKernel {
  const char* name = "";      // mma_s8, mma_s4, wgmma_s8
  std::string obstacle;       // why the device has no such rate, and nothing below holds; empty: it has
  double operations = 0;      // of a step of one block; a multiply-add counts as 2
  int64_t operand_bytes = 0;  // a multiple of 16
  int threads = 0;            // of a block
  int blocks_per_sm = 0;      // that a multiprocessor runs at a time: all there are to launch

  // operands [operand_bytes] u8, sums [blocks * threads] i32; on the default stream. Throws CudaError.
  void (*launch)(const void* operands, int32_t steps, int64_t blocks, int32_t* sums) = nullptr;
};

// All that there are, with what is in the way of each on a device of compute capability `arch`, e.g. 90.
std::vector<PeakKernel> peak_kernels(int arch);

// [128, 128] codes times [256, 128] weights in shared memory. Defined where ADPDM_WGMMA is.
PeakKernel wgmma_peak_kernel();

}  // namespace adpdm::cuda
