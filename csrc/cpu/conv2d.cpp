// conv2d on the CPU: depthwise, by Winograd's method, or as an implicit GEMM that reads the codes in place,
// or a copy of them with the halo around it.
#include "core/conv2d.h"

#include <cstring>

#include "core/group_index.h"
#include "cpu/depthwise.h"
#include "cpu/igemm.h"
#include "cpu/parallel.h"
#include "cpu/thread_memory.h"
#include "cpu/winograd.h"

namespace adpdm::cpu {
namespace {

// Copying less than this per thread is quicker than waking a second one.
constexpr int64_t kMinCopyBytes = 128 * 1024;

// The padded copy of one segment: [N, height, width, groups, padded group channels].
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
  const bool padded = args.padding.height > 0 || args.padding.width > 0 || args.padding_end.height > 0 ||
                      args.padding_end.width > 0;
  return padded || args.upsample > 1 || tap_bytes(args, segment) != segment.channels / args.groups;
}

PaddedCopy padded_copy(const Conv2dArgs& args, const IgemmSegment& segment) {
  PaddedCopy copy{};
  copy.height = args.upsample * args.input.height + args.padding.height + args.padding_end.height;
  copy.width = args.upsample * args.input.width + args.padding.width + args.padding_end.width;
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

// Every pixel twice, as nearest upsampling reads them.
void copy_pixels_twice(const int8_t* source, const PaddedCopy& copy, int64_t groups, int64_t pixels,
                       int8_t* target) {
  for (int64_t i = 0; i < pixels; ++i, target += 2 * copy.pixel_bytes) {
    copy_pixels(source + i * groups * copy.group_channels, copy, groups, target);
    std::memcpy(target + copy.pixel_bytes, target, static_cast<size_t>(copy.pixel_bytes));
  }
}

// Row y of the upsampled image with its halo to both sides.
void fill_row(const Conv2dArgs& args, const PaddedCopy& copy, const int8_t* source, int zero_point,
              int8_t* row) {
  const int64_t left = args.padding.width * copy.pixel_bytes;
  const int64_t inner = args.upsample * args.input.width * copy.pixel_bytes;
  std::memset(row, zero_point, static_cast<size_t>(left));
  if (args.upsample == 2) {
    copy_pixels_twice(source, copy, args.groups, args.input.width, row + left);
  } else {
    copy_pixels(source, copy, args.input.width * args.groups, row + left);
  }
  std::memset(row + left + inner, zero_point, static_cast<size_t>(args.padding_end.width * copy.pixel_bytes));
}

void fill_padded(const Conv2dArgs& args, const IgemmSegment& segment, const PaddedCopy& copy,
                 int8_t* target) {
  const int zero_point = segment.qparams.zero_point[*segment.qparams.group_index];
  const int64_t row_bytes = copy.width * copy.pixel_bytes;
  const int64_t source_row = args.input.width * segment.channels;
  parallel_for(0, args.batch * copy.height, ceil_div(kMinCopyBytes, row_bytes),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t image = i / copy.height;
                   const int64_t y = i % copy.height - args.padding.height;
                   int8_t* row = target + i * row_bytes;
                   if (y < 0 || y >= args.upsample * args.input.height) {
                     std::memset(row, zero_point, static_cast<size_t>(row_bytes));
                     continue;
                   }
                   const int64_t source = image * args.input.height + y / args.upsample;
                   fill_row(args, copy, segment.codes + source * source_row, zero_point, row);
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

// A multiple of kMemoryAlignment.
int64_t scratch_bytes(const Conv2dArgs& args, const IgemmSegment& segment) {
  if (!needs_copy(args, segment)) return 0;
  const PaddedCopy copy = padded_copy(args, segment);
  const int64_t bytes = args.batch * copy.height * copy.width * copy.pixel_bytes;
  return ceil_div(bytes, kMemoryAlignment) * kMemoryAlignment;
}

// Aligned to cache lines: with channels in multiples of 64, every 64 codes lie in one.
int8_t* thread_scratch(int64_t bytes) {
  thread_local ThreadMemory memory;
  return reinterpret_cast<int8_t*>(memory.take(bytes));
}

// Without pointers moved: output 0, pixel 0.
TileOutput tile_output(const Conv2dArgs& args) {
  const IgemmOutput& from = args.output;
  TileOutput output{};
  output.bias = from.bias;
  output.row_scale = from.row_scale;
  output.row_bias = from.row_bias;
  output.residual = static_cast<const char*>(from.residual);
  output.data = static_cast<char*>(from.data);
  output.outputs = args.out_channels;
  output.step = from.activation == Activation::kGeglu ? args.out_channels / 2 : args.out_channels;
  output.image_pixels = args.out.height * args.out.width;
  output.type = from.type;
  output.residual_type = from.residual_type;
  output.activation = from.activation;
  output.scale = from.output_scale;
  output.quantized = from.num_bits > 0;
  if (output.quantized) output.quantizer = current_quantizer("conv2d", from.qparams, from.num_bits);
  output.plain = from.type == FloatType::kFloat32 && !output.quantized && from.row_scale == nullptr &&
                 from.row_bias == nullptr && from.residual == nullptr && from.output_scale == 1.0f &&
                 from.activation == Activation::kNone;
  return output;
}

}  // namespace

void conv2d(const Conv2dArgs& args) {
  if (args.batch * args.out.height * args.out.width * args.out_channels == 0) return;
  if (is_depthwise(args)) return depthwise_conv2d(args, tile_output(args));
  Igemm problem{};
  problem.images = args.batch;
  problem.rows = args.out.height;
  problem.columns = args.out.width;
  problem.groups = args.groups;
  problem.outputs = args.out_channels;
  problem.tile.num_segments = args.num_segments;
  problem.tile.tap_rows = args.kernel.height;
  problem.tile.tap_columns = args.kernel.width;
  problem.tile.output = tile_output(args);
  problem.tile.nibbles = stored_in_nibbles(args.weight_bits);
  problem.tile.weight_bits = args.weight_bits;

  int64_t bytes[kMaxSegments + 1] = {};
  for (int s = 0; s < args.num_segments; ++s) bytes[s + 1] = bytes[s] + scratch_bytes(args, args.segments[s]);
  int8_t* scratch = bytes[args.num_segments] > 0 ? thread_scratch(bytes[args.num_segments]) : nullptr;
  for (int s = 0; s < args.num_segments; ++s) {
    problem.inputs[s] = describe_input(args, args.segments[s], scratch ? scratch + bytes[s] : nullptr);
  }
  if (const WinogradKernel* kernel = select_winograd(problem)) return run_winograd(problem, *kernel);
  merge_taps(problem);
  run_igemm(problem);
}

}  // namespace adpdm::cpu
