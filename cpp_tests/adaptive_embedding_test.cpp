// The embedding of timestep and class and its rows on the CPU: literal values, the definition in double, and
// equal bits for every instruction set and number of threads.
#include "core/adaptive_embedding.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "elementwise_cases.h"
#include "scattered_threads.h"

namespace adpdm {
namespace {

using testing::random_normal;
using testing::supported_isas;

struct Layer {
  std::vector<float> weight, bias;
  int64_t outputs, columns;

  Layer(int64_t outputs_, int64_t columns_, unsigned seed)
      : weight(random_normal(outputs_ * columns_, seed, 0.2f)),
        bias(random_normal(outputs_, seed + 1)),
        outputs(outputs_),
        columns(columns_) {}

  DenseLayer view(bool has_bias = true) const {
    return {weight.data(), has_bias ? bias.data() : nullptr, outputs, columns};
  }
};

struct Sizes {
  int64_t rows, columns, hidden, channels;
};
constexpr Sizes kSizes[] = {{1, 1, 1, 1},    {1, 256, 128, 128}, {3, 20, 17, 5},
                            {4, 16, 32, 48}, {9, 40, 33, 64},    {5, 7, 130, 19}};

std::vector<float> embedding(const std::vector<float>& waves, int64_t wave_rows, const Layer& first,
                             const Layer& second, const std::vector<float>& table,
                             const std::vector<int64_t>& labels, cpu::Isa isa, bool has_bias = true) {
  const cpu::ScopedIsa scope(isa);
  const auto rows = static_cast<int64_t>(labels.size());
  std::vector<float> result(static_cast<size_t>(rows * second.outputs), NAN);
  cpu::timestep_embedding({waves.data(), wave_rows, first.view(has_bias), second.view(has_bias), table.data(),
                           labels.data(), static_cast<int64_t>(table.size()) / second.outputs, rows,
                           result.data()});
  return result;
}

std::vector<float> silu_linear_of(const std::vector<float>& x, int64_t rows, const Layer& layer,
                                  cpu::Isa isa) {
  const cpu::ScopedIsa scope(isa);
  std::vector<float> result(static_cast<size_t>(rows * layer.outputs), NAN);
  cpu::silu_linear({x.data(), rows, layer.view(), result.data()});
  return result;
}

// modulation and gate of both parts, one after the other.
std::vector<std::vector<float>> rows_of(const std::vector<float>& x, int64_t rows, const Layer& layer,
                                        cpu::Isa isa) {
  const cpu::ScopedIsa scope(isa);
  const int64_t channels = layer.outputs / kAdaptiveParts;
  std::vector<std::vector<float>> parts;
  for (int64_t width : {2, 1, 2, 1}) parts.emplace_back(static_cast<size_t>(rows * width * channels), NAN);
  cpu::adaptive_rows(
      {x.data(), rows, layer.view(), {parts[0].data(), parts[2].data()}, {parts[1].data(), parts[3].data()}});
  return parts;
}

double silu_of(double x) { return x / (1 + std::exp(-x)); }

// silu of a row of x.
std::vector<double> silu_row(const std::vector<float>& x, int64_t row, int64_t columns) {
  std::vector<double> result;
  for (int64_t k = 0; k < columns; ++k) {
    result.push_back(silu_of(static_cast<double>(x[static_cast<size_t>(row * columns + k)])));
  }
  return result;
}

double product(const Layer& layer, const double* x, int64_t output) {
  double sum = layer.bias[static_cast<size_t>(output)];
  for (int64_t k = 0; k < layer.columns; ++k) {
    sum += static_cast<double>(layer.weight[static_cast<size_t>(output * layer.columns + k)]) * x[k];
  }
  return sum;
}

TEST(TimestepEmbedding, HandComputed) {
  Layer first(2, 2, 0), second(1, 2, 0);
  first.weight = {1, 0, 0, 1};
  first.bias = {0, -100};  // silu(-100 + 0) is 0
  second.weight = {4, 1};
  second.bias = {0.5f};
  for (cpu::Isa isa : supported_isas()) {
    const auto result = embedding({0, 0}, 1, first, second, {10, 20}, {1, 0, 1}, isa);
    EXPECT_EQ(result, (std::vector<float>{20.5f, 10.5f, 20.5f})) << cpu::isa_name(isa);
    EXPECT_EQ(embedding({0, 0}, 1, first, second, {10, 20}, {0}, isa, false), std::vector<float>{10.0f});
  }
}

TEST(TimestepEmbedding, MatchesDefinitionOnEveryInstructionSet) {
  for (const Sizes& s : kSizes) {
    const Layer first(s.hidden, s.columns, 3), second(s.channels, s.hidden, 5);
    const std::vector<float> waves = random_normal(s.rows * s.columns, 7);
    const std::vector<float> table = random_normal(3 * s.channels, 8);
    std::vector<int64_t> labels;
    for (int64_t r = 0; r < s.rows; ++r) labels.push_back(r % 3);
    const auto actual = embedding(waves, s.rows, first, second, table, labels, cpu::Isa::kPortable);
    for (cpu::Isa isa : supported_isas()) {
      EXPECT_EQ(embedding(waves, s.rows, first, second, table, labels, isa), actual) << cpu::isa_name(isa);
    }
    for (int64_t r = 0; r < s.rows; ++r) {
      std::vector<double> x(waves.begin() + r * s.columns, waves.begin() + (r + 1) * s.columns), hidden;
      for (int64_t h = 0; h < s.hidden; ++h) hidden.push_back(silu_of(product(first, x.data(), h)));
      for (int64_t c = 0; c < s.channels; ++c) {
        const double wanted = product(second, hidden.data(), c) +
                              static_cast<double>(table[static_cast<size_t>(r % 3 * s.channels + c)]);
        EXPECT_NEAR(static_cast<double>(actual[static_cast<size_t>(r * s.channels + c)]), wanted, 2e-5);
      }
    }
  }
}

TEST(TimestepEmbedding, EqualWavesGiveWhatOneRowGives) {
  const Layer first(32, 16, 1), second(24, 32, 2);
  const std::vector<float> waves = random_normal(16, 3), table = random_normal(2 * 24, 4);
  std::vector<float> twice = waves;
  twice.insert(twice.end(), waves.begin(), waves.end());
  for (cpu::Isa isa : supported_isas()) {
    const auto once = embedding(waves, 1, first, second, table, {1, 0}, isa);
    EXPECT_EQ(embedding(twice, 2, first, second, table, {1, 0}, isa), once);
    twice.back() += 1;
    EXPECT_NE(embedding(twice, 2, first, second, table, {1, 0}, isa), once);
    twice.back() = waves.back();
  }
}

TEST(TimestepEmbedding, WithoutATableIsThatOfClassesOfZeros) {
  const Layer first(32, 16, 1), second(24, 32, 2);
  const std::vector<float> waves = random_normal(3 * 16, 3);
  for (cpu::Isa isa : supported_isas()) {
    const auto wanted = embedding(waves, 3, first, second, std::vector<float>(24), {0, 0, 0}, isa);
    const cpu::ScopedIsa scope(isa);
    std::vector<float> result(3 * 24, NAN);
    cpu::timestep_embedding(
        {waves.data(), 3, first.view(), second.view(), nullptr, nullptr, 0, 3, result.data()});
    EXPECT_EQ(result, wanted) << cpu::isa_name(isa);
  }
}

TEST(TimestepEmbedding, RefusesLabelsOutsideTheTable) {
  const Layer first(2, 2, 1), second(2, 2, 2);
  for (int64_t label : {-1, 3}) {
    EXPECT_THROW(embedding({1, 2}, 1, first, second, std::vector<float>(6), {0, label}, cpu::Isa::kPortable),
                 std::out_of_range);
  }
  EXPECT_TRUE(embedding({1, 2}, 1, first, second, std::vector<float>(6), {}, cpu::Isa::kPortable).empty());
}

TEST(SiluLinear, MatchesDefinitionOnEveryInstructionSet) {
  for (const Sizes& s : kSizes) {
    const Layer layer(s.channels, s.hidden, 3);
    const std::vector<float> x = random_normal(s.rows * s.hidden, 7);
    const auto actual = silu_linear_of(x, s.rows, layer, cpu::Isa::kPortable);
    for (cpu::Isa isa : supported_isas()) EXPECT_EQ(silu_linear_of(x, s.rows, layer, isa), actual);
    for (int64_t r = 0; r < s.rows; ++r) {
      const std::vector<double> hidden = silu_row(x, r, s.hidden);
      for (int64_t c = 0; c < s.channels; ++c) {
        EXPECT_NEAR(static_cast<double>(actual[static_cast<size_t>(r * s.channels + c)]),
                    product(layer, hidden.data(), c), 2e-5);
      }
    }
  }
}

TEST(SiluLinear, EqualRowsGiveWhatOneRowGives) {
  const Layer layer(24, 40, 2);
  const std::vector<float> row = random_normal(40, 3);
  std::vector<float> rows;
  for (int r = 0; r < 3; ++r) rows.insert(rows.end(), row.begin(), row.end());
  for (cpu::Isa isa : supported_isas()) {
    const auto once = silu_linear_of(row, 1, layer, isa);
    std::vector<float> thrice;
    for (int r = 0; r < 3; ++r) thrice.insert(thrice.end(), once.begin(), once.end());
    EXPECT_EQ(silu_linear_of(rows, 3, layer, isa), thrice) << cpu::isa_name(isa);
    rows.back() += 1;
    EXPECT_NE(silu_linear_of(rows, 3, layer, isa), thrice);
    rows.back() = row.back();
  }
}

TEST(AdaptiveRows, EqualRowsGiveWhatOneRowGives) {
  const Layer layer(kAdaptiveParts * 5, 40, 2);
  const std::vector<float> row = random_normal(40, 3);
  std::vector<float> rows = row;
  rows.insert(rows.end(), row.begin(), row.end());
  for (cpu::Isa isa : supported_isas()) {
    const auto once = rows_of(row, 1, layer, isa), twice = rows_of(rows, 2, layer, isa);
    for (size_t part = 0; part < once.size(); ++part) {
      std::vector<float> wanted = once[part];
      wanted.insert(wanted.end(), once[part].begin(), once[part].end());
      EXPECT_EQ(twice[part], wanted) << cpu::isa_name(isa);
    }
  }
}

TEST(AdaptiveRows, MatchDefinitionOnEveryInstructionSet) {
  for (const Sizes& s : kSizes) {
    const Layer layer(kAdaptiveParts * s.channels, s.hidden, 3);
    const std::vector<float> x = random_normal(s.rows * s.hidden, 7);
    const auto actual = rows_of(x, s.rows, layer, cpu::Isa::kPortable);
    for (cpu::Isa isa : supported_isas()) EXPECT_EQ(rows_of(x, s.rows, layer, isa), actual);
    for (int64_t r = 0; r < s.rows; ++r) {
      const std::vector<double> hidden = silu_row(x, r, s.hidden);
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t p = 0; p < kAdaptiveParts; ++p) {  // shift, scale, gate, twice
          const std::vector<float>& rows = actual[static_cast<size_t>(p / 3 * 2 + (p % 3 == 2))];
          const int64_t at = p % 3 == 2 ? r * s.channels + c : (2 * r + (p % 3 == 0)) * s.channels + c;
          EXPECT_NEAR(static_cast<double>(rows[static_cast<size_t>(at)]),
                      product(layer, hidden.data(), p * s.channels + c), 2e-5);
        }
      }
    }
  }
}

TEST(AdaptiveRows, ThreadsChangeNothing) {
  const Layer layer(kAdaptiveParts * 257, 300, 3);
  const std::vector<float> x = random_normal(6 * 300, 7);
  for (cpu::Isa isa : supported_isas()) {
    const auto serial = rows_of(x, 6, layer, isa);
    const testing::ScatteredThreads threads;
    EXPECT_EQ(rows_of(x, 6, layer, isa), serial) << cpu::isa_name(isa);
  }
}

}  // namespace
}  // namespace adpdm
