// pack_weight: the bytes of the blob, literally.
#include "core/pack_weight.h"

#include <gtest/gtest.h>

#include <vector>

namespace adpdm {
namespace {

std::vector<uint8_t> packed(const std::vector<int8_t>& codes, int64_t outputs, int64_t channels, int64_t taps,
                            int64_t groups, int num_bits) {
  std::vector<uint8_t> blob(packed_weight_bytes(outputs, channels, taps, groups, num_bits), 0xee);
  cpu::pack_weight({codes.data(), blob.data(), outputs, channels, taps, groups, num_bits});
  return blob;
}

TEST(PackWeight, BytesHoldOutputsTimesFourChannels) {
  // Two outputs of 5 channels: quad 0 holds channels 0..3 of both, quad 1 channel 4; all else is code 0.
  const std::vector<uint8_t> blob = packed({1, 2, 3, 4, 5, -1, -2, -3, -4, -128}, 2, 5, 1, 1, 8);
  std::vector<uint8_t> wanted(128 + kBlobTailBytes, 0);
  const std::vector<uint8_t> quad = {1, 2, 3, 4, 0xff, 0xfe, 0xfd, 0xfc};
  std::copy(quad.begin(), quad.end(), wanted.begin());
  wanted[64] = 5;
  wanted[68] = 0x80;
  wanted[128] = 1 + 2 + 3 + 4 + 128;  // the second output's magnitudes
  EXPECT_EQ(blob, wanted);
}

TEST(PackWeight, NibblesHoldTwoQuadsPlusEight) {
  // One output of 6 channels: byte k is channel k + 8 | (channel 4 + k) + 8 << 4; code 0 is nibble 8.
  const std::vector<uint8_t> blob = packed({-8, 7, 0, 1, -1, 2}, 1, 6, 1, 1, 4);
  std::vector<uint8_t> wanted(64, 0x88);
  wanted.resize(64 + kBlobTailBytes, 0);
  wanted[0] = 0x70;
  wanted[1] = 0xaf;
  wanted[2] = 0x88;
  wanted[3] = 0x89;
  wanted[64] = 8 + 7 + 0 + 1 + 1 + 2;
  EXPECT_EQ(blob, wanted);
}

TEST(PackWeight, TapsAndBlocksAndGroupsFollowOneAnother) {
  // 34 outputs in 2 groups of 17: 2 blocks each; 1 channel, 2 taps: one quad a tap. Output o has codes o and
  // -o.
  std::vector<int8_t> codes;
  for (int8_t o = 0; o < 34; ++o) codes.insert(codes.end(), {o, static_cast<int8_t>(-o)});
  const std::vector<uint8_t> blob = packed(codes, 34, 1, 2, 2, 8);
  ASSERT_EQ(blob.size(), 2u * 2 * 2 * 64 + kBlobTailBytes);
  EXPECT_EQ(blob[1 * 4], 1);                                   // group 0, block 0, tap 0, output 1
  EXPECT_EQ(blob[64 + 1 * 4], 0xff);                           // tap 1
  EXPECT_EQ(blob[128], 16);                                    // block 1
  EXPECT_EQ(blob[256 + 3 * 4], 20);                            // group 1: output 17 + 3
  EXPECT_EQ(blob[256 + 128 + 64], static_cast<uint8_t>(-33));  // its last output, tap 1
}

TEST(PackWeight, TwoToFourBitsTakeNibbles) {
  for (int bits = 2; bits <= 8; ++bits) {
    const int64_t bytes = packed_weight_bytes(16, 32, 9, 1, bits) - kBlobTailBytes;
    EXPECT_EQ(bytes, bits <= 4 ? 16 * 32 * 9 / 2 : 16 * 32 * 9) << bits;
  }
}

}  // namespace
}  // namespace adpdm
