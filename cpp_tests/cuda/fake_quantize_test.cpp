// Tests of fake quantization, its mixture and their gradients on CUDA against the CPU, bit for bit.
#include "core/fake_quantize.h"

#include "cuda/elementwise_memory.h"

namespace adpdm::testing {
namespace {

std::vector<float> random_uniform(int64_t size, unsigned seed, float low, float high) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = uniform(engine);
  return values;
}

// The same learnable quantizers on host and device: scale, zero_point [num_groups, channels], importance
// [num_groups].
struct Learned {
  int64_t num_groups;
  int64_t channels;
  CodeRange range;
  int32_t index;
  unsigned seed;
  std::vector<float> scale = random_uniform(num_groups * channels, seed, 0.05f, 0.8f);
  std::vector<float> zero_point =
      random_uniform(num_groups * channels, seed + 1, static_cast<float>(range.quant_min) - 3.0f,
                     static_cast<float>(range.quant_max) + 3.0f);  // some beyond the range
  std::vector<float> importance = random_uniform(num_groups, seed + 2, 0.0f, 1.0f);
  DeviceBuffer<float> device_scale{scale};
  DeviceBuffer<float> device_zero_point{zero_point};
  DeviceBuffer<float> device_importance{importance};
  DeviceBuffer<int32_t> device_index{std::vector<int32_t>{index}};

  FakeQuantizeArgs host(const void* x, FloatType type, ChannelView shape) const {
    return {x, type, shape, scale.data(), zero_point.data(), &index, num_groups, range};
  }
  FakeQuantizeArgs device(const void* x, FloatType type, ChannelView shape) const {
    return {x,          type, shape, device_scale.data(), device_zero_point.data(), device_index.data(),
            num_groups, range};
  }
  MixtureArgs host_mixture(const void* x, FloatType type, int64_t size) const {
    return {x, type, size, scale.data(), zero_point.data(), importance.data(), num_groups, range};
  }
  MixtureArgs device_mixture(const void* x, FloatType type, int64_t size) const {
    return {x,          type, size, device_scale.data(), device_zero_point.data(), device_importance.data(),
            num_groups, range};
  }
};

struct Case {
  ChannelView shape;
  int64_t offset;  // of all tensors, in elements
  int64_t size() const { return shape.outer * shape.channels * shape.inner; }
};

// Nothing, tails, more than a chunk of 16384, odd addresses; channels of few, ragged, whole and long rows.
const Case kCases[] = {{{1, 1, 0}, 0},     {{1, 1, 1}, 0},    {{1, 1, 2048}, 0}, {{1, 1, 5000}, 3},
                       {{3, 1, 11111}, 0}, {{0, 3, 4}, 0},    {{5, 3, 1}, 0},    {{2, 9, 7}, 0},
                       {{1, 8, 2304}, 0},  {{2, 3, 1032}, 0}, {{1, 17, 64}, 0},  {{1, 2, 4096}, 1}};

CodeRange range_of(unsigned seed) { return signed_range(2 + static_cast<int>(seed % 7)); }

TEST(CudaFakeQuantize, ValuesOfAllShapesAndTypesEqualTheCpus) {
  ADPDM_REQUIRE_GPU();
  unsigned seed = 0;
  for (const Case& c : kCases) {
    for (FloatType type : kFloatTypes) {
      ++seed;
      const Learned learned{3, c.shape.channels, range_of(seed), static_cast<int32_t>(seed % 3), seed};
      const FloatBuffer x(special_values(c.size(), seed, 20.0f), type, c.offset);
      std::vector<uint8_t> expected(x.input().size());
      cpu::fake_quantize(learned.host(x.input().data(), type, c.shape), expected.data());
      for_each_schedule([&] {
        FloatBuffer y(c.size(), type, c.offset);
        cuda::fake_quantize(learned.device(x.data(), type, c.shape), y.data(), nullptr);
        EXPECT_EQ(y.bytes(), expected) << "case " << &c - kCases;
      });
    }
  }
}

TEST(CudaFakeQuantizeBackward, GradientsEqualTheCpusBitForBit) {
  ADPDM_REQUIRE_GPU();
  unsigned seed = 50;
  for (const Case& c : kCases) {
    for (FloatType type : kFloatTypes) {
      ++seed;
      const Learned learned{3, c.shape.channels, range_of(seed), static_cast<int32_t>(seed % 3), seed};
      const int64_t rows = 3 * c.shape.channels;
      const FloatBuffer x(special_values(c.size(), seed, 20.0f), type, c.offset);
      const FloatBuffer grad(random_normal(c.size(), seed + 1), type, c.offset);
      std::vector<uint8_t> expected_x(x.input().size());
      std::vector<float> expected_scale(static_cast<size_t>(rows)), expected_zero(static_cast<size_t>(rows));
      cpu::fake_quantize_backward(learned.host(x.input().data(), type, c.shape), grad.input().data(),
                                  expected_x.data(), expected_scale.data(), expected_zero.data());
      const FakeQuantizeArgs args = learned.device(x.data(), type, c.shape);
      for_each_schedule([&] {
        FloatBuffer grad_x(c.size(), type, c.offset);
        DeviceBuffer<float> scale(rows), zero_point(rows);
        DeviceBuffer<uint8_t> workspace(cuda::fake_quantize_backward_workspace(args));
        cuda::fake_quantize_backward(args, grad.data(), grad_x.data(), scale.data(), zero_point.data(),
                                     workspace.data(), nullptr);
        EXPECT_EQ(grad_x.bytes(), expected_x) << "case " << &c - kCases;
        EXPECT_EQ(bits_of(scale.host()), bits_of(expected_scale)) << "case " << &c - kCases;
        EXPECT_EQ(bits_of(zero_point.host()), bits_of(expected_zero)) << "case " << &c - kCases;
      });
    }
  }
}

TEST(CudaFakeQuantizeBackward, NanAndInfiniteGradientsStay) {
  ADPDM_REQUIRE_GPU();
  const FloatType type = FloatType::kFloat32;
  const Learned learned{1, 1, signed_range(4), 0, 1};
  const FloatBuffer x({0.1f, 100.0f, 0.1f}, type);
  const FloatBuffer grad(
      {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1.0f}, type);
  const FakeQuantizeArgs args = learned.device(x.data(), type, {1, 1, 3});
  FloatBuffer grad_x(3, type);
  DeviceBuffer<float> scale(1), zero_point(1);
  DeviceBuffer<uint8_t> workspace(cuda::fake_quantize_backward_workspace(args));
  cuda::fake_quantize_backward(args, grad.data(), grad_x.data(), scale.data(), zero_point.data(),
                               workspace.data(), nullptr);
  std::vector<float> expected(3);
  std::vector<float> expected_scale(1), expected_zero(1);
  cpu::fake_quantize_backward(learned.host(x.input().data(), type, {1, 1, 3}), grad.input().data(),
                              expected.data(), expected_scale.data(), expected_zero.data());
  EXPECT_EQ(bits_of(grad_x.values()), bits_of(expected));
  EXPECT_EQ(bits_of(scale.host()), bits_of(expected_scale));
  EXPECT_EQ(bits_of(zero_point.host()), bits_of(expected_zero));
}

// Gradients 1, 1e30, -1e30 of clamped values add up to 0 in this order and to 1 in the reverse: doubles hold
// most other sums of floats exactly, whatever the order. They lie in one lane, or in neighbouring lanes,
// blocks or chunks.
TEST(CudaFakeQuantizeBackward, SumsAreAddedInTheOrderOfTheCpu) {
  ADPDM_REQUIRE_GPU();
  const FloatType type = FloatType::kFloat32;
  const Learned learned{1, 1, signed_range(4), 0, 1};
  for (int64_t distance : {16, 1, 1024, 16384}) {
    const int64_t size = 2 * distance + 1;
    std::vector<float> upstream(static_cast<size_t>(size));
    upstream[0] = 1.0f;
    upstream[static_cast<size_t>(distance)] = 1e30f;
    upstream[static_cast<size_t>(2 * distance)] = -1e30f;
    const FloatBuffer x(std::vector<float>(static_cast<size_t>(size), 100.0f), type), grad(upstream, type);
    std::vector<float> expected(static_cast<size_t>(size)), expected_scale(1), expected_zero(1);
    cpu::fake_quantize_backward(learned.host(x.input().data(), type, {1, 1, size}), grad.input().data(),
                                expected.data(), expected_scale.data(), expected_zero.data());
    ASSERT_EQ(expected_zero[0], 0.0f) << "distance " << distance;
    const FakeQuantizeArgs args = learned.device(x.data(), type, {1, 1, size});
    FloatBuffer grad_x(size, type);
    DeviceBuffer<float> scale(1), zero_point(1);
    DeviceBuffer<uint8_t> workspace(cuda::fake_quantize_backward_workspace(args));
    cuda::fake_quantize_backward(args, grad.data(), grad_x.data(), scale.data(), zero_point.data(),
                                 workspace.data(), nullptr);
    EXPECT_EQ(bits_of(scale.host()), bits_of(expected_scale)) << "distance " << distance;
    EXPECT_EQ(bits_of(zero_point.host()), bits_of(expected_zero)) << "distance " << distance;
  }
}

TEST(CudaFakeQuantize, GroupIndexOutOfRangeActsAsTheNearest) {
  ADPDM_REQUIRE_GPU();
  const FloatType type = FloatType::kFloat32;
  const FloatBuffer x(random_normal(40, 3, 5.0f), type);
  for (int32_t index : {-7, 3}) {
    const int32_t nearest = index < 0 ? 0 : 2;
    const Learned outside{3, 1, signed_range(8), index, 9}, inside{3, 1, signed_range(8), nearest, 9};
    FloatBuffer y(40, type), expected(40, type);
    cuda::fake_quantize(outside.device(x.data(), type, {1, 1, 40}), y.data(), nullptr);
    cuda::fake_quantize(inside.device(x.data(), type, {1, 1, 40}), expected.data(), nullptr);
    EXPECT_EQ(y.bytes(), expected.bytes());
  }
}

struct MixtureCase {
  int64_t size, num_groups, offset;
};

// More groups than are summed at once, and not a multiple of them.
const MixtureCase kMixtures[] = {{0, 3, 0},    {1, 1, 0},     {2049, 8, 0},
                                 {5000, 9, 1}, {33000, 3, 0}, {700, 20, 0}};

TEST(CudaFakeQuantizeMixture, ValuesEqualTheCpus) {
  ADPDM_REQUIRE_GPU();
  unsigned seed = 100;
  for (const MixtureCase& c : kMixtures) {
    for (FloatType type : kFloatTypes) {
      ++seed;
      const Learned learned{c.num_groups, 1, range_of(seed), 0, seed};
      const FloatBuffer x(special_values(c.size, seed, 20.0f), type, c.offset);
      std::vector<uint8_t> expected(x.input().size());
      cpu::fake_quantize_mixture(learned.host_mixture(x.input().data(), type, c.size), expected.data());
      for_each_schedule([&] {
        FloatBuffer y(c.size, type, c.offset);
        cuda::fake_quantize_mixture(learned.device_mixture(x.data(), type, c.size), y.data(), nullptr);
        EXPECT_EQ(y.bytes(), expected) << "case " << &c - kMixtures;
      });
    }
  }
}

TEST(CudaFakeQuantizeMixtureBackward, GradientsEqualTheCpusBitForBit) {
  ADPDM_REQUIRE_GPU();
  unsigned seed = 150;
  for (const MixtureCase& c : kMixtures) {
    for (FloatType type : kFloatTypes) {
      ++seed;
      const Learned learned{c.num_groups, 1, range_of(seed), 0, seed};
      const FloatBuffer x(special_values(c.size, seed, 20.0f), type, c.offset);
      const FloatBuffer grad(random_normal(c.size, seed + 1), type, c.offset);
      std::vector<uint8_t> expected_x(x.input().size());
      const auto groups = static_cast<size_t>(c.num_groups);
      std::vector<float> scale(groups), zero_point(groups), importance(groups);
      cpu::fake_quantize_mixture_backward(
          learned.host_mixture(x.input().data(), type, c.size), grad.input().data(),
          {expected_x.data(), scale.data(), zero_point.data(), importance.data()});
      const MixtureArgs args = learned.device_mixture(x.data(), type, c.size);
      for_each_schedule([&] {
        FloatBuffer grad_x(c.size, type, c.offset);
        DeviceBuffer<float> device_scale(c.num_groups), device_zero(c.num_groups),
            device_importance(c.num_groups);
        DeviceBuffer<uint8_t> workspace(cuda::fake_quantize_mixture_backward_workspace(args));
        cuda::fake_quantize_mixture_backward(
            args, grad.data(),
            {grad_x.data(), device_scale.data(), device_zero.data(), device_importance.data()},
            workspace.data(), nullptr);
        EXPECT_EQ(grad_x.bytes(), expected_x) << "case " << &c - kMixtures;
        EXPECT_EQ(bits_of(device_scale.host()), bits_of(scale)) << "case " << &c - kMixtures;
        EXPECT_EQ(bits_of(device_zero.host()), bits_of(zero_point)) << "case " << &c - kMixtures;
        EXPECT_EQ(bits_of(device_importance.host()), bits_of(importance)) << "case " << &c - kMixtures;
      });
    }
  }
}

}  // namespace
}  // namespace adpdm::testing
