// Tests of Hadamard rotations on CUDA against the CPU.
#include "core/hadamard.h"

#include "cuda/elementwise_memory.h"

namespace adpdm::testing {
namespace {

struct Shape {
  int64_t rows, columns, stride, block, offset;
};

const Shape kShapes[] = {{1, 4, 4, 4, 0},        {0, 64, 64, 16, 0},     {3, 64, 64, 64, 1},
                         {2, 48, 50, 16, 0},     {5, 256, 256, 16, 0},   {7, 320, 323, 16, 3},
                         {3, 1024, 1024, 64, 0}, {2, 1152, 1152, 64, 0}, {9, 64, 64, 4, 0}};

TEST(CudaHadamard, BitsOfAllShapesEqualTheCpus) {
  ADPDM_REQUIRE_GPU();
  unsigned seed = 0;
  for (const Shape& s : kShapes) {
    for (FloatType type : kFloatTypes) {
      const int64_t size = s.rows == 0 ? 0 : (s.rows - 1) * s.stride + s.columns;
      const FloatBuffer x(special_values(size, ++seed, 2.0f), type, s.offset);
      std::vector<float> wanted(static_cast<size_t>(s.rows * s.columns));
      cpu::hadamard({x.input().data(), type, s.rows, s.columns, s.stride}, s.block, wanted.data());
      for_each_schedule([&] {
        OffsetBuffer<float> y(s.rows * s.columns, s.offset);
        cuda::hadamard({x.data(), type, s.rows, s.columns, s.stride}, s.block, y.data(), nullptr);
        EXPECT_EQ(bits_of(y.host()), bits_of(wanted)) << s.columns << " " << s.block;
      });
    }
  }
}

TEST(CudaHadamard, CodesOfAllShapesEqualTheCpus) {
  ADPDM_REQUIRE_GPU();
  const std::vector<float> scale = {0.03f, 0.11f};
  const std::vector<int32_t> zero_point = {-5, 3}, group = {1};
  const DeviceBuffer<float> device_scale(scale);
  const DeviceBuffer<int32_t> device_zero_point(zero_point), device_group(group);
  const GroupedQParams host = {scale.data(), zero_point.data(), group.data(), 2};
  const GroupedQParams device = {device_scale.data(), device_zero_point.data(), device_group.data(), 2};
  unsigned seed = 100;
  for (const Shape& s : kShapes) {
    for (FloatType type : kFloatTypes) {
      const int64_t size = s.rows == 0 ? 0 : (s.rows - 1) * s.stride + s.columns;
      const FloatBuffer x(special_values(size, ++seed, 2.0f), type, s.offset);
      const int bits = s.columns % 3 == 0 ? 6 : 8;
      std::vector<int8_t> wanted(static_cast<size_t>(s.rows * s.columns));
      cpu::hadamard_quantize({x.input().data(), type, s.rows, s.columns, s.stride}, s.block, host, bits,
                             wanted.data());
      for_each_schedule([&] {
        OffsetBuffer<int8_t> codes(s.rows * s.columns, s.offset);
        cuda::hadamard_quantize({x.data(), type, s.rows, s.columns, s.stride}, s.block, device, bits,
                                codes.data(), nullptr);
        EXPECT_EQ(codes.host(), wanted) << s.columns << " " << s.block;
      });
    }
  }
}

}  // namespace
}  // namespace adpdm::testing
