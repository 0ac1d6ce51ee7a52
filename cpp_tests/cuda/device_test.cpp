// Tests of the device functions, reductions and launches, on the host executor and on a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include "core/float_convert.h"
#include "cuda/device_info.h"
#include "cuda/device_kernels.h"
#include "cuda/device_memory.h"

namespace adpdm::testing {
namespace {

constexpr FloatType kHalfTypes[] = {FloatType::kBFloat16, FloatType::kFloat16};

TEST(Device, ConvertsEveryHalfAsTheHostDoes) {
  ADPDM_REQUIRE_GPU();
  std::vector<uint16_t> halves(65536);
  std::iota(halves.begin(), halves.end(), uint16_t{0});
  const DeviceBuffer<uint16_t> x(halves);
  for (FloatType type : kHalfTypes) {
    DeviceBuffer<float> y(x.size());
    convert_to_float(x.data(), y.data(), x.size(), type);
    const std::vector<float> converted = y.host();
    for (uint16_t half : halves) {
      const float expected = type == FloatType::kBFloat16 ? bf16_to_float(half) : f16_to_float(half);
      // The bits of a NaN are the instruction's.
      if (std::isnan(expected) && std::isnan(converted[half])) continue;
      ASSERT_EQ(float_to_bits(converted[half]), float_to_bits(expected)) << half;
    }
  }
}

// Values around every rounding boundary of the 16-bit types, and any bits at all.
std::vector<float> floats_to_round() {
  std::vector<float> values;
  for (uint32_t high = 0; high < 65536; high += 7) {
    for (uint32_t low : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      values.push_back(bits_to_float(high << 16 | low));
    }
  }
  std::mt19937 engine(3);
  for (int i = 0; i < 20000; ++i) values.push_back(bits_to_float(static_cast<uint32_t>(engine())));
  return values;
}

TEST(Device, RoundsToHalvesAsTheHostDoes) {
  ADPDM_REQUIRE_GPU();
  const std::vector<float> values = floats_to_round();
  const DeviceBuffer<float> x(values);
  for (FloatType type : kHalfTypes) {
    DeviceBuffer<uint16_t> y(x.size());
    convert_from_float(x.data(), y.data(), x.size(), type);
    const std::vector<uint16_t> rounded = y.host();
    for (size_t i = 0; i < values.size(); ++i) {
      const bool is_bf16 = type == FloatType::kBFloat16;
      const uint16_t expected = is_bf16 ? float_to_bf16(values[i]) : float_to_f16(values[i]);
      if (std::isnan(values[i]) &&
          std::isnan(is_bf16 ? bf16_to_float(rounded[i]) : f16_to_float(rounded[i]))) {
        continue;
      }
      ASSERT_EQ(rounded[i], expected) << float_to_bits(values[i]);
    }
  }
}

TEST(Device, MultipliesAddsAndInvertsWithOneRounding) {
  ADPDM_REQUIRE_GPU();
  std::mt19937 engine(5);
  std::normal_distribution<float> normal;
  std::vector<float> a(1000), b(1000), c(1000);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = normal(engine);
    b[i] = normal(engine);
    c[i] = -a[i] * b[i];  // all that remains is the rounding error of the product
  }
  const DeviceBuffer<float> da(a), db(b), dc(c);
  DeviceBuffer<float> y(1000), z(1000);
  multiply_add_and_invert(da.data(), db.data(), dc.data(), y.data(), z.data(), 1000);
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(y.host()[i], std::fma(a[i], b[i], c[i]));
    EXPECT_EQ(z.host()[i], 1.0f / a[i]);
  }
}

TEST(Device, ReducesABlockToTheSameBitsInEveryThread) {
  ADPDM_REQUIRE_GPU();
  for (int threads : {32, 64, 96, 256, 1024}) {
    std::mt19937 engine(static_cast<unsigned>(threads));
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<size_t>(threads));
    for (float& value : values) value = normal(engine);
    const DeviceBuffer<float> x(values);
    DeviceBuffer<Reduced> result(threads);
    reduce_block(x.data(), result.data(), threads);
    const double exact = std::accumulate(values.begin(), values.end(), 0.0);
    const std::vector<Reduced> reduced = result.host();
    for (const Reduced& mine : reduced) {
      // 10 additions deep, each off by half a unit in the last place of at most sum |x|.
      double bound = 0;
      for (float value : values) bound += std::abs(value);
      EXPECT_NEAR(mine.sum, exact, bound * 10 * std::ldexp(1.0, -24));
      EXPECT_NEAR(mine.precise_sum, exact, bound * threads * std::ldexp(1.0, -53));
      EXPECT_EQ(mine.sum, reduced[0].sum);
      EXPECT_EQ(mine.precise_sum, reduced[0].precise_sum);
      EXPECT_EQ(mine.smallest, *std::min_element(values.begin(), values.end()));
      EXPECT_EQ(mine.largest, *std::max_element(values.begin(), values.end()));
    }
  }
}

TEST(Device, MinAndMaxIgnoreNan) {
  ADPDM_REQUIRE_GPU();
  std::vector<float> values(64, std::numeric_limits<float>::quiet_NaN());
  values[5] = 2.0f;
  values[40] = -3.0f;
  const DeviceBuffer<float> x(values);
  DeviceBuffer<Reduced> result(64);
  reduce_block(x.data(), result.data(), 64);
  for (const Reduced& mine : result.host()) {
    EXPECT_EQ(mine.smallest, -3.0f);
    EXPECT_EQ(mine.largest, 2.0f);
  }
}

TEST(Device, AtomicsCountEveryThread) {
  ADPDM_REQUIRE_GPU();
  DeviceBuffer<int32_t> by_block(3), total(std::vector<int32_t>{10}), extrema(std::vector<int32_t>{50, 50});
  DeviceBuffer<uint64_t> wide_total(std::vector<uint64_t>{5});
  count_threads(by_block.data(), total.data(), wide_total.data(), extrema.data());
  EXPECT_EQ(by_block.host(), (std::vector<int32_t>{64, 64, 64}));
  EXPECT_EQ(total.host(), std::vector<int32_t>{10 + 192});
  EXPECT_EQ(wide_total.host(), std::vector<uint64_t>{5 + (uint64_t{192} << 33)});
  EXPECT_EQ(extrema.host(), (std::vector<int32_t>{0, 191}));
}

TEST(Device, TensorCoreTileIsAMatrixProduct) {
  ADPDM_REQUIRE_GPU();
  std::mt19937 engine(11);
  std::vector<int8_t> a(16 * 32), b(8 * 32);
  for (int8_t& code : a) code = static_cast<int8_t>(engine());
  for (int8_t& code : b) code = static_cast<int8_t>(engine());
  const DeviceBuffer<int8_t> da(a), db(b);
  DeviceBuffer<int32_t> c(16 * 8);
  multiply_tile(da.data(), db.data(), c.data());
  std::vector<int32_t> expected;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      expected.push_back(
          std::inner_product(a.begin() + row * 32, a.begin() + row * 32 + 32, b.begin() + column * 32, 0));
    }
  }
  EXPECT_EQ(c.host(), expected);
}

TEST(Launch, RunsWithMoreSharedMemoryThanIsGrantedUnasked) {
  ADPDM_REQUIRE_GPU();
  DeviceBuffer<int32_t> x(1);
  launch_anything(x.data(), 7, 2, 64, 96 * 1024);
  EXPECT_EQ(x.host(), std::vector<int32_t>{7});
}

TEST(Launch, SharedMemoryBeginsAtAMultipleOf1024) {
  ADPDM_REQUIRE_GPU();
  DeviceBuffer<int32_t> remainder(1);
  find_shared_alignment(remainder.data());
  EXPECT_EQ(remainder.host(), std::vector<int32_t>{0});
}

TEST(Launch, OfNoBlocksDoesNothing) {
  ADPDM_REQUIRE_GPU();
  DeviceBuffer<int32_t> x(std::vector<int32_t>{1});
  launch_anything(x.data(), 7, 0, 64, 0);
  EXPECT_EQ(x.host(), std::vector<int32_t>{1});
}

std::string launch_error(int64_t blocks, int threads, int64_t shared_bytes) {
  DeviceBuffer<int32_t> x(1);
  try {
    launch_anything(x.data(), 7, blocks, threads, shared_bytes);
  } catch (const CudaError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Launch, RefusesShapesBeyondTheDevice) {
  ADPDM_REQUIRE_GPU();
  const std::string wanted =
      "device_test: wanted a launch of at most 2147483647 x 65535 x 65535 blocks of a multiple of 32 up to "
      "1024 "
      "threads and at most " +
      std::to_string(cuda::current_device_info().max_shared_bytes) + " bytes of shared memory, got ";
  EXPECT_EQ(launch_error(1, 48, 0), wanted + "1 x 1 x 1 blocks of 48 threads and 0 bytes of shared memory");
  EXPECT_EQ(launch_error(1, 2048, 0),
            wanted + "1 x 1 x 1 blocks of 2048 threads and 0 bytes of shared memory");
  EXPECT_EQ(launch_error(1, 32, 1 << 20),
            wanted + "1 x 1 x 1 blocks of 32 threads and 1048576 bytes of shared memory");
  EXPECT_EQ(launch_error(int64_t{1} << 31, 32, 0),
            wanted + "2147483648 x 1 x 1 blocks of 32 threads and 0 bytes of shared memory");
}

TEST(Launch, MemsetWritesTheBytesItIsGiven) {
  ADPDM_REQUIRE_GPU();
  DeviceBuffer<uint8_t> x(std::vector<uint8_t>(6, 1));
  set_bytes(x.data() + 1, 9, 4);
  set_bytes(x.data(), 9, 0);
  EXPECT_EQ(x.host(), (std::vector<uint8_t>{1, 9, 9, 9, 9, 1}));
}

TEST(DeviceInfo, MachineCodeRunsWithinAMajorVersionAndPtxOnLaterOnes) {
  using cuda::archs_cover;
  const std::string standard = "80-real,90a-real,80-virtual";
  for (int arch : {80, 86, 89, 90, 100, 120}) EXPECT_TRUE(archs_cover(standard, arch)) << arch;
  EXPECT_FALSE(archs_cover(standard, 75));
  EXPECT_TRUE(archs_cover("80-real", 89));
  EXPECT_FALSE(archs_cover("89-real", 80));
  EXPECT_FALSE(archs_cover("80-real", 90));
  EXPECT_TRUE(archs_cover("80", 90));  // both kinds
  EXPECT_TRUE(archs_cover("90a-real", 90));
  EXPECT_FALSE(archs_cover("90a", 100));  // PTX of the variant runs nowhere else
}

#ifdef ADPDM_SIMT
TEST(DeviceInfo, UncoveredDeviceIsToldWhatToBuild) {
  cuda::set_emulated_device({75, 40, 64 * 1024});
  std::string message;
  try {
    cuda::require_built_arch("linear");
  } catch (const CudaError& error) {
    message = error.what();
  }
  cuda::set_emulated_device(cuda::kEmulatedA100);
  EXPECT_EQ(
      message,
      "linear: the CUDA kernels were built for 80-real,90a-real,80-virtual, which the current device (sm_75) "
      "cannot run; build adpdm again with ADPDM_CUDA_ARCHS=75-real (sm_80 is the oldest architecture "
      "supported)");
  cuda::require_built_arch("linear");
}

TEST(DeviceInfo, TellsWhichMachineCodeWasBuilt) {
  EXPECT_TRUE(cuda::built_for("90a"));
  EXPECT_FALSE(cuda::built_for("90"));
}
#endif

TEST(DeviceInfo, CountsDevicesWithoutThrowing) { EXPECT_GE(cuda::device_count(), 0); }

}  // namespace
}  // namespace adpdm::testing
