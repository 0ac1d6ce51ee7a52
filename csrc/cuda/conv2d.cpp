// conv2d on CUDA: describes the convolution as an implicit GEMM.
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/conv2d_as_igemm.h"
#include "cuda/depthwise.h"
#include "cuda/igemm.h"
#include "cuda/igemm_launch.h"
#include "cuda/nvtx.h"

namespace adpdm::cuda {
namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int64_t taps(const Conv2dArgs& args) { return args.kernel.height * args.kernel.width; }
int64_t num_rows(const Conv2dArgs& args) { return args.batch * args.out.height * args.out.width; }

int activation_bits(const IgemmSegment& segment) { return segment.packed ? 4 : 8; }

bool whole_chunks(const Conv2dArgs& args) {
  for (int s = 0; s < args.num_segments; ++s) {
    const IgemmSegment& segment = args.segments[s];
    const int64_t chunk = codes_in(kChunkBytes, activation_bits(segment));
    if (!aligned(segment.codes) || segment.channels / args.groups % chunk != 0) return false;
  }
  return true;
}

void check(const char* op, const Conv2dArgs& args) {
  const int64_t most = std::numeric_limits<int32_t>::max() - 256;  // of which a last, partial tile
  if (num_rows(args) > most) {
    throw std::invalid_argument(std::string(op) + ": wanted at most " + std::to_string(most) +
                                " output pixels in a batch, got " + std::to_string(num_rows(args)));
  }
  const int64_t pixels = args.input.height * args.input.width * args.upsample * args.upsample;
  if (pixels > most) {
    throw std::invalid_argument(std::string(op) + ": wanted at most " + std::to_string(most) +
                                " input pixels in an image, got " + std::to_string(pixels));
  }
  if (args.num_segments == 2 && args.segments[0].packed != args.segments[1].packed) {
    throw std::invalid_argument(std::string(op) + ": wanted both segments packed or none, got one");
  }
  for (int s = 0; s < args.num_segments; ++s) {
    // All kernels copy it in chunks of 16 bytes.
    if (aligned(args.segments[s].weight)) continue;
    throw std::invalid_argument(std::string(op) +
                                ": wanted packed weights at an address that is a multiple of 16 bytes, got "
                                "another; pass a copy");
  }
  if (args.output.activation == Activation::kGeglu && args.out_channels / args.groups % 2 != 0) {
    throw std::invalid_argument(std::string(op) + ": geglu needs an even number of outputs per group, got " +
                                std::to_string(args.out_channels / args.groups));
  }
}

// Whether every run of 8 outputs of a group can be loaded and stored as vectors.
bool is_wide(const Conv2dArgs& args, int64_t outputs) {
  const IgemmOutput& output = args.output;
  bool wide = outputs % 8 == 0 && aligned(output.data) && aligned(output.bias) && aligned(output.row_scale) &&
              aligned(output.row_bias) && aligned(output.residual);
  for (int s = 0; s < args.num_segments; ++s) {
    wide = wide && aligned(args.segments[s].weight_scale) && aligned(args.segments[s].weight_sum);
  }
  return wide;
}

IgemmGeometry make_geometry(const Conv2dArgs& args) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  IgemmGeometry geometry{};
  geometry.height = narrow(args.input.height * args.upsample);
  geometry.width = narrow(args.input.width * args.upsample);
  geometry.upsample_shift = args.upsample == 2 ? 1 : 0;
  geometry.out_height = narrow(args.out.height);
  geometry.out_width = narrow(args.out.width);
  geometry.kernel_height = narrow(args.kernel.height);
  geometry.kernel_width = narrow(args.kernel.width);
  geometry.stride_height = narrow(args.stride.height);
  geometry.stride_width = narrow(args.stride.width);
  geometry.padding_top = narrow(args.padding.height);
  geometry.padding_left = narrow(args.padding.width);
  // Between taps; of a single one it may be any number, which sums would overflow with.
  geometry.dilation_height = args.kernel.height == 1 ? 1 : narrow(args.dilation.height);
  geometry.dilation_width = args.kernel.width == 1 ? 1 : narrow(args.dilation.width);
  return geometry;
}

// For example "conv2d 2x320x64x64 -> 320 kernel 3x3", channels of all segments together.
std::string range_text(const char* op, const Conv2dArgs& args) {
  int64_t channels = 0;
  for (int s = 0; s < args.num_segments; ++s) channels += args.segments[s].channels;
  const auto text = [](int64_t number) { return std::to_string(number); };
  return std::string(op) + " " + text(args.batch) + "x" + text(channels) + "x" + text(args.input.height) +
         "x" + text(args.input.width) + " -> " + text(args.out_channels) + " kernel " +
         text(args.kernel.height) + "x" + text(args.kernel.width);
}

IgemmSource make_source(const Conv2dArgs& args, const IgemmSegment& segment, const IgemmPlan& plan) {
  const int bits = activation_bits(plan.mode);
  const int64_t channels = segment.channels / args.groups;
  IgemmSource source{};
  source.codes = reinterpret_cast<const uint8_t*>(segment.codes);
  source.weight = segment.weight;
  source.weight_scale = segment.weight_scale;
  source.weight_sum = segment.weight_sum;
  source.qparams = segment.qparams;
  source.weight_row = weight_row_bytes(taps(args) * channels, args.weight_bits);
  source.fill = segment.weight + args.out_channels * source.weight_row;
  source.pixel_bytes = static_cast<int32_t>(channels * args.groups * bits / 8);
  source.channels = static_cast<int32_t>(channels);
  source.num_k_tiles =
      static_cast<int32_t>(ceil_div(taps(args) * channels, codes_per_tile(plan.core, plan.mode)));
  return source;
}

IgemmPlan depthwise_plan(const Conv2dArgs& args) {
  IgemmPlan plan{};
  plan.core = IgemmCore::kDepthwise;
  plan.mode = stored_in_nibbles(args.weight_bits) ? IgemmMode::kA8W4 : IgemmMode::kA8W8;
  plan.splits = plan.splits_of_first = 1;
  return plan;
}

}  // namespace

IgemmPlan plan_as_igemm(const char* op, const Conv2dArgs& args, const std::optional<TileChoice>& choice) {
  require_built_arch(op);
  check(op, args);
  const std::optional<TileChoice> given = choice ? choice : tile_from_environment();
  if (!given && is_depthwise(args)) return depthwise_plan(args);
  IgemmRequest request{};
  request.op = op;
  request.rows = num_rows(args);
  request.outputs = args.out_channels / args.groups;
  request.groups = args.groups;
  for (int s = 0; s < args.num_segments; ++s) {
    request.reductions.push_back(taps(args) * args.segments[s].channels / args.groups);
  }
  request.activation_bits = activation_bits(args.segments[0]);
  request.weight_bits = stored_in_nibbles(args.weight_bits) ? 4 : 8;
  request.whole_chunks = whole_chunks(args);
  request.wgmma = wgmma_allowed();
  return plan_igemm(request, current_device_info(), given);
}

void run_as_igemm(const char* op, const Conv2dArgs& args, const IgemmPlan& plan, void* workspace,
                  Stream stream) {
  const Range range([&] { return range_text(op, args) + " " + describe(plan); });
  IgemmProblem problem{};
  for (int s = 0; s < args.num_segments; ++s) {
    problem.sources[s] = make_source(args, args.segments[s], plan);
  }
  problem.num_sources = args.num_segments;
  problem.geometry = make_geometry(args);
  problem.output = args.output;
  problem.rows = static_cast<int32_t>(num_rows(args));
  problem.rows_per_image = static_cast<int32_t>(args.out.height * args.out.width);
  // Depthwise, the channels are outputs of one group.
  const int64_t groups = plan.core == IgemmCore::kDepthwise ? 1 : args.groups;
  problem.outputs = static_cast<int32_t>(args.out_channels / groups);
  problem.groups = static_cast<int32_t>(groups);
  problem.wide = is_wide(args, problem.outputs);
  launch_igemm(op, problem, plan, workspace, stream);
}

IgemmPlan plan_conv2d(const Conv2dArgs& args, const std::optional<TileChoice>& choice) {
  return plan_as_igemm("conv2d", args, choice);
}

void conv2d(const Conv2dArgs& args, const IgemmPlan& plan, void* workspace, Stream stream) {
  run_as_igemm("conv2d", args, plan, workspace, stream);
}

}  // namespace adpdm::cuda
