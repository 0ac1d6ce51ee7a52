// Cuts a depthwise convolution into tiles of up to 64 channels and 24 pixels of a row, and runs them in
// parallel.
#include "cpu/depthwise.h"

#include <algorithm>
#include <cstring>

#include "core/group_index.h"
#include "cpu/parallel.h"
#include "cpu/thread_memory.h"

namespace adpdm::cpu {
namespace {

// Products of 16 channels, some two clock cycles each, below which another thread costs more than it saves:
// waking one takes microseconds.
constexpr int64_t kMinStepsPerThread = 5000;

constexpr int64_t kOutside = -1;

// Codes of a tap that lies in the halo.
struct Halo {
  alignas(64) int8_t codes[kDepthwiseChannels];
};

// The memory of a thread.
struct Scratch {
  int32_t* weights;      // [taps][kDepthwiseChannels]
  const int8_t** codes;  // [kMaxTilePixels][taps]
  int64_t* columns;      // [out.width][kernel.width] bytes from the first pixel of a row, or kOutside
};

Scratch thread_scratch(const Conv2dArgs& args) {
  thread_local ThreadMemory memory;
  const int64_t taps = args.kernel.height * args.kernel.width;
  const int64_t weights = taps * kDepthwiseChannels * static_cast<int64_t>(sizeof(int32_t));
  const int64_t codes = kMaxTilePixels * taps * static_cast<int64_t>(sizeof(int8_t*));
  const int64_t columns = args.out.width * args.kernel.width * static_cast<int64_t>(sizeof(int64_t));
  char* const begin = memory.take(weights + codes + columns);
  return {reinterpret_cast<int32_t*>(begin), reinterpret_cast<const int8_t**>(begin + weights),
          reinterpret_cast<int64_t*>(begin + weights + codes)};
}

// The pixel or row under a tap, or kOutside.
int64_t position(int64_t out, int64_t tap, int64_t stride, int64_t dilation, int64_t padding,
                 int64_t upsample, int64_t size) {
  const int64_t at = out * stride + tap * dilation - padding;
  return at < 0 || at >= upsample * size ? kOutside : at / upsample;
}

void find_columns(const Conv2dArgs& args, int64_t* columns) {
  for (int64_t x = 0; x < args.out.width; ++x) {
    for (int64_t tap = 0; tap < args.kernel.width; ++tap) {
      const int64_t column = position(x, tap, args.stride.width, args.dilation.width, args.padding.width,
                                      args.upsample, args.input.width);
      *columns++ = column == kOutside ? kOutside : column * args.out_channels;
    }
  }
}

// Weights of channels [first, first + count) out of their blocks, each of 16 outputs and whole quads.
void gather_weights(const Conv2dArgs& args, int64_t first, int64_t count, int32_t* weights) {
  const int64_t taps = args.kernel.height * args.kernel.width;
  const bool nibbles = stored_in_nibbles(args.weight_bits);
  const int64_t bytes = block_bytes(1, taps, args.weight_bits);
  std::fill_n(weights, taps * kDepthwiseChannels, 0);
  for (int64_t c = 0; c < count; ++c) {
    const uint8_t* const block = args.segments[0].weight + (first + c) * bytes;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t code = block[tap * (bytes / taps)];
      weights[tap * kDepthwiseChannels + c] = nibbles ? (code & 0xf) - 8 : static_cast<int8_t>(code);
    }
  }
}

// Codes under all taps of pixels [first, first + count) of a row of outputs.
void find_codes(const Conv2dArgs& args, int64_t row, int64_t channel, const Halo& halo, int64_t first,
                int64_t count, const Scratch& scratch) {
  const int64_t width = args.kernel.width;
  const int64_t image = row / args.out.height;
  for (int64_t tap = 0; tap < args.kernel.height; ++tap) {
    const int64_t y = position(row % args.out.height, tap, args.stride.height, args.dilation.height,
                               args.padding.height, args.upsample, args.input.height);
    const int64_t line = (image * args.input.height + y) * args.input.width * args.out_channels + channel;
    for (int64_t x = 0; x < count; ++x) {
      const int64_t* const columns = scratch.columns + (first + x) * width;
      const int8_t** const target = scratch.codes + (x * args.kernel.height + tap) * width;
      for (int64_t i = 0; i < width; ++i) {
        const bool outside = y == kOutside || columns[i] == kOutside;
        target[i] = outside ? halo.codes : args.segments[0].codes + line + columns[i];
      }
    }
  }
}

// Whether 16 codes may be read at any channel of the pixels under a row of outputs: codes of other pixels lie
// behind them.
bool reads_stay_inside(const Conv2dArgs& args, int64_t row) {
  if (args.input.width * args.out_channels < kBlockOutputs) return false;
  const int64_t bottom = row % args.out.height * args.stride.height +
                         (args.kernel.height - 1) * args.dilation.height - args.padding.height;
  return row / args.out.height + 1 < args.batch || bottom < args.upsample * (args.input.height - 1);
}

// Points the tile at channels from `first` on.
void select_channels(const Conv2dArgs& args, const TileOutput& output, int64_t first, Tile& tile) {
  const IgemmSegment& segment = args.segments[0];
  tile.num_outputs = std::min(args.out_channels - first, kDepthwiseChannels);
  tile.num_blocks = static_cast<int>(ceil_div(tile.num_outputs, kBlockOutputs));
  tile.segments[0].weight_scale = segment.weight_scale + first;
  tile.segments[0].weight_sum = segment.weight_sum + first;
  tile.output = output;
  skip_outputs(first, tile.output);
}

}  // namespace

bool is_depthwise(const Conv2dArgs& args) {
  return args.num_segments == 1 && args.groups > 1 && args.groups == args.out_channels &&
         args.groups == args.segments[0].channels;
}

void depthwise_conv2d(const Conv2dArgs& args, const TileOutput& output) {
  const GroupedQParams& qparams = args.segments[0].qparams;
  const int64_t group = current_group("conv2d", qparams.group_index, qparams.num_groups);
  const int64_t taps = args.kernel.height * args.kernel.width;
  const int64_t rows = args.batch * args.out.height;
  const int64_t slabs = ceil_div(args.out_channels, kDepthwiseChannels);
  const int64_t steps = args.out.width * taps * ceil_div(args.out_channels, slabs * kBlockOutputs);
  Halo halo{};
  std::memset(halo.codes, qparams.zero_point[group], sizeof halo.codes);
  const auto run_tile = ADPDM_SELECT_ISA(run_depthwise_tile);
  parallel_for(0, slabs * rows, ceil_div(kMinStepsPerThread, steps), [&](int64_t begin, int64_t end) {
    const Scratch scratch = thread_scratch(args);
    find_columns(args, scratch.columns);
    const int64_t row_bytes = args.input.width * args.out_channels;
    DepthwiseTile tile{scratch.codes, scratch.weights, taps, row_bytes, false, {}};
    tile.tile.num_segments = 1;
    tile.tile.segments[0].scale = qparams.scale[group];
    tile.tile.segments[0].zero_point = qparams.zero_point[group];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t channel = item / rows * kDepthwiseChannels;
      const int64_t row = item % rows;
      select_channels(args, output, channel, tile.tile);
      if (item == begin || row == 0) gather_weights(args, channel, tile.tile.num_outputs, scratch.weights);
      tile.whole_reads = reads_stay_inside(args, row);
      const TileOutput slab = tile.tile.output;
      for (int64_t x = 0; x < args.out.width; x += tile.tile.num_pixels) {
        tile.tile.num_pixels = static_cast<int>(std::min<int64_t>(args.out.width - x, kMaxTilePixels));
        find_codes(args, row, channel, halo, x, tile.tile.num_pixels, scratch);
        tile.tile.first_pixel = row * args.out.width + x;
        tile.tile.output = slab;
        skip_pixels(tile.tile.first_pixel, tile.tile.output);
        run_tile(tile);
      }
    }
  });
}

}  // namespace adpdm::cpu
