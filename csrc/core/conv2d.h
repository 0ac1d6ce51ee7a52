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
  int num_segments;      // 1 where groups > 1
  IgemmOutput output;    // [N, out.height, out.width, O]; images = N
  int64_t batch;         // N
  int64_t out_channels;  // O
  int64_t upsample;      // 1, or 2: the convolution sees every pixel of the input twice in both directions
  Size2d input;          // as stored, before upsampling
  Size2d out;
  Size2d kernel;
  Size2d stride;
  Size2d padding;      // above and left
  Size2d padding_end;  // below and right
  Size2d dilation;
  int64_t groups;
  int weight_bits;
};

// Output size along one dimension of `padded` pixels, halo included; below 1 where the kernel does not fit.
constexpr int64_t conv_out_size(int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t room = padded - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

namespace cpu {
void conv2d(const Conv2dArgs& args);
}

}  // namespace adpdm
