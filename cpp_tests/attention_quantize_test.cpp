// Attention that ends in codes on the CPU: a literal case, the definition in double, and equal codes for
// every instruction set and number of threads.
#include "core/attention_quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "elementwise_cases.h"
#include "scattered_threads.h"

namespace adpdm {
namespace {

using testing::decode;
using testing::encode;
using testing::random_normal;
using testing::supported_isas;

struct Case {
  int64_t images = 1;
  int64_t heads = 1;
  int64_t head_size = 1;
  int64_t queries = 1;
  int64_t keys = 1;
  FloatType type = FloatType::kFloat32;
  int num_bits = 8;
  bool int8 = false;

  int64_t channels() const { return heads * head_size; }
};

// Query, key and value as bytes of the type, and as the floats those are.
struct Tensors {
  std::vector<uint8_t> bytes[3];
  std::vector<float> values[3];
  std::vector<float> scale = {1.0f, 0.02f};
  std::vector<int32_t> zero_point = {0, 3};
  int32_t group_index = 1;
};

void set(Tensors& t, int which, const std::vector<float>& values, FloatType type) {
  t.bytes[which] = encode(values, type);
  t.values[which] = decode(t.bytes[which], type);
}

Tensors random_tensors(const Case& c, unsigned seed) {
  Tensors t;
  for (int i = 0; i < 3; ++i) {
    const int64_t tokens = i == 0 ? c.queries : c.keys;
    set(t, i, random_normal(c.images * tokens * c.channels(), seed + static_cast<unsigned>(i)), c.type);
  }
  return t;
}

std::vector<int8_t> attention(const Case& c, const Tensors& t, cpu::Isa isa) {
  const cpu::ScopedIsa scope(isa);
  AttentionQuantizeArgs args{};
  args.query = {t.bytes[0].data(), c.queries * c.channels(), c.channels()};
  args.key = {t.bytes[1].data(), c.keys * c.channels(), c.channels()};
  args.value = {t.bytes[2].data(), c.keys * c.channels(), c.channels()};
  args.type = c.type;
  args.batch = c.images;
  args.heads = c.heads;
  args.head_size = c.head_size;
  args.queries = c.queries;
  args.keys = c.keys;
  args.qparams = {t.scale.data(), t.zero_point.data(), &t.group_index, 2};
  args.num_bits = c.num_bits;
  args.int8 = c.int8;
  std::vector<int8_t> codes(static_cast<size_t>(c.images * c.queries * c.channels()));
  args.codes = codes.data();
  cpu::attention_quantize(args);
  return codes;
}

// The attended value of one channel of a query, in double.
double attended(const Case& c, const Tensors& t, int64_t image, int64_t query, int64_t channel) {
  const int64_t first = channel / c.head_size * c.head_size;
  const auto at = [&](int which, int64_t tokens, int64_t token, int64_t i) {
    return static_cast<double>(
        t.values[which][static_cast<size_t>((image * tokens + token) * c.channels() + i)]);
  };
  std::vector<double> scores;
  for (int64_t key = 0; key < c.keys; ++key) {
    double score = 0;
    for (int64_t d = first; d < first + c.head_size; ++d) {
      score += at(0, c.queries, query, d) * at(1, c.keys, key, d);
    }
    scores.push_back(score / std::sqrt(static_cast<double>(c.head_size)));
  }
  const double highest = *std::max_element(scores.begin(), scores.end());
  double sum = 0, weighted = 0;
  for (int64_t key = 0; key < c.keys; ++key) {
    const double weight = std::exp(scores[static_cast<size_t>(key)] - highest);
    sum += weight;
    weighted += weight * at(2, c.keys, key, channel);
  }
  return weighted / sum;
}

// Within rounding of the sums in float32: codes differ by at most one, and only near a tie.
void expect_definition(const Case& c, unsigned seed) {
  const Tensors t = random_tensors(c, seed);
  const std::vector<int8_t> portable = attention(c, t, cpu::Isa::kPortable);
  const CodeRange range = signed_range(c.num_bits);
  size_t i = 0;
  for (int64_t image = 0; image < c.images; ++image) {
    for (int64_t query = 0; query < c.queries; ++query) {
      for (int64_t channel = 0; channel < c.channels(); ++channel, ++i) {
        const double exact = attended(c, t, image, query, channel) / static_cast<double>(t.scale[1]) + 3;
        const double clamped = std::clamp<double>(exact, range.quant_min, range.quant_max);
        EXPECT_NEAR(portable[i], clamped, 0.5 + 1e-3) << image << " " << query << " " << channel;
      }
    }
  }
  for (cpu::Isa isa : supported_isas()) EXPECT_EQ(attention(c, t, isa), portable) << cpu::isa_name(isa);
}

TEST(AttentionQuantize, HandComputed) {
  // Scores 0 and ln 3 (head size 1: no scaling), so weights 1/4 and 3/4 of values 0.4 and 0.8: 0.7 / 0.02
  // + 3.
  Case c;
  c.keys = 2;
  Tensors t;
  set(t, 0, {1.0f}, c.type);
  set(t, 1, {0.0f, std::log(3.0f)}, c.type);
  set(t, 2, {0.4f, 0.8f}, c.type);
  for (cpu::Isa isa : supported_isas()) {
    EXPECT_EQ(attention(c, t, isa), (std::vector<int8_t>{38})) << cpu::isa_name(isa);
  }
}

TEST(AttentionQuantize, MatchesDefinition) {
  unsigned seed = 0;
  for (FloatType type : testing::kFloatTypes) {
    for (int64_t head_size : {1, 15, 16, 33, 64}) {
      for (int64_t keys : {1, 31, 32, 70}) {
        Case c;
        c.images = 2;
        c.heads = 2;
        c.head_size = head_size;
        c.queries = 7;
        c.keys = keys;
        c.type = type;
        expect_definition(c, seed += 10);
      }
    }
  }
}

TEST(AttentionQuantize, FewerBits) {
  Case c;
  c.head_size = 20;
  c.queries = 5;
  c.keys = 9;
  c.num_bits = 4;
  expect_definition(c, 1);
}

TEST(AttentionQuantize, ThreadsChangeNothing) {
  Case c;
  c.heads = 2;
  c.head_size = 64;
  c.queries = 50;
  c.keys = 700;
  const Tensors t = random_tensors(c, 3);
  for (bool int8 : {false, true}) {
    c.int8 = int8;
    for (cpu::Isa isa : supported_isas()) {
      const std::vector<int8_t> serial = attention(c, t, isa);
      const testing::ScatteredThreads threads;
      EXPECT_EQ(attention(c, t, isa), serial) << cpu::isa_name(isa);
    }
  }
}

TEST(Int8Attention, HandComputed) {
  // The mean of the keys is taken out: -1 and 1, codes -127 and 127 of steps 1 / 127; the query is code 127.
  // Scores -1.2 and 1.2 (head size 1), a ratio of the weights of e^2.4 = 11.02: (0.4 + 11.02 * 0.8) / 12.02
  // = 0.767, in codes 38.4 + 3.
  Case c;
  c.keys = 2;
  c.int8 = true;
  Tensors t;
  set(t, 0, {1.2f}, c.type);
  set(t, 1, {4.0f, 6.0f}, c.type);
  set(t, 2, {0.4f, 0.8f}, c.type);
  for (cpu::Isa isa : supported_isas()) {
    EXPECT_EQ(attention(c, t, isa), (std::vector<int8_t>{41})) << cpu::isa_name(isa);
  }
}

// An exponent of 1.7 million, less log2 of 255, rounds: the largest weight must not become 256, which in a
// byte is 0.
TEST(Int8Attention, HugeScores) {
  Case c;
  c.keys = 2;
  c.int8 = true;
  Tensors t;
  set(t, 0, {1200.0f}, c.type);
  set(t, 1, {4000.0f, 6000.0f}, c.type);
  set(t, 2, {0.4f, 0.8f}, c.type);
  for (cpu::Isa isa : supported_isas()) {
    EXPECT_EQ(attention(c, t, isa), (std::vector<int8_t>{43})) << cpu::isa_name(isa);
  }
}

// A channel whose values have no finite inverse counts as zeros and leaves the others alone.
TEST(Int8Attention, DenormalChannel) {
  Case c;
  c.keys = 2;
  c.head_size = 2;
  c.int8 = true;
  Tensors t;
  set(t, 0, {0.0f, 0.0f}, c.type);
  set(t, 1, {1.0f, 2.0f, 3.0f, 4.0f}, c.type);
  set(t, 2, {0.4f, 1e-40f, 0.8f, -1e-40f}, c.type);
  for (cpu::Isa isa : supported_isas()) {
    EXPECT_EQ(attention(c, t, isa), (std::vector<int8_t>{33, 3})) << cpu::isa_name(isa);
  }
}

// Equal codes on every instruction set, and near the exact attention: 127 steps of each operand leave an
// error of a few per cent of a deviation, some codes of 0.02.
void expect_equal_codes(const Case& c, unsigned seed) {
  const Tensors t = random_tensors(c, seed);
  const std::vector<int8_t> portable = attention(c, t, cpu::Isa::kPortable);
  for (cpu::Isa isa : supported_isas()) EXPECT_EQ(attention(c, t, isa), portable) << cpu::isa_name(isa);
  size_t i = 0;
  for (int64_t image = 0; image < c.images; ++image) {
    for (int64_t query = 0; query < c.queries; ++query) {
      for (int64_t channel = 0; channel < c.channels(); ++channel, ++i) {
        const double exact = attended(c, t, image, query, channel) / static_cast<double>(t.scale[1]) + 3;
        EXPECT_NEAR(portable[i], std::clamp(exact, -128.0, 127.0), 4) << query << " " << channel;
      }
    }
  }
}

TEST(Int8Attention, EqualCodesForAllSizes) {
  unsigned seed = 0;
  for (FloatType type : testing::kFloatTypes) {
    for (int64_t head_size : {1, 3, 16, 33, 64, 70, 160}) {
      for (int64_t keys : {1, 3, 16, 17, 64, 65, 130}) {
        if (type != FloatType::kFloat32 && head_size % 16 == 0) continue;
        Case c;
        c.images = 2;
        c.heads = 2;
        c.head_size = head_size;
        c.queries = keys % 2 ? 7 : 12;
        c.keys = keys;
        c.type = type;
        c.int8 = true;
        expect_equal_codes(c, seed += 10);
      }
    }
  }
}

// More heads than are packed at a time.
TEST(Int8Attention, SeveralRounds) {
  Case c;
  c.images = 3;
  c.heads = 50;
  c.head_size = 64;
  c.queries = 2;
  c.keys = 1000;
  c.int8 = true;
  const Tensors t = random_tensors(c, 4);
  const std::vector<int8_t> all = attention(c, t, cpu::best_isa());
  for (int64_t image = 0; image < c.images; ++image) {
    Case one = c;
    one.images = 1;
    Tensors part = t;
    for (int i = 0; i < 3; ++i) {
      const auto size = static_cast<std::ptrdiff_t>(t.bytes[i].size()) / c.images;
      part.bytes[i].assign(t.bytes[i].begin() + image * size, t.bytes[i].begin() + (image + 1) * size);
    }
    const auto size = static_cast<std::ptrdiff_t>(all.size()) / c.images;
    const std::vector<int8_t> wanted(all.begin() + image * size, all.begin() + (image + 1) * size);
    EXPECT_EQ(attention(one, part, cpu::best_isa()), wanted) << image;
  }
}

TEST(AttentionQuantize, NothingToDoAndWrongGroup) {
  Case c;
  c.queries = 0;
  Tensors t = random_tensors(c, 1);
  for (bool int8 : {false, true}) {
    c.int8 = int8;
    for (cpu::Isa isa : supported_isas()) {
      EXPECT_TRUE(attention(c, t, isa).empty());
      t.group_index = 2;
      EXPECT_THROW(attention(c, t, isa), std::out_of_range);
      t.group_index = 1;
    }
  }
}

}  // namespace
}  // namespace adpdm
