// linear on CUDA: a 1x1 convolution over images of a single line.
#include <algorithm>

#include "cuda/conv2d_as_igemm.h"
#include "cuda/igemm.h"

namespace adpdm::cuda {
namespace {

Conv2dArgs as_conv2d(const LinearArgs& args) {
  Conv2dArgs conv{};
  std::copy(args.segments, args.segments + kMaxSegments, conv.segments);
  conv.num_segments = args.num_segments;
  conv.output = args.output;
  conv.batch = args.rows == 0 ? 0 : args.rows / args.rows_per_image;
  conv.out_channels = args.out_features;
  conv.upsample = conv.groups = 1;
  conv.input = conv.out = {1, args.rows_per_image};
  conv.kernel = conv.stride = conv.dilation = {1, 1};
  conv.weight_bits = args.weight_bits;
  return conv;
}

}  // namespace

IgemmPlan plan_linear(const LinearArgs& args, const std::optional<TileChoice>& choice) {
  return plan_as_igemm("linear", as_conv2d(args), choice);
}

void linear(const LinearArgs& args, const IgemmPlan& plan, void* workspace, Stream stream) {
  run_as_igemm("linear", as_conv2d(args), plan, workspace, stream);
}

}  // namespace adpdm::cuda
