// Tests of quantization to codes, packing and back, on every instruction set this CPU has.
#include "core/quantize.h"

#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "elementwise_cases.h"

namespace adpdm {
namespace {

using testing::decode;
using testing::encode;
using testing::kFloatTypes;
using testing::kSizes;
using testing::random_normal;
using testing::supported_isas;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
const float kScale[] = {1.0f, 0.5f};
const int32_t kZeroPoint[] = {0, 3};

GroupedQParams group(const int32_t* index) { return {kScale, kZeroPoint, index, 2}; }

RowView dense(const std::vector<uint8_t>& bytes, FloatType type, int64_t size) {
  return {bytes.data(), type, 1, size, size};
}

std::vector<int8_t> codes_of(const std::vector<float>& x, FloatType type, int32_t index, int num_bits) {
  const std::vector<uint8_t> bytes = encode(x, type);
  const int64_t size = static_cast<int64_t>(x.size());
  std::vector<int8_t> codes(x.size());
  cpu::quantize(dense(bytes, type, size), group(&index), num_bits, codes.data());
  return codes;
}

template <typename T>
std::vector<T> repeated(const std::vector<T>& values, int times) {
  std::vector<T> result;
  for (int i = 0; i < times; ++i) result.insert(result.end(), values.begin(), values.end());
  return result;
}

TEST(Quantize, LiteralCodesOfBothGroups) {
  const std::vector<float> x = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 0.0f, 1000.0f, -1000.0f, kInf, -kInf, kNan};
  const std::vector<int8_t> first = {0, 2, 2, 0, -2, 0, 127, -128, 127, -128, -128};
  const std::vector<int8_t> second = {4, 6, 7, 2, 0, 3, 7, -8, 7, -8, -8};
  for (cpu::Isa isa : supported_isas()) {
    const cpu::ScopedIsa scope(isa);
    for (FloatType type : kFloatTypes) {
      for (int times : {1, 37}) {  // 37: every value in every lane of a vector of 32
        EXPECT_EQ(codes_of(repeated(x, times), type, 0, 8), repeated(first, times));
        EXPECT_EQ(codes_of(repeated(x, times), type, 1, 4), repeated(second, times));
      }
    }
  }
}

TEST(Quantize, InstructionSetsGiveEqualCodesForAllSizes) {
  for (FloatType type : kFloatTypes) {
    for (int64_t size : kSizes) {
      const std::vector<float> x = random_normal(size, 1, 40.0f);
      std::vector<int8_t> expected;
      {
        const cpu::ScopedIsa scope(cpu::Isa::kPortable);
        expected = codes_of(x, type, 1, 8);
      }
      const std::vector<float> read = decode(encode(x, type), type);
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(expected[i], quantize_value(read[i], 2.0f, 3.0f, -128.0f, 127.0f));
      }
      for (cpu::Isa isa : supported_isas()) {
        const cpu::ScopedIsa scope(isa);
        EXPECT_EQ(codes_of(x, type, 1, 8), expected) << cpu::isa_name(isa) << " " << size;
      }
    }
  }
}

TEST(Quantize, RowsWithGapsTouchOnlyTheirColumns) {
  const int32_t index = 0;
  const std::vector<float> x = {1, 2, 99, 3, 4, 99, 5, 6, 99};
  for (cpu::Isa isa : supported_isas()) {
    const cpu::ScopedIsa scope(isa);
    std::vector<int8_t> codes(7, 77);
    cpu::quantize({x.data(), FloatType::kFloat32, 3, 2, 3}, group(&index), 8, codes.data());
    EXPECT_EQ(codes, (std::vector<int8_t>{1, 2, 3, 4, 5, 6, 77}));
  }
}

struct Planes {
  int64_t batch, channels, pixels;
  int64_t gap;  // behind each image, in elements
};

// Nothing, one, around the 16 x 16 blocks that are turned, around tiles of 64 channels and 128 pixels,
// several threads' worth, and slices of channels.
const Planes kPlanes[] = {{0, 4, 4, 0},     {2, 3, 0, 0},    {2, 0, 5, 0},     {1, 1, 1, 0},
                          {2, 15, 17, 0},   {1, 16, 16, 0},  {2, 17, 15, 3},   {1, 63, 129, 0},
                          {3, 64, 128, 64}, {2, 65, 127, 0}, {1, 129, 300, 0}, {2, 192, 400, 7}};

TEST(QuantizeChannelsLast, CodesAreThoseOfTheRowsTurned) {
  unsigned seed = 0;
  for (const Planes& p : kPlanes) {
    const int64_t image = p.channels * p.pixels, stride = image + p.gap;
    const std::vector<float> x = random_normal(p.batch * stride, ++seed, 40.0f);
    const int32_t index = static_cast<int32_t>(seed % 2);
    for (FloatType type : kFloatTypes) {
      const std::vector<uint8_t> bytes = encode(x, type);
      const size_t size = static_cast<size_t>(p.batch * image);
      std::vector<int8_t> planes(size), expected(size + 16, 77);
      cpu::quantize({bytes.data(), type, p.batch, image, stride}, group(&index), 6, planes.data());
      for (int64_t i = 0; i < p.batch * image; ++i) {
        const int64_t pixel = i % p.pixels, channel = i / p.pixels % p.channels;
        expected[static_cast<size_t>((i / image * p.pixels + pixel) * p.channels + channel)] =
            planes[static_cast<size_t>(i)];
      }
      for (cpu::Isa isa : supported_isas()) {
        const cpu::ScopedIsa scope(isa);
        std::vector<int8_t> codes(size + 16, 77);
        cpu::quantize_channels_last({bytes.data(), type, p.batch, p.channels, p.pixels, stride},
                                    group(&index), 6, codes.data());
        EXPECT_EQ(codes, expected) << cpu::isa_name(isa) << " planes " << &p - kPlanes;
      }
    }
  }
}

TEST(QuantizeChannelsLast, LiteralCodes) {
  const int32_t index = 1;
  const std::vector<float> x = {0.5f, 1.0f, 1.5f, 1000.0f, kNan, -kInf};  // 2 channels of 3 pixels
  std::vector<int8_t> codes(6);
  cpu::quantize_channels_last({x.data(), FloatType::kFloat32, 1, 2, 3, 6}, group(&index), 8, codes.data());
  EXPECT_EQ(codes, (std::vector<int8_t>{4, 127, 5, -128, 6, -128}));
}

TEST(Quantize, GroupIndexOutOfRangeThrows) {
  for (int32_t index : {-1, 2}) {
    int8_t code = 77;
    const float x = 1.0f;
    try {
      cpu::quantize({&x, FloatType::kFloat32, 1, 1, 1}, group(&index), 8, &code);
      FAIL() << "no exception for " << index;
    } catch (const std::out_of_range& error) {
      EXPECT_EQ(std::string(error.what()),
                "quantize: group_index must be in [0, num_groups=2), got " + std::to_string(index));
    }
    EXPECT_EQ(code, 77);
  }
}

TEST(PackInt4, LiteralBytes) {
  std::vector<int8_t> codes(34);
  for (int i = 0; i < 32; ++i)
    codes[static_cast<size_t>(i)] = static_cast<int8_t>(i < 16 ? i - 8 : 7 - (i - 16));
  codes[32] = -1;
  codes[33] = 5;
  const std::vector<uint8_t> expected = {0x78, 0x69, 0x5a, 0x4b, 0x3c, 0x2d, 0x1e, 0x0f, 0xf0, 0xe1, 0xd2,
                                         0xc3, 0xb4, 0xa5, 0x96, 0x87, 0x0f, 0x05, 0,    0,    0,    0,
                                         0,    0,    0,    0,    0,    0,    0,    0,    0,    0};
  for (cpu::Isa isa : supported_isas()) {
    const cpu::ScopedIsa scope(isa);
    std::vector<uint8_t> packed(32, 0xee);
    cpu::pack_int4(codes.data(), 1, 34, packed.data());
    EXPECT_EQ(packed, expected);
    std::vector<int8_t> back(35, 77);
    cpu::unpack_int4(packed.data(), 1, 34, back.data());
    EXPECT_EQ(std::vector<int8_t>(back.begin(), back.begin() + 34), codes);
    EXPECT_EQ(back[34], 77);
  }
}

TEST(QuantizeInt4, EqualsPackedCodesForAllWidths) {
  const int32_t index = 1;
  for (int64_t columns : {1, 15, 16, 31, 32, 33, 1040, 16400}) {
    const std::vector<float> x = random_normal(3 * columns, 2, 3.0f);
    std::vector<uint8_t> expected(static_cast<size_t>(3 * int4_row_bytes(columns)));
    const std::vector<int8_t> codes = codes_of(x, FloatType::kFloat32, index, 4);
    cpu::pack_int4(codes.data(), 3, columns, expected.data());
    for (cpu::Isa isa : supported_isas()) {
      const cpu::ScopedIsa scope(isa);
      std::vector<uint8_t> packed(expected.size(), 0xee);
      cpu::quantize_int4({x.data(), FloatType::kFloat32, 3, columns, columns}, group(&index), packed.data());
      EXPECT_EQ(packed, expected) << cpu::isa_name(isa) << " " << columns;
      std::vector<float> from_codes(x.size()), from_packed(x.size());
      cpu::dequantize(codes.data(), 3 * columns, group(&index), FloatType::kFloat32, from_codes.data());
      cpu::dequantize_int4(packed.data(), 3, columns, group(&index), FloatType::kFloat32, from_packed.data());
      EXPECT_EQ(from_packed, from_codes);
    }
  }
}

TEST(Dequantize, LiteralValuesInEveryType) {
  const int32_t index = 1;
  const std::vector<int8_t> codes = {-128, -1, 3, 4, 127};
  for (cpu::Isa isa : supported_isas()) {
    const cpu::ScopedIsa scope(isa);
    for (FloatType type : kFloatTypes) {
      std::vector<uint8_t> bytes(codes.size() * static_cast<size_t>(float_size(type)));
      cpu::dequantize(codes.data(), 5, group(&index), type, bytes.data());
      EXPECT_EQ(decode(bytes, type), (std::vector<float>{-65.5f, -2.0f, 0.0f, 0.5f, 62.0f}));
    }
  }
}

}  // namespace
}  // namespace adpdm
