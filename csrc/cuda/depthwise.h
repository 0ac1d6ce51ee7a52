// Depthwise convolutions on CUDA, every channel by itself: 8 channels per thread, sums of 4 taps an
// instruction. As groups of a GEMM tile they would take 64 outputs each.
#pragma once

#include "core/conv2d.h"
#include "core/stream.h"
#include "cuda/igemm_problem.h"

namespace adpdm::cuda {

// Whether each output channel has one input channel, its own, of int8 codes.
bool is_depthwise(const Conv2dArgs& args);

// `problem` describes the channels as outputs of one group; mode is kA8W8 or kA8W4. Throws CudaError.
void launch_depthwise(const char* op, const IgemmProblem& problem, IgemmMode mode, Stream stream);

}  // namespace adpdm::cuda
