// Tests of quantization to codes, packing and back on CUDA against the CPU, bit for bit.
#include "core/quantize.h"

#include "cuda/elementwise_memory.h"

namespace adpdm::testing {
namespace {

const std::vector<float> kScale = {0.37f, 1.0f, 0.05f};
const std::vector<int32_t> kZeroPoint = {0, -3, 7};

// The same quantizers on host and device.
struct Groups {
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  int32_t index;
  DeviceBuffer<float> device_scale{scale};
  DeviceBuffer<int32_t> device_zero_point{zero_point};
  DeviceBuffer<int32_t> device_index{std::vector<int32_t>{index}};

  int64_t size() const { return static_cast<int64_t>(scale.size()); }
  GroupedQParams host() const { return {scale.data(), zero_point.data(), &index, size()}; }
  GroupedQParams device() const {
    return {device_scale.data(), device_zero_point.data(), device_index.data(), size()};
  }
};

struct Shape {
  int64_t rows, columns, stride;
  int64_t offset;  // of x, in elements
  int64_t codes_offset;
  int64_t size() const { return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns; }
};

// Empty, tails, whole warps and blocks, channel slices with and without vectors, odd addresses.
const Shape kShapes[] = {{1, 0, 0, 0, 0},       {0, 8, 8, 0, 0},       {1, 1, 1, 0, 0},
                         {1, 511, 511, 0, 0},   {1, 512, 512, 0, 0},   {1, 2600, 2600, 0, 0},
                         {3, 320, 640, 0, 0},   {5, 7, 9, 0, 0},       {40, 24, 40, 0, 0},
                         {2, 1024, 1028, 0, 0}, {1, 1030, 1030, 1, 0}, {1, 1030, 1030, 0, 1},
                         {33, 64, 96, 8, 16},   {9, 96, 96, 0, 0},     {70, 32, 64, 0, 0},
                         {3, 33, 33, 0, 0},     {2, 30, 32, 3, 5}};

TEST(CudaQuantize, CodesOfAllShapesTypesAndBitsEqualTheCpus) {
  ADPDM_REQUIRE_GPU();
  unsigned seed = 0;
  for (const Shape& shape : kShapes) {
    for (FloatType type : kFloatTypes) {
      const int num_bits = 2 + static_cast<int>(++seed % 7);
      const Groups groups{kScale, kZeroPoint, static_cast<int32_t>(seed % 3)};
      const FloatBuffer x(special_values(shape.size(), seed), type, shape.offset);
      std::vector<int8_t> expected(static_cast<size_t>(shape.rows * shape.columns));
      cpu::quantize({x.input().data(), type, shape.rows, shape.columns, shape.stride}, groups.host(),
                    num_bits, expected.data());
      for_each_schedule([&] {
        OffsetBuffer<int8_t> codes(shape.rows * shape.columns, shape.codes_offset);
        cuda::quantize({x.data(), type, shape.rows, shape.columns, shape.stride}, groups.device(), num_bits,
                       codes.data(), nullptr);
        EXPECT_EQ(codes.host(), expected) << "shape " << &shape - kShapes << " bits " << num_bits;
      });
    }
  }
}

TEST(CudaQuantize, ExtremeZeroPointsAndScales) {
  ADPDM_REQUIRE_GPU();
  for (float scale : {1e-18f, 0.3f, 1e30f}) {
    for (int32_t zero_point : {-128, 127}) {  // beyond the range of fewer bits, too
      for (int num_bits = 2; num_bits <= 8; ++num_bits) {
        const Groups groups{{scale}, {zero_point}, 0};
        const FloatBuffer x(special_values(600, 5), FloatType::kFloat32);
        std::vector<int8_t> expected(600);
        cpu::quantize({x.input().data(), FloatType::kFloat32, 1, 600, 600}, groups.host(), num_bits,
                      expected.data());
        OffsetBuffer<int8_t> codes(600, 0);
        cuda::quantize({x.data(), FloatType::kFloat32, 1, 600, 600}, groups.device(), num_bits, codes.data(),
                       nullptr);
        EXPECT_EQ(codes.host(), expected) << scale << " " << zero_point << " " << num_bits;
      }
    }
  }
}

TEST(CudaQuantize, LiteralCodes) {
  ADPDM_REQUIRE_GPU();
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const FloatBuffer x({0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 0.0f, 1000.0f, -1000.0f, inf, -inf, nan},
                      FloatType::kFloat32);
  const Groups groups{{1.0f, 0.5f}, {0, 3}, 1};
  OffsetBuffer<int8_t> codes(11, 0);
  cuda::quantize({x.data(), FloatType::kFloat32, 1, 11, 11}, groups.device(), 4, codes.data(), nullptr);
  EXPECT_EQ(codes.host(), (std::vector<int8_t>{4, 6, 7, 2, 0, 3, 7, -8, 7, -8, -8}));
}

TEST(CudaQuantize, GroupIndexOutOfRangeActsAsTheNearest) {
  ADPDM_REQUIRE_GPU();
  const FloatBuffer x(std::vector<float>{1.0f}, FloatType::kFloat32);
  for (int32_t index : {-1, 5}) {
    const Groups groups{{1.0f, 0.5f, 0.25f}, {0, 0, 0}, index};
    OffsetBuffer<int8_t> codes(1, 0);
    cuda::quantize({x.data(), FloatType::kFloat32, 1, 1, 1}, groups.device(), 8, codes.data(), nullptr);
    EXPECT_EQ(codes.host(), std::vector<int8_t>{static_cast<int8_t>(index < 0 ? 1 : 4)});
  }
}

TEST(CudaQuantizeInt4, BytesOfAllShapesAndTypesEqualTheCpus) {
  ADPDM_REQUIRE_GPU();
  unsigned seed = 100;
  for (const Shape& shape : kShapes) {
    for (FloatType type : kFloatTypes) {
      const Groups groups{kScale, kZeroPoint, static_cast<int32_t>(++seed % 3)};
      const FloatBuffer x(special_values(shape.size(), seed, 4.0f), type, shape.offset);
      const RowView host = {x.input().data(), type, shape.rows, shape.columns, shape.stride};
      std::vector<uint8_t> expected(static_cast<size_t>(shape.rows * int4_row_bytes(shape.columns)));
      cpu::quantize_int4(host, groups.host(), expected.data());
      const int64_t size = shape.rows * shape.columns;
      std::vector<uint8_t> expected_x(static_cast<size_t>(size * float_size(type)));
      cpu::dequantize_int4(expected.data(), shape.rows, shape.columns, groups.host(), type,
                           expected_x.data());
      for_each_schedule([&] {
        OffsetBuffer<uint8_t> packed(static_cast<int64_t>(expected.size()), shape.codes_offset);
        cuda::quantize_int4({x.data(), type, shape.rows, shape.columns, shape.stride}, groups.device(),
                            packed.data(), nullptr);
        EXPECT_EQ(packed.host(), expected) << "shape " << &shape - kShapes;
        FloatBuffer back(size, type, shape.offset);
        cuda::dequantize_int4(packed.data(), shape.rows, shape.columns, groups.device(), type, back.data(),
                              nullptr);
        EXPECT_EQ(back.bytes(), expected_x) << "shape " << &shape - kShapes;
      });
    }
  }
}

std::vector<int8_t> random_codes(int64_t size, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<int8_t> codes(static_cast<size_t>(size));
  for (int8_t& code : codes) code = static_cast<int8_t>(engine());
  return codes;
}

TEST(CudaPackInt4, BytesAndCodesEqualTheCpus) {
  ADPDM_REQUIRE_GPU();
  for (const Shape& shape : kShapes) {
    const int64_t size = shape.rows * shape.columns, bytes = shape.rows * int4_row_bytes(shape.columns);
    const std::vector<int8_t> host = random_codes(size, 3);
    const OffsetBuffer<int8_t> codes(host, shape.codes_offset);
    std::vector<uint8_t> expected(static_cast<size_t>(bytes));
    std::vector<int8_t> expected_back(host.size());
    cpu::pack_int4(host.data(), shape.rows, shape.columns, expected.data());
    cpu::unpack_int4(expected.data(), shape.rows, shape.columns, expected_back.data());
    for_each_schedule([&] {
      OffsetBuffer<uint8_t> packed(bytes, shape.offset);
      cuda::pack_int4(codes.data(), shape.rows, shape.columns, packed.data(), nullptr);
      EXPECT_EQ(packed.host(), expected) << "shape " << &shape - kShapes;
      OffsetBuffer<int8_t> back(size, shape.codes_offset);
      cuda::unpack_int4(packed.data(), shape.rows, shape.columns, back.data(), nullptr);
      EXPECT_EQ(back.host(), expected_back) << "shape " << &shape - kShapes;
    });
  }
}

TEST(CudaPackInt4, LiteralBytes) {
  ADPDM_REQUIRE_GPU();
  std::vector<int8_t> codes(32);
  for (int i = 0; i < 16; ++i) codes[static_cast<size_t>(i)] = static_cast<int8_t>(i - 8);
  for (int i = 0; i < 16; ++i) codes[static_cast<size_t>(16 + i)] = static_cast<int8_t>(7 - i);
  const OffsetBuffer<int8_t> device(codes, 0);
  OffsetBuffer<uint8_t> packed(16, 0);
  cuda::pack_int4(device.data(), 1, 32, packed.data(), nullptr);
  EXPECT_EQ(packed.host(), (std::vector<uint8_t>{0x78, 0x69, 0x5a, 0x4b, 0x3c, 0x2d, 0x1e, 0x0f, 0xf0, 0xe1,
                                                 0xd2, 0xc3, 0xb4, 0xa5, 0x96, 0x87}));
}

TEST(CudaDequantize, ValuesOfAllSizesAndTypesEqualTheCpus) {
  ADPDM_REQUIRE_GPU();
  for (const Shape& shape : kShapes) {
    const int64_t size = shape.rows * shape.columns;
    const std::vector<int8_t> host = random_codes(size, 4);
    const OffsetBuffer<int8_t> codes(host, shape.codes_offset);
    const Groups groups{{0.7f, 1e37f}, {-128, 100}, static_cast<int32_t>(size % 2)};
    for (FloatType type : kFloatTypes) {
      std::vector<uint8_t> expected(static_cast<size_t>(size * float_size(type)));
      cpu::dequantize(host.data(), size, groups.host(), type, expected.data());
      for_each_schedule([&] {
        FloatBuffer x(size, type, shape.offset);
        cuda::dequantize(codes.data(), size, groups.device(), type, x.data(), nullptr);
        EXPECT_EQ(x.bytes(), expected) << "shape " << &shape - kShapes;
      });
    }
  }
}

struct Planes {
  int64_t batch, channels, pixels;
  int64_t offset;  // of x, in elements
  int64_t codes_offset;
  int64_t gap;  // behind each image of x, in elements
  int64_t stride() const { return channels * pixels + gap; }
};

// Empty, ragged tiles, several tiles, whole ones, odd addresses, rows of no whole vector, channel slices with
// and without vectors.
const Planes kPlanes[] = {{0, 4, 4, 0, 0, 0},     {2, 3, 0, 0, 0, 0},    {1, 1, 1, 0, 0, 0},
                          {2, 3, 25, 0, 0, 0},    {1, 64, 128, 0, 0, 0}, {2, 80, 136, 0, 0, 0},
                          {1, 16, 16, 0, 0, 0},   {1, 100, 64, 0, 0, 0}, {3, 32, 64, 1, 0, 0},
                          {1, 48, 200, 0, 16, 0}, {2, 32, 64, 0, 3, 0},  {1, 129, 4, 0, 0, 0},
                          {2, 32, 64, 64, 0, 64}, {3, 16, 32, 0, 0, 33}};

TEST(CudaQuantizeChannelsLast, CodesAreThoseOfTheCpuTransposed) {
  ADPDM_REQUIRE_GPU();
  unsigned seed = 200;
  for (const Planes& p : kPlanes) {
    for (FloatType type : kFloatTypes) {
      const int num_bits = 2 + static_cast<int>(++seed % 7);
      const Groups groups{kScale, kZeroPoint, static_cast<int32_t>(seed % 3)};
      const int64_t image = p.channels * p.pixels, size = p.batch * image;
      const FloatBuffer x(special_values(p.batch * p.stride(), seed), type, p.offset);
      std::vector<int8_t> planes(static_cast<size_t>(size)), expected(planes.size());
      cpu::quantize({x.input().data(), type, p.batch, image, p.stride()}, groups.host(), num_bits,
                    planes.data());
      for (int64_t i = 0; i < size; ++i) {
        const int64_t pixel = i % p.pixels, channel = i / p.pixels % p.channels;
        expected[static_cast<size_t>((i / image * p.pixels + pixel) * p.channels + channel)] =
            planes[static_cast<size_t>(i)];
      }
      for_each_schedule([&] {
        OffsetBuffer<int8_t> codes(size, p.codes_offset);
        cuda::quantize_channels_last({x.data(), type, p.batch, p.channels, p.pixels, p.stride()},
                                     groups.device(), num_bits, codes.data(), nullptr);
        EXPECT_EQ(codes.host(), expected) << "planes " << &p - kPlanes;
      });
    }
  }
}

}  // namespace
}  // namespace adpdm::testing
