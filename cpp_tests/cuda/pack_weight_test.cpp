// pack_weight on CUDA: the bytes of the blob, literally.
#include <gtest/gtest.h>

#include <vector>

#include "cuda/device_memory.h"
#include "cuda/igemm.h"

namespace adpdm::testing {
namespace {

std::vector<uint8_t> packed(const std::vector<int8_t>& codes, int64_t outputs, int64_t channels, int64_t taps,
                            int64_t groups, int num_bits) {
  const DeviceBuffer<int8_t> source(codes);
  DeviceBuffer<uint8_t> blob(cuda::packed_weight_bytes(outputs, channels, taps, num_bits));
  cuda::pack_weight({source.data(), blob.data(), outputs, channels, taps, groups, num_bits}, nullptr);
  std::vector<uint8_t> bytes = blob.host();
  // Behind the rows, every byte 16 times.
  for (int i = 0; i < 4096; ++i) EXPECT_EQ(bytes[bytes.size() - 4096 + i], i / 16);
  bytes.resize(bytes.size() - 4096);
  return bytes;
}

TEST(CudaPackWeight, BytesFollowTapsThenChannels) {
  ADPDM_REQUIRE_GPU();
  // Two outputs of 2 channels and 3 taps, given [output][channel][tap]; a row is filled to 128 codes.
  const std::vector<uint8_t> blob = packed({1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5, -128}, 2, 2, 3, 1, 8);
  std::vector<uint8_t> expected(256, 0);
  const std::vector<uint8_t> first = {1, 4, 2, 5, 3, 6};
  const std::vector<uint8_t> second = {0xff, 0xfc, 0xfe, 0xfb, 0xfd, 0x80};
  std::copy(first.begin(), first.end(), expected.begin());
  std::copy(second.begin(), second.end(), expected.begin() + 128);
  EXPECT_EQ(blob, expected);
}

TEST(CudaPackWeight, NibblesHoldCodesSixteenApart) {
  ADPDM_REQUIRE_GPU();
  // 129 codes of one output: two blocks. Byte j of a chunk is code j | code j + 16 << 4.
  std::vector<int8_t> codes(129, 0);
  codes[0] = 1;
  codes[1] = -1;
  codes[16] = -8;
  codes[17] = 2;
  codes[32 + 15] = 7;
  codes[32 + 31] = -2;
  codes[128] = 5;
  std::vector<uint8_t> expected(128, 0);
  expected[0] = 0x81;
  expected[1] = 0x2f;
  expected[16 + 15] = 0xe7;
  expected[64] = 0x05;
  EXPECT_EQ(packed(codes, 1, 129, 1, 1, 4), expected);
}

TEST(CudaPackWeight, GroupsFollowOneAnother) {
  ADPDM_REQUIRE_GPU();
  // A row per output of all groups: groups change nothing about the bytes.
  std::vector<int8_t> codes;
  for (int i = 0; i < 6 * 5 * 2; ++i) codes.push_back(static_cast<int8_t>(i % 8));
  for (int bits : {4, 8}) EXPECT_EQ(packed(codes, 6, 5, 2, 3, bits), packed(codes, 6, 5, 2, 1, bits));
}

TEST(CudaPackWeight, RowsAreWholeBlocks) {
  const int64_t fill = 4096;
  EXPECT_EQ(cuda::packed_weight_bytes(3, 14, 9, 8), 3 * 128 + fill);
  EXPECT_EQ(cuda::packed_weight_bytes(3, 15, 9, 8), 3 * 256 + fill);
  EXPECT_EQ(cuda::packed_weight_bytes(3, 15, 9, 5), 3 * 256 + fill);
  EXPECT_EQ(cuda::packed_weight_bytes(3, 15, 9, 4), 3 * 128 + fill);
  EXPECT_EQ(cuda::packed_weight_bytes(3, 14, 9, 2), 3 * 64 + fill);
}

}  // namespace
}  // namespace adpdm::testing
