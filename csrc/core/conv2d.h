// conv2d: the sum of linear.h over the taps of a convolution; the halo holds real 0, each segment's
// zero-point code.
#pragma once

#include <cstdint>

#include "core/igemm.h"

namespace adpdm {

struct Size2d {
  int64_t height;
  int64_t width;
};

struct Conv2dArgs {
  IgemmSegment segments[kMaxSegments];
  int num_segments;   // 1 where groups > 1
  const float* bias;  // [O] f32 or nullptr
  void* output;       // [N, out.height, out.width, O] output_type
  FloatType output_type;
  int64_t batch;         // N
  int64_t out_channels;  // O
  Size2d input;
  Size2d out;
  Size2d kernel;
  Size2d stride;
  Size2d padding;
  Size2d dilation;
  int64_t groups;
  int weight_bits;
};

// Output size along one dimension; below 1 where the kernel does not fit.
constexpr int64_t conv_out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                                int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

namespace cpu {
void conv2d(const Conv2dArgs& args);
}

}  // namespace adpdm
