// conv2d on the CPU: an implicit GEMM that reads the codes in place, or a copy of them with the halo around
// it.
#include "core/conv2d.h"

#include <cstring>
#include <vector>

#include "core/group_index.h"
#include "cpu/igemm.h"
#include "cpu/parallel.h"

namespace adpdm::cpu {
namespace {

// Copying less than this per thread is quicker than waking a second one.
constexpr int64_t kMinCopyBytes = 128 * 1024;

// The padded copy of one segment: [N, H + 2 * padding, W + 2 * padding, groups, padded group channels].
struct PaddedCopy {
  int64_t height;
  int64_t width;
  int64_t group_channels;   // as stored in the source
  int64_t padded_channels;  // whole quads
  int64_t pixel_bytes;
};

// A tap must be whole quads: the kernels load 4 channels at a time (8 where weights are nibbles).
int64_t tap_bytes(const Conv2dArgs& args, const IgemmSegment& segment) {
  return quads_per_tap(segment.channels / args.groups, args.weight_bits) * kQuadChannels;
}

bool needs_copy(const Conv2dArgs& args, const IgemmSegment& segment) {
  return args.padding.height > 0 || args.padding.width > 0 ||
         tap_bytes(args, segment) != segment.channels / args.groups;
}

PaddedCopy padded_copy(const Conv2dArgs& args, const IgemmSegment& segment) {
  PaddedCopy copy{};
  copy.height = args.input.height + 2 * args.padding.height;
  copy.width = args.input.width + 2 * args.padding.width;
  copy.group_channels = segment.channels / args.groups;
  copy.padded_channels = tap_bytes(args, segment);
  copy.pixel_bytes = args.groups * copy.padded_channels;
  return copy;
}

// Channels beyond group_channels meet weights 0; they are set so that results never come from unset memory.
void copy_pixels(const int8_t* source, const PaddedCopy& copy, int64_t pixel_groups, int8_t* target) {
  if (copy.padded_channels == copy.group_channels) {
    std::memcpy(target, source, static_cast<size_t>(pixel_groups * copy.group_channels));
    return;
  }
  for (int64_t i = 0; i < pixel_groups; ++i) {
    for (int64_t c = 0; c < copy.group_channels; ++c) target[c] = source[c];
    for (int64_t c = copy.group_channels; c < copy.padded_channels; ++c) target[c] = 0;
    source += copy.group_channels;
    target += copy.padded_channels;
  }
}

void fill_padded(const Conv2dArgs& args, const IgemmSegment& segment, const PaddedCopy& copy,
                 int8_t* target) {
  const int zero_point = segment.qparams.zero_point[*segment.qparams.group_index];
  const int64_t row_bytes = copy.width * copy.pixel_bytes;
  const int64_t side_bytes = args.padding.width * copy.pixel_bytes;
  const int64_t source_row = args.input.width * segment.channels;
  parallel_for(0, args.batch * copy.height, ceil_div(kMinCopyBytes, row_bytes),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   int8_t* row = target + i * row_bytes;
                   const int64_t y = i % copy.height - args.padding.height;
                   if (y < 0 || y >= args.input.height) {
                     std::memset(row, zero_point, static_cast<size_t>(row_bytes));
                     continue;
                   }
                   std::memset(row, zero_point, static_cast<size_t>(side_bytes));
                   std::memset(row + row_bytes - side_bytes, zero_point, static_cast<size_t>(side_bytes));
                   copy_pixels(segment.codes + (i / copy.height * args.input.height + y) * source_row, copy,
                               args.input.width * args.groups, row + side_bytes);
                 }
               });
}

// Describes where the segment's codes lie: in the padded copy at `scratch`, or where they are.
IgemmInput describe_input(const Conv2dArgs& args, const IgemmSegment& segment, int8_t* scratch) {
  const bool copied = needs_copy(args, segment);
  const PaddedCopy copy = padded_copy(args, segment);
  const int64_t height = copied ? copy.height : args.input.height;
  const int64_t width = copied ? copy.width : args.input.width;
  const int64_t pixel_bytes = copied ? copy.pixel_bytes : segment.channels;
  const int64_t taps = args.kernel.height * args.kernel.width;
  const int64_t group = current_group("conv2d", segment.qparams.group_index, segment.qparams.num_groups);
  if (copied) fill_padded(args, segment, copy, scratch);

  IgemmInput input{};
  input.codes = copied ? scratch : segment.codes;
  input.image_step = height * width * pixel_bytes;
  input.row_step = args.stride.height * width * pixel_bytes;
  input.column_step = args.stride.width * pixel_bytes;
  input.group_step = pixel_bytes / args.groups;
  input.tile.tap_row_step = args.dilation.height * width * pixel_bytes;
  input.tile.tap_column_step = args.dilation.width * pixel_bytes;
  input.tile.quads = tap_bytes(args, segment) / kQuadChannels;
  input.tile.weight = segment.weight;
  input.tile.block_bytes = block_bytes(segment.channels / args.groups, taps, args.weight_bits);
  input.tile.weight_scale = segment.weight_scale;
  input.tile.weight_sum = segment.weight_sum;
  input.tile.scale = segment.qparams.scale[group];
  input.tile.zero_point = segment.qparams.zero_point[group];
  return input;
}

// Taps that are neighbours in memory are one longer tap: fewer, longer inner loops.
void merge_taps(Igemm& problem) {
  if (problem.groups > 1 || problem.tile.tap_columns == 1) return;
  for (int s = 0; s < problem.tile.num_segments; ++s) {
    const TileSegment& tile = problem.inputs[s].tile;
    if (tile.tap_column_step != tile.quads * kQuadChannels) return;
  }
  for (int s = 0; s < problem.tile.num_segments; ++s)
    problem.inputs[s].tile.quads *= problem.tile.tap_columns;
  problem.tile.tap_columns = 1;
}

int64_t scratch_bytes(const Conv2dArgs& args, const IgemmSegment& segment) {
  if (!needs_copy(args, segment)) return 0;
  const PaddedCopy copy = padded_copy(args, segment);
  return args.batch * copy.height * copy.width * copy.pixel_bytes;
}

}  // namespace

void conv2d(const Conv2dArgs& args) {
  if (args.batch * args.out.height * args.out.width * args.out_channels == 0) return;
  Igemm problem{};
  problem.images = args.batch;
  problem.rows = args.out.height;
  problem.columns = args.out.width;
  problem.groups = args.groups;
  problem.outputs = args.out_channels;
  problem.tile.num_segments = args.num_segments;
  problem.tile.tap_rows = args.kernel.height;
  problem.tile.tap_columns = args.kernel.width;
  problem.tile.bias = args.output.bias;
  problem.tile.output = static_cast<char*>(args.output.data);
  problem.tile.output_step = args.out_channels;
  problem.tile.output_type = args.output.type;
  problem.tile.nibbles = stored_in_nibbles(args.weight_bits);

  // Kept between calls, because fresh pages cost more than the copy; owned by the thread, so calls do not
  // interfere.
  thread_local std::vector<int8_t> scratch;
  int64_t bytes[kMaxSegments + 1] = {};
  for (int s = 0; s < args.num_segments; ++s) bytes[s + 1] = bytes[s] + scratch_bytes(args, args.segments[s]);
  if (static_cast<int64_t>(scratch.size()) < bytes[args.num_segments]) {
    scratch.resize(static_cast<size_t>(bytes[args.num_segments]));
  }
  for (int s = 0; s < args.num_segments; ++s) {
    problem.inputs[s] = describe_input(args, args.segments[s], scratch.data() + bytes[s]);
  }
  merge_taps(problem);
  run_igemm(problem);
}

}  // namespace adpdm::cpu
