// The emulated tile instructions: results as Intel's manual defines them, and a fault for every misuse.
#include "cpu/amx_emulation.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace adpdm::cpu::amx_emulation {
namespace {

using Config = std::vector<uint8_t>;

void shape(Config& config, int tile, int rows, int row_bytes) {
  config[16 + 2 * tile] = static_cast<uint8_t>(row_bytes & 0xff);
  config[17 + 2 * tile] = static_cast<uint8_t>(row_bytes >> 8);
  config[48 + tile] = static_cast<uint8_t>(rows);
}

// Sums in tile 0 [m][n], A in tile 1 [m][4 k], B in tile 2 [k][4 n].
Config product_config(int m, int k, int n) {
  Config config(64);
  config[0] = 1;
  shape(config, 0, m, 4 * n);
  shape(config, 1, m, 4 * k);
  shape(config, 2, k, 4 * n);
  return config;
}

template <typename Body>
std::string fault_of(const Body& body) {
  try {
    body();
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "";
}

TEST(AmxEmulation, ProductMatchesDefinitionForEveryShape) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> byte(-128, 127);
  for (const auto& [m, k, n] : {std::array{16, 16, 16}, {1, 1, 1}, {3, 16, 16}, {16, 5, 16}, {7, 9, 2}}) {
    std::vector<int8_t> a(m * k * 4), b(k * n * 4);
    for (int8_t& x : a) x = static_cast<int8_t>(byte(random));
    for (int8_t& x : b) x = static_cast<int8_t>(byte(random));
    TileRegisters tiles;
    tiles.configure(product_config(m, k, n).data());
    tiles.load(1, a.data(), 4 * k);
    tiles.load(2, b.data(), 4 * n);
    tiles.dot_s8s8(0, 1, 2);
    tiles.dot_s8s8(0, 1, 2);
    std::vector<int32_t> sums(m * n);
    tiles.store(0, sums.data(), 4 * n);
    for (int i = 0; i < m * n; ++i) {
      int32_t wanted = 0;
      for (int c = 0; c < 4 * k; ++c) {
        wanted += a[i / n * 4 * k + c] * b[c / 4 * 4 * n + i % n * 4 + c % 4];
      }
      ASSERT_EQ(sums[i], 2 * wanted) << m << " " << k << " " << n << " " << i;
    }
  }
}

TEST(AmxEmulation, SumsWrap) {
  TileRegisters tiles;
  tiles.configure(product_config(1, 1, 1).data());
  const int32_t largest = INT32_MAX;
  const int8_t ones[4] = {1, 0, 0, 0};
  tiles.load(0, &largest, 4);
  tiles.load(1, ones, 4);
  tiles.load(2, ones, 4);
  tiles.dot_s8s8(0, 1, 2);
  int32_t sum = 0;
  tiles.store(0, &sum, 4);
  EXPECT_EQ(sum, INT32_MIN);
}

TEST(AmxEmulation, ConfiguringZeroesTilesAndReleasingForgetsThem) {
  TileRegisters tiles;
  const Config config = product_config(2, 1, 1);
  tiles.configure(config.data());
  int32_t sums[2] = {5, 6};
  tiles.load(0, sums, 4);
  tiles.configure(config.data());
  tiles.store(0, sums, 4);
  EXPECT_EQ(sums[0], 0);
  EXPECT_EQ(sums[1], 0);
  EXPECT_TRUE(tiles.configured());
  tiles.release();
  EXPECT_FALSE(tiles.configured());
  EXPECT_EQ(fault_of([&] { tiles.zero(0); }), "tilezero: no tiles are configured");
}

TEST(AmxEmulation, LoadsAndStoresTouchTheConfiguredRowsOnly) {
  TileRegisters tiles;
  tiles.configure(product_config(2, 1, 1).data());
  const int32_t from[4] = {1, 2, 3, 4};
  int32_t to[4] = {9, 9, 9, 9};
  tiles.load(0, from, 8);
  tiles.store(0, to, 4);
  EXPECT_EQ((std::vector<int32_t>(to, to + 4)), (std::vector<int32_t>{1, 3, 9, 9}));
}

TEST(AmxEmulation, BadConfigurationsFault) {
  const auto fault = [](int at, uint8_t value) {
    Config config = product_config(16, 16, 16);
    config[at] = value;
    TileRegisters tiles;
    const std::string what = fault_of([&] { tiles.configure(config.data()); });
    EXPECT_FALSE(!what.empty() && tiles.configured());
    return what;
  };
  EXPECT_EQ(fault(0, 1), "");
  EXPECT_EQ(fault(0, 2), "ldtilecfg: wanted palette 0 or 1");
  EXPECT_EQ(fault(1, 1), "ldtilecfg: a start row makes the first load or store an incomplete one");
  for (int reserved : {2, 15, 32, 47, 56, 63}) {
    EXPECT_EQ(fault(reserved, 1), "ldtilecfg: reserved bytes must be 0") << reserved;
  }
  const std::string sizes = "ldtilecfg: wanted up to 16 rows of up to 64 bytes, or neither, got ";
  EXPECT_EQ(fault(48, 17), sizes + "17 x 64");
  EXPECT_EQ(fault(48, 0), sizes + "0 x 64");
  EXPECT_EQ(fault(16, 65), sizes + "16 x 65");
  EXPECT_EQ(fault(17, 1), sizes + "16 x 320");
  EXPECT_EQ(fault(16, 0), sizes + "16 x 0");
}

TEST(AmxEmulation, MisuseFaults) {
  TileRegisters tiles;
  const int8_t data[64] = {};
  EXPECT_EQ(fault_of([&] { tiles.load(1, data, 4); }), "tileloadd: no tiles are configured");
  tiles.configure(Config(64).data());  // palette 0 is the released state
  EXPECT_EQ(fault_of([&] { tiles.dot_s8s8(0, 1, 2); }), "tdpbssd: no tiles are configured");
  tiles.configure(product_config(3, 2, 4).data());
  EXPECT_EQ(fault_of([&] { tiles.load(3, data, 4); }), "tileloadd: tile 3 is not configured");
  EXPECT_EQ(fault_of([&] { tiles.dot_s8s8(0, 1, 1); }), "tdpbssd: wanted three different tiles");
  EXPECT_EQ(fault_of([&] { tiles.dot_s8s8(0, 2, 1); }),
            "tdpbssd: shapes do not match: sums 3 x 16, A 2 x 16, B 3 x 8");
  Config config = product_config(3, 2, 4);
  shape(config, 2, 1, 16);  // fewer channels than A
  tiles.configure(config.data());
  EXPECT_EQ(fault_of([&] { tiles.dot_s8s8(0, 1, 2); }),
            "tdpbssd: shapes do not match: sums 3 x 16, A 3 x 8, B 1 x 16");
  shape(config, 1, 3, 6);
  tiles.configure(config.data());
  EXPECT_EQ(fault_of([&] { tiles.dot_s8s8(0, 1, 2); }), "tdpbssd: wanted rows of whole 4 bytes");
}

}  // namespace
}  // namespace adpdm::cpu::amx_emulation
