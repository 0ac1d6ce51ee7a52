// Depthwise convolutions, every channel by itself: sums over taps with one channel per lane. As groups of a
// tile they would take a block of 16 outputs and a quad of 4 channels each.
#pragma once

#include "core/conv2d.h"
#include "cpu/igemm.h"

namespace adpdm::cpu {

// Channels of a tile.
constexpr int64_t kDepthwiseChannels = kMaxTileBlocks * kBlockOutputs;

struct DepthwiseTile {
  const int8_t* const* codes;  // [num_pixels][taps] of the tile's first channel; num_outputs are readable
  const int32_t* weights;      // [taps][kDepthwiseChannels]
  int64_t taps;
  int64_t ahead;     // bytes from the last of a pixel's codes to codes that are wanted next
  bool whole_reads;  // 16 codes are readable where fewer channels are left
  Tile tile;         // pixels, outputs, output, and what turns sums into floats: segments[0]
};

ADPDM_DECLARE_PER_ISA(void run_depthwise_tile(const DepthwiseTile& tile))

// Whether each output channel has one input channel, its own.
bool is_depthwise(const Conv2dArgs& args);

// output is that of the first channel and pixel.
void depthwise_conv2d(const Conv2dArgs& args, const TileOutput& output);

}  // namespace adpdm::cpu
