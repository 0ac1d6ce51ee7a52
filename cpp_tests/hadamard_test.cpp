// Tests of Hadamard rotations: the definition in double, a literal case, and equal bits for every instruction
// set and number of threads.
#include "core/hadamard.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/quantize.h"
#include "elementwise_cases.h"
#include "scattered_threads.h"

namespace adpdm {
namespace {

using testing::decode;
using testing::encode;
using testing::kFloatTypes;
using testing::random_normal;
using testing::supported_isas;

struct Shape {
  int64_t rows, columns, stride, block;
};

// Fewer blocks side by side than any vector has lanes, as many, not a multiple, many; rows with gaps.
const Shape kShapes[] = {{1, 4, 4, 4},        {3, 64, 64, 64},     {2, 48, 50, 16},     {5, 64, 64, 4},
                         {4, 256, 256, 16},   {2, 320, 321, 16},   {3, 1024, 1024, 64}, {1, 1280, 1280, 64},
                         {2, 1152, 1160, 64}, {700, 320, 320, 16}, {0, 64, 64, 16},     {3, 128, 128, 64},
                         {2, 256, 256, 64},   {2, 512, 520, 64},   {2, 320, 320, 64},   {2, 640, 640, 64},
                         {2, 448, 448, 64},   {3, 16, 16, 16},     {2, 32, 32, 16},     {2, 128, 128, 16},
                         {2, 64, 70, 16},     {3, 20, 20, 4},      {2, 32, 32, 4}};

std::vector<float> rotated(const std::vector<uint8_t>& x, FloatType type, const Shape& s, cpu::Isa isa) {
  const cpu::ScopedIsa scope(isa);
  std::vector<float> y(static_cast<size_t>(s.rows * s.columns));
  cpu::hadamard({x.data(), type, s.rows, s.columns, s.stride}, s.block, y.data());
  return y;
}

// Entry (i, j) of Sylvester's matrix: -1 to the number of common bits.
double entry(int64_t i, int64_t j) { return __builtin_popcountll(static_cast<uint64_t>(i & j)) % 2 ? -1 : 1; }

TEST(Hadamard, IsTheMatrixOverItsRoot) {
  unsigned seed = 0;
  for (const Shape& s : kShapes) {
    const std::vector<uint8_t> x = encode(random_normal(s.rows * s.stride, ++seed), FloatType::kFloat32);
    const std::vector<float> values = decode(x, FloatType::kFloat32);
    const std::vector<float> y = rotated(x, FloatType::kFloat32, s, cpu::Isa::kPortable);
    const int64_t apart = s.columns / s.block;
    for (int64_t row = 0; row < std::min<int64_t>(s.rows, 3); ++row) {
      for (int64_t c = 0; c < s.columns; ++c) {
        double sum = 0;
        for (int64_t j = 0; j < s.block; ++j) {
          sum += entry(c / apart, j) * values[static_cast<size_t>(row * s.stride + c % apart + j * apart)];
        }
        const double wanted = sum / std::sqrt(static_cast<double>(s.block));
        EXPECT_NEAR(y[static_cast<size_t>(row * s.columns + c)], wanted, 2e-6) << s.columns << " " << c;
      }
    }
  }
}

TEST(Hadamard, OfFourIsTheLiteralCase) {
  const std::vector<uint8_t> x = encode({1.0f, 2.0f, 4.0f, 8.0f}, FloatType::kFloat32);
  const std::vector<float> y = rotated(x, FloatType::kFloat32, {1, 4, 4, 4}, cpu::Isa::kPortable);
  EXPECT_EQ(y, (std::vector<float>{7.5f, -2.5f, -4.5f, 1.5f}));
}

TEST(Hadamard, HasTheSameBitsForEveryInstructionSetAndType) {
  unsigned seed = 20;
  for (const Shape& s : kShapes) {
    for (FloatType type : kFloatTypes) {
      const std::vector<uint8_t> x = encode(random_normal(s.rows * s.stride, ++seed), type);
      // Of values that the type has, in float32.
      const std::vector<uint8_t> exact = encode(decode(x, type), FloatType::kFloat32);
      const std::vector<float> wanted = rotated(exact, FloatType::kFloat32, s, cpu::Isa::kPortable);
      for (cpu::Isa isa : supported_isas()) {
        EXPECT_EQ(rotated(x, type, s, isa), wanted)
            << cpu::isa_name(isa) << " " << s.columns << " " << s.block;
      }
    }
  }
}

TEST(Hadamard, CodesAreThoseOfTheRotatedRow) {
  unsigned seed = 60;
  const float scale = 0.03f;
  const int32_t zero_point = -5, group = 0;
  const GroupedQParams qparams{&scale, &zero_point, &group, 1};
  for (const Shape& s : kShapes) {
    for (FloatType type : kFloatTypes) {
      const std::vector<uint8_t> x = encode(random_normal(s.rows * s.stride, ++seed), type);
      for (cpu::Isa isa : supported_isas()) {
        const cpu::ScopedIsa scope(isa);
        const std::vector<float> y = rotated(x, type, s, isa);
        std::vector<int8_t> wanted(y.size()), codes(y.size() + 1, 77);  // nothing is written behind the last
        cpu::quantize({y.data(), FloatType::kFloat32, s.rows, s.columns, s.columns}, qparams, 6,
                      wanted.data());
        wanted.push_back(77);
        cpu::hadamard_quantize({x.data(), type, s.rows, s.columns, s.stride}, s.block, qparams, 6,
                               codes.data());
        EXPECT_EQ(codes, wanted) << cpu::isa_name(isa) << " " << s.columns << " " << s.block;
      }
    }
  }
}

TEST(Hadamard, HasTheSameBitsForEveryNumberOfThreads) {
  const Shape s = {700, 320, 330, 16};
  const std::vector<uint8_t> x = encode(random_normal(s.rows * s.stride, 9), FloatType::kBFloat16);
  const std::vector<float> wanted = rotated(x, FloatType::kBFloat16, s, cpu::Isa::kPortable);
  const testing::ScatteredThreads threads;
  EXPECT_EQ(rotated(x, FloatType::kBFloat16, s, cpu::best_isa()), wanted);
}

TEST(Hadamard, TwiceChangesNothingButByRounding) {
  const Shape s = {7, 640, 640, 16};
  const std::vector<float> x = random_normal(s.rows * s.columns, 3);
  const cpu::Isa isa = cpu::best_isa();
  const std::vector<float> once = rotated(encode(x, FloatType::kFloat32), FloatType::kFloat32, s, isa);
  const std::vector<float> twice = rotated(encode(once, FloatType::kFloat32), FloatType::kFloat32, s, isa);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(twice[i], x[i], 4e-6);
}

}  // namespace
}  // namespace adpdm
