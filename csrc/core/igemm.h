// What integer linear layers and convolutions share: their operands, the bound on K and the blob of packed
// weights.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace adpdm {

// Segments of the input channels with a quantizer and weight columns of their own (split quantization).
constexpr int kMaxSegments = 2;

// |sum_k (q - zero_point) * w| <= K * 255 * 128 has to fit int32.
constexpr int64_t kMaxReduction = INT32_MAX / (255 * 128);

struct IgemmSegment {
  const int8_t* codes;        // conv2d [N, H, W, C] i8, linear [M, C] i8
  int64_t channels;           // C
  const uint8_t* weight;      // blob of pack_weight
  const float* weight_scale;  // [O] f32
  const int32_t* weight_sum;  // [O] i32: sum of the output channel's weight codes
  GroupedQParams qparams;
};

// The blob: [group][ceil(O/16)][tap][quad][16 outputs][4 channels], where a quad is 4 successive channels of
// one tap and missing outputs and channels are code 0. That is the operand order of vpdpbusd, and of AMX
// tiles as well. Codes of up to 4 bits are stored as code + 8 in nibbles, quads 2j (low nibble) and 2j + 1
// (high) in the same 64 bytes.
constexpr int64_t kBlockOutputs = 16;
constexpr int64_t kQuadChannels = 4;
constexpr int64_t kQuadBytes = kBlockOutputs * kQuadChannels;

constexpr bool stored_in_nibbles(int weight_bits) { return weight_bits <= 4; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Quads of one tap: even where two share their bytes.
constexpr int64_t quads_per_tap(int64_t group_channels, int weight_bits) {
  return stored_in_nibbles(weight_bits) ? 2 * ceil_div(group_channels, 2 * kQuadChannels)
                                        : ceil_div(group_channels, kQuadChannels);
}

// Bytes of all taps of one block of 16 outputs.
constexpr int64_t block_bytes(int64_t group_channels, int64_t taps, int weight_bits) {
  return taps * quads_per_tap(group_channels, weight_bits) * kQuadBytes /
         (stored_in_nibbles(weight_bits) ? 2 : 1);
}

}  // namespace adpdm
