// pack_weight: weight codes in the order in which linear and conv2d read them.
#pragma once

#include <cstdint>

#include "core/igemm.h"

namespace adpdm {

struct PackWeightArgs {
  const int8_t* codes;     // [out_channels, group_channels, taps] i8, within the range of num_bits
  uint8_t* packed;         // [packed_weight_bytes(...)] u8
  int64_t out_channels;    // all groups together
  int64_t group_channels;  // input channels of one group
  int64_t taps;            // kernel height * width; 1 for linear
  int64_t groups;
  int num_bits;  // 2..8
};

constexpr int64_t packed_weight_bytes(int64_t out_channels, int64_t group_channels, int64_t taps,
                                      int64_t groups, int num_bits) {
  return groups * ceil_div(out_channels / groups, kBlockOutputs) *
             block_bytes(group_channels, taps, num_bits) +
         kBlobTailBytes;
}

namespace cpu {
void pack_weight(const PackWeightArgs& args);
}

}  // namespace adpdm
