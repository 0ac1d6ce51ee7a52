// Tests of the normalisations that end in codes on CUDA, against the definition with sums in double and
// against the CPU.
#include "core/norm_quantize.h"

#include <cmath>

#include "core/activation_math.h"
#include "cuda/elementwise_memory.h"

namespace adpdm::testing {
namespace {

const std::vector<float> kScale = {0.03f, 0.011f};
const std::vector<int32_t> kZeroPoint = {-5, 17};

struct Moments {
  float mean, inv_deviation;
};

Moments moments_of(const std::vector<double>& values, float eps) {
  double mean = 0, variance = 0;
  for (double value : values) mean += value / static_cast<double>(values.size());
  for (double value : values)
    variance += (value - mean) * (value - mean) / static_cast<double>(values.size());
  return {static_cast<float>(mean), static_cast<float>(1.0 / std::sqrt(variance + static_cast<double>(eps)))};
}

// Multiplies blocks of channels, columns / block apart, by the Hadamard matrix; 0: leaves them.
std::vector<float> rotated(const std::vector<float>& row, int64_t block) {
  if (block == 0) return row;
  const int64_t stride = static_cast<int64_t>(row.size()) / block;
  std::vector<float> result(row.size());
  for (int64_t first = 0; first < stride; ++first) {
    for (int64_t j = 0; j < block; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < block; ++i) {
        const bool negative = __builtin_popcountll(static_cast<unsigned long long>(i & j)) % 2 == 1;
        const double value = static_cast<double>(row[static_cast<size_t>(first + i * stride)]);
        sum += negative ? -value : value;
      }
      const double factor = 1.0 / std::sqrt(static_cast<double>(block));
      result[static_cast<size_t>(first + j * stride)] = static_cast<float>(sum * factor);
    }
  }
  return result;
}

// Parameters of both normalisations, on the host and (all the same) on the device.
struct Parameters {
  int64_t channels, images;
  int num_bits;
  bool affine, modulated;
  std::vector<float> weight = random_normal(channels, 1), bias = random_normal(channels, 2);
  std::vector<float> modulation = random_normal(images * 2 * channels, 3, 0.3f);
  int32_t group = 1;
  DeviceBuffer<float> device_weight{weight}, device_bias{bias}, device_modulation{modulation},
      device_scale{kScale};
  DeviceBuffer<int32_t> device_zero_point{kZeroPoint}, device_group{std::vector<int32_t>{group}};

  GroupedQParams qparams() const {
    return {device_scale.data(), device_zero_point.data(), device_group.data(), 2};
  }
  GroupedQParams host_qparams() const { return {kScale.data(), kZeroPoint.data(), &group, 2}; }

  float value(float x, Moments m, int64_t image, int64_t channel, bool silu_after) const {
    const auto c = static_cast<size_t>(channel);
    const float factor = m.inv_deviation * (affine ? weight[c] : 1.0f);
    float y = std::fma(x, factor, std::fma(-m.mean, factor, affine ? bias[c] : 0.0f));
    if (modulated) {
      const size_t row = static_cast<size_t>(image * 2 * channels);
      y = std::fma(y, 1.0f + modulation[row + c], modulation[row + static_cast<size_t>(channels) + c]);
    }
    return silu_after ? silu(y) : y;
  }

  int8_t code(float y) const {
    const CodeRange range = signed_range(num_bits);
    const float inv = 1.0f / kScale[static_cast<size_t>(group)];
    return static_cast<int8_t>(
        quantize_value(y, inv, static_cast<float>(kZeroPoint[static_cast<size_t>(group)]),
                       static_cast<float>(range.quant_min), static_cast<float>(range.quant_max)));
  }

  // Of rows [*, channels] whose channels are rotated first.
  std::vector<int8_t> codes(const std::vector<float>& values, int64_t hadamard) const {
    std::vector<int8_t> result;
    for (auto row = values.begin(); row < values.end(); row += channels) {
      for (float y : rotated({row, row + channels}, hadamard)) result.push_back(code(y));
    }
    return result;
  }
};

// How many codes are one off; more than one fails the test.
int64_t count_different(const std::vector<int8_t>& codes, const std::vector<int8_t>& expected, size_t which) {
  EXPECT_EQ(codes.size(), expected.size());
  int64_t different = 0;
  for (size_t i = 0; i < codes.size(); ++i) {
    const int distance = std::abs(codes[i] - expected[i]);
    if (distance > 1) ADD_FAILURE() << "case " << which << " value " << i << ": " << distance << " codes off";
    different += distance;
  }
  return different;
}

// Sums in another order move a value across a rounding boundary less than once in 10 000.
struct Tally {
  int64_t values = 0, different = 0;

  void compare(const std::vector<int8_t>& codes, const std::vector<int8_t>& expected, size_t which) {
    const int64_t here = count_different(codes, expected, which);
    EXPECT_LE(here, 1 + static_cast<int64_t>(codes.size()) / 2000) << "case " << which;
    values += static_cast<int64_t>(codes.size());
    different += here;
  }

  void expect_rare() const { EXPECT_LT(different * 10000, values) << different << " of " << values; }
};

// Against a mean of 3000 deviations, sums of squares about 0 would leave nothing of the variance in float32.
// What remains: 1 / deviation may be off by one unit in the last place, which moves the offset of that mean
// by 3000 * 2^-23 = 3.6e-4, times a weight of about 1: 3 % of the code step of 0.011, so up to 3 % of the
// codes.
constexpr double kLargeMeanShare = 0.03;

struct GroupCase {
  int64_t batch, pixels;
  int64_t channels[2];  // of the sources
  int64_t norm_groups;
  int64_t offset;  // of the sources, in elements
  int num_bits;
  bool affine, modulated, silu_after;
  int64_t hadamard = 0;
};

// Groups across vectors, tiles and sources; one group of all channels, one of each; one pixel; several
// splits; ragged channel counts and odd addresses.
const GroupCase kGroupCases[] = {
    {2, 64, {64, 0}, 8, 0, 8, true, false, true},      {1, 100, {320, 0}, 32, 0, 8, true, true, true},
    {2, 33, {40, 56}, 32, 0, 8, true, false, true},    {1, 16, {640, 320}, 32, 0, 8, false, false, false},
    {1, 700, {32, 0}, 4, 0, 8, true, true, false},     {3, 9, {24, 0}, 1, 0, 4, true, false, true},
    {2, 7, {48, 16}, 64, 0, 8, false, true, true},     {1, 25, {30, 20}, 10, 0, 8, true, false, true},
    {2, 40, {32, 0}, 8, 1, 8, true, true, true},       {1, 1, {64, 0}, 32, 0, 8, true, false, false},
    {0, 10, {32, 0}, 4, 0, 8, true, false, false},     {2, 0, {32, 0}, 4, 0, 8, true, false, false},
    {1, 2500, {13, 0}, 13, 0, 6, true, false, false},  {1, 20, {1032, 0}, 3, 0, 8, true, true, true},
    {2, 64, {64, 0}, 8, 0, 8, true, false, false, 64}, {1, 100, {320, 0}, 32, 0, 6, true, true, true, 16},
    {2, 33, {12, 0}, 3, 1, 8, true, false, false, 4},  {1, 300, {256, 0}, 1, 0, 4, false, false, false, 64},
    {0, 10, {64, 0}, 4, 0, 8, true, false, false, 64}};

// The definition; sources [N, pixels, C_s] as the type holds them.
std::vector<int8_t> expected_codes(const GroupCase& c, const Parameters& p, const std::vector<float> (&x)[2],
                                   float eps) {
  const int64_t channels = p.channels, per_group = channels / c.norm_groups;
  const auto value = [&](int64_t image, int64_t pixel, int64_t channel) {
    const int s = channel < c.channels[0] ? 0 : 1;
    const int64_t local = s == 0 ? channel : channel - c.channels[0];
    return x[s][static_cast<size_t>((image * c.pixels + pixel) * c.channels[s] + local)];
  };
  std::vector<float> values(static_cast<size_t>(c.batch * c.pixels * channels));
  for (int64_t image = 0; image < c.batch; ++image) {
    for (int64_t g = 0; g < c.norm_groups; ++g) {
      std::vector<double> of_group;
      for (int64_t pixel = 0; pixel < c.pixels; ++pixel) {
        for (int64_t i = 0; i < per_group; ++i) of_group.push_back(value(image, pixel, g * per_group + i));
      }
      const Moments m = moments_of(of_group, eps);
      for (int64_t pixel = 0; pixel < c.pixels; ++pixel) {
        for (int64_t i = g * per_group; i < (g + 1) * per_group; ++i) {
          values[static_cast<size_t>((image * c.pixels + pixel) * channels + i)] =
              p.value(value(image, pixel, i), m, image, i, c.silu_after);
        }
      }
    }
  }
  return p.codes(values, c.hadamard);
}

// The call on tensors in either memory.
GroupNormQuantizeArgs group_norm_args(const GroupCase& c, const Parameters& p, FloatType type,
                                      const void* first, const void* second, bool on_device, int8_t* codes) {
  const auto pick = [&](bool used, const DeviceBuffer<float>& device, const std::vector<float>& host) {
    return !used ? nullptr : (on_device ? device.data() : host.data());
  };
  return {{{first, c.channels[0]}, {second, c.channels[1]}},
          c.channels[1] > 0 ? 2 : 1,
          type,
          c.batch,
          c.pixels,
          p.channels,
          c.norm_groups,
          pick(p.affine, p.device_weight, p.weight),
          pick(p.affine, p.device_bias, p.bias),
          pick(p.modulated, p.device_modulation, p.modulation),
          1e-5f,
          c.silu_after ? Activation::kSilu : Activation::kNone,
          on_device ? p.qparams() : p.host_qparams(),
          p.num_bits,
          codes,
          c.hadamard};
}

std::vector<int8_t> group_norm_codes(const GroupCase& c, const Parameters& p, FloatType type,
                                     const FloatBuffer& first, const FloatBuffer& second) {
  OffsetBuffer<int8_t> codes(c.batch * c.pixels * p.channels, c.offset);
  const GroupNormQuantizeArgs args =
      group_norm_args(c, p, type, first.data(), second.data(), true, codes.data());
  DeviceBuffer<uint8_t> workspace(cuda::group_norm_quantize_workspace(args));
  cuda::group_norm_quantize(args, workspace.data(), nullptr);
  return codes.host();
}

std::vector<int8_t> cpu_codes(const GroupCase& c, const Parameters& p, FloatType type,
                              const FloatBuffer& first, const FloatBuffer& second) {
  std::vector<int8_t> codes(static_cast<size_t>(c.batch * c.pixels * p.channels));
  if (codes.empty()) return codes;
  cpu::group_norm_quantize(
      group_norm_args(c, p, type, first.input().data(), second.input().data(), false, codes.data()));
  return codes;
}

TEST(CudaGroupNormQuantize, CodesEqualTheDefinitionAndTheCpus) {
  ADPDM_REQUIRE_GPU();
  Tally tally, against_cpu;
  unsigned seed = 0;
  for (const GroupCase& c : kGroupCases) {
    for (FloatType type : kFloatTypes) {
      const Parameters p{c.channels[0] + c.channels[1], c.batch, c.num_bits, c.affine, c.modulated};
      std::vector<float> x[2];
      for (int s = 0; s < 2; ++s) {
        x[s] = random_normal(c.batch * c.pixels * c.channels[s], ++seed, 3.0f);
        for (size_t i = 0; i < x[s].size(); ++i) x[s][i] += 0.7f + static_cast<float>(i % 5);
      }
      const FloatBuffer first(x[0], type, c.offset), second(x[1], type, c.offset);
      const std::vector<float> read[2] = {decode(first.input(), type), decode(second.input(), type)};
      const std::vector<int8_t> expected = expected_codes(c, p, read, 1e-5f);
      const std::vector<int8_t> codes = group_norm_codes(c, p, type, first, second);
      tally.compare(codes, expected, static_cast<size_t>(&c - kGroupCases));
      against_cpu.compare(codes, cpu_codes(c, p, type, first, second), static_cast<size_t>(&c - kGroupCases));
      for_each_schedule([&] { EXPECT_EQ(group_norm_codes(c, p, type, first, second), codes); });
    }
  }
  tally.expect_rare();
  against_cpu.expect_rare();
}

// A mean that is 3000 deviations from 0: sums of squares about 0 would leave nothing of the variance in
// float32.
TEST(CudaGroupNormQuantize, LargeMeansDoNotCancel) {
  ADPDM_REQUIRE_GPU();
  const GroupCase c = {2, 600, {64, 0}, 8, 0, 8, true, false, false};
  const Parameters p{64, 2, 8, true, false};
  std::vector<float> x[2] = {random_normal(2 * 600 * 64, 9), {}};
  for (float& value : x[0]) value += 3000.0f;
  x[0][0] = 3050.0f;  // an origin far from the mean
  const FloatBuffer first(x[0], FloatType::kFloat32), second(std::vector<float>(), FloatType::kFloat32);
  const std::vector<int8_t> codes = group_norm_codes(c, p, FloatType::kFloat32, first, second);
  EXPECT_LE(count_different(codes, expected_codes(c, p, x, 1e-5f), 0),
            kLargeMeanShare * static_cast<double>(codes.size()));
}

TEST(CudaGroupNormQuantize, ConstantsGiveTheBias) {
  ADPDM_REQUIRE_GPU();
  const GroupCase c = {1, 50, {16, 0}, 2, 0, 8, true, false, false};
  const Parameters p{16, 1, 8, true, false};
  const FloatBuffer first(std::vector<float>(800, 2.5f), FloatType::kBFloat16),
      second(0, FloatType::kBFloat16);
  const std::vector<int8_t> codes = group_norm_codes(c, p, FloatType::kBFloat16, first, second);
  for (size_t i = 0; i < codes.size(); ++i) {
    const float bias = p.bias[i % 16], inv = 1.0f / kScale[1];
    ASSERT_EQ(codes[i], static_cast<int8_t>(quantize_value(bias, inv, 17.0f, -128.0f, 127.0f)));
  }
}

TEST(CudaGroupNormQuantize, NanAndInfinitySpoilTheirGroupAlone) {
  ADPDM_REQUIRE_GPU();
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const GroupCase c = {1, 300, {32, 0}, 4, 0, 8, true, false, true};
    const Parameters p{32, 1, 8, true, false};
    std::vector<float> x[2] = {random_normal(300 * 32, 5), {}};
    x[0][32 * 200 + 9] = bad;  // of the second group
    const FloatBuffer first(x[0], FloatType::kFloat32), second(0, FloatType::kFloat32);
    const std::vector<int8_t> codes = group_norm_codes(c, p, FloatType::kFloat32, first, second);
    x[0][32 * 200 + 9] = 0.0f;
    const std::vector<int8_t> expected = expected_codes(c, p, x, 1e-5f);
    int64_t different = 0;
    for (size_t i = 0; i < codes.size(); ++i) {
      if (i % 32 / 8 == 1) {
        ASSERT_EQ(codes[i], -128);
      } else {
        different += codes[i] != expected[i] ? 1 : 0;
      }
    }
    EXPECT_LE(different, 2);
  }
}

struct LayerCase {
  int64_t rows, channels, images, offset;
  int num_bits;
  bool affine, modulated;
  int64_t hadamard = 0;
};

const LayerCase kLayerCases[] = {{6, 320, 2, 0, 8, true, true},      {5, 1280, 1, 0, 8, true, false},
                                 {9, 768, 3, 0, 4, false, true},     {4, 77, 2, 0, 8, true, true},
                                 {3, 64, 1, 1, 8, false, false},     {0, 64, 1, 0, 8, true, false},
                                 {4, 1, 1, 0, 8, true, false},       {7, 8, 7, 0, 8, true, true},
                                 {2, 5000, 1, 0, 8, true, false},    {3, 0, 1, 0, 8, false, false},
                                 {6, 320, 2, 0, 6, true, true, 64},  {70, 64, 1, 0, 8, true, false, 64},
                                 {9, 768, 3, 1, 4, false, true, 64}, {130, 16, 2, 0, 8, true, true, 16},
                                 {3, 12, 1, 0, 8, false, false, 4},  {0, 64, 1, 0, 8, true, false, 64}};

LayerNormQuantizeArgs layer_norm_args(const LayerCase& c, const Parameters& p, FloatType type, const void* x,
                                      bool on_device, int8_t* codes) {
  const auto pick = [&](bool used, const DeviceBuffer<float>& device, const std::vector<float>& host) {
    return !used ? nullptr : (on_device ? device.data() : host.data());
  };
  return {x,
          type,
          c.rows,
          c.channels,
          pick(p.affine, p.device_weight, p.weight),
          pick(p.affine, p.device_bias, p.bias),
          pick(p.modulated, p.device_modulation, p.modulation),
          c.rows / c.images,
          1e-5f,
          on_device ? p.qparams() : p.host_qparams(),
          p.num_bits,
          codes,
          c.hadamard};
}

std::vector<int8_t> layer_norm_codes(const LayerCase& c, const Parameters& p, FloatType type,
                                     const FloatBuffer& x) {
  OffsetBuffer<int8_t> codes(c.rows * c.channels, c.offset);
  cuda::layer_norm_quantize(layer_norm_args(c, p, type, x.data(), true, codes.data()), nullptr);
  return codes.host();
}

std::vector<int8_t> cpu_codes(const LayerCase& c, const Parameters& p, FloatType type, const FloatBuffer& x) {
  std::vector<int8_t> codes(static_cast<size_t>(c.rows * c.channels));
  if (codes.empty()) return codes;
  cpu::layer_norm_quantize(layer_norm_args(c, p, type, x.input().data(), false, codes.data()));
  return codes;
}

std::vector<int8_t> expected_codes(const LayerCase& c, const Parameters& p, const std::vector<float>& x) {
  std::vector<float> values;
  for (int64_t row = 0; row < c.rows; ++row) {
    const auto first = x.begin() + row * c.channels;
    const Moments m = moments_of(std::vector<double>(first, first + c.channels), 1e-5f);
    const int64_t image = row / (c.rows / c.images);
    for (int64_t i = 0; i < c.channels; ++i) values.push_back(p.value(first[i], m, image, i, false));
  }
  return p.codes(values, c.hadamard);
}

TEST(CudaLayerNormQuantize, CodesEqualTheDefinitionAndTheCpus) {
  ADPDM_REQUIRE_GPU();
  Tally tally, against_cpu;
  unsigned seed = 50;
  for (const LayerCase& c : kLayerCases) {
    for (FloatType type : kFloatTypes) {
      const Parameters p{c.channels, c.images, c.num_bits, c.affine, c.modulated};
      const FloatBuffer x(random_normal(c.rows * c.channels, ++seed, 2.0f), type, c.offset);
      const std::vector<int8_t> codes = layer_norm_codes(c, p, type, x);
      tally.compare(codes, expected_codes(c, p, decode(x.input(), type)),
                    static_cast<size_t>(&c - kLayerCases));
      against_cpu.compare(codes, cpu_codes(c, p, type, x), static_cast<size_t>(&c - kLayerCases));
      for_each_schedule([&] { EXPECT_EQ(layer_norm_codes(c, p, type, x), codes); });
    }
  }
  tally.expect_rare();
  against_cpu.expect_rare();
}

TEST(CudaLayerNormQuantize, LargeMeansDoNotCancel) {
  ADPDM_REQUIRE_GPU();
  const LayerCase c = {4, 640, 1, 0, 8, true, false};
  const Parameters p{640, 1, 8, true, false};
  std::vector<float> values = random_normal(4 * 640, 70);
  for (float& value : values) value += 3000.0f;
  const FloatBuffer x(values, FloatType::kFloat32);
  const std::vector<int8_t> codes = layer_norm_codes(c, p, FloatType::kFloat32, x);
  EXPECT_LE(count_different(codes, expected_codes(c, p, values), 0),
            kLargeMeanShare * static_cast<double>(codes.size()));
}

}  // namespace
}  // namespace adpdm::testing
