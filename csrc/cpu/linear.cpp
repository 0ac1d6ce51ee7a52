// linear on the CPU: a 1x1 convolution over images of a single row.
#include "core/linear.h"

#include <algorithm>

#include "core/conv2d.h"

namespace adpdm::cpu {

void linear(const LinearArgs& args) {
  if (args.rows == 0) return;
  Conv2dArgs conv{};
  std::copy(args.segments, args.segments + kMaxSegments, conv.segments);
  conv.num_segments = args.num_segments;
  conv.output = args.output;
  conv.batch = args.rows / args.rows_per_image;
  conv.upsample = 1;
  conv.out_channels = args.out_features;
  conv.input = conv.out = {1, args.rows_per_image};
  conv.kernel = conv.stride = conv.dilation = {1, 1};
  conv.padding = conv.padding_end = {0, 0};
  conv.groups = 1;
  conv.weight_bits = args.weight_bits;
  conv2d(conv);
}

}  // namespace adpdm::cpu
