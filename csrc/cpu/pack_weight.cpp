// Packs weight codes for the CPU kernels of linear and conv2d (layout: core/igemm.h).
#include "core/pack_weight.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace adpdm::cpu {
namespace {

// Writes one code at its place; the blob was filled with code 0 before.
void put_code(uint8_t* block, int64_t quad, int64_t output, int64_t lane, int8_t code, bool nibbles) {
  const int64_t slot = output * kQuadChannels + lane;
  if (!nibbles) {
    block[quad * kQuadBytes + slot] = static_cast<uint8_t>(code);
    return;
  }
  uint8_t& byte = block[quad / 2 * kQuadBytes + slot];
  const int shift = quad % 2 ? 4 : 0;
  byte = static_cast<uint8_t>((byte & ~(0xf << shift)) | ((code + 8) << shift));
}

}  // namespace

void pack_weight(const PackWeightArgs& args) {
  const bool nibbles = stored_in_nibbles(args.num_bits);
  const int64_t quads = quads_per_tap(args.group_channels, args.num_bits);
  const int64_t bytes = block_bytes(args.group_channels, args.taps, args.num_bits);
  const int64_t group_outputs = args.out_channels / args.groups;
  const int64_t blocks = ceil_div(group_outputs, kBlockOutputs);
  uint8_t* const tail = args.packed + args.groups * blocks * bytes;
  std::memset(args.packed, nibbles ? 0x88 : 0, static_cast<size_t>(tail - args.packed));
  const int8_t* code = args.codes;
  int32_t largest = 0;
  for (int64_t o = 0; o < args.out_channels; ++o) {
    const int64_t group = o / group_outputs;
    const int64_t output = o % group_outputs;
    uint8_t* block = args.packed + (group * blocks + output / kBlockOutputs) * bytes;
    int32_t magnitude = 0;
    for (int64_t c = 0; c < args.group_channels; ++c) {
      for (int64_t tap = 0; tap < args.taps; ++tap, ++code) {
        const int64_t quad = tap * quads + c / kQuadChannels;
        put_code(block, quad, output % kBlockOutputs, c % kQuadChannels, *code, nibbles);
        magnitude += std::abs(*code);
      }
    }
    largest = std::max(largest, magnitude);
  }
  std::memset(tail, 0, kBlobTailBytes);
  std::memcpy(tail, &largest, sizeof largest);
}

}  // namespace adpdm::cpu
