// The tile registers of one thread and the instructions on them, as Intel's manual defines them: results bit
// for bit, and an exception wherever the CPU would raise a fault. For tests; the product does not include it.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace adpdm::cpu::amx_emulation {

constexpr int kNumTiles = 8;
constexpr int kMaxRows = 16;
constexpr int kMaxRowBytes = 64;

// A fault of the CPU: the instruction and the rule it broke.
struct Fault : std::logic_error {
  using std::logic_error::logic_error;
};

// Instructions executed, for tests of how a kernel uses the tiles.
struct Counts {
  int64_t configurations = 0;
  int64_t loads = 0;
  int64_t products = 0;
};

class TileRegisters {
 public:
  // ldtilecfg: 64 bytes of configuration.
  void configure(const void* memory) {
    uint8_t bytes[64];
    std::memcpy(bytes, memory, sizeof bytes);
    release();
    ++counts.configurations;
    if (bytes[0] == 0) return;
    check(bytes[0] == 1, "ldtilecfg: wanted palette 0 or 1");
    check(bytes[1] == 0, "ldtilecfg: a start row makes the first load or store an incomplete one");
    check(all_zero(bytes + 2, 14) && all_zero(bytes + 32, 16) && all_zero(bytes + 56, 8),
          "ldtilecfg: reserved bytes must be 0");
    for (int t = 0; t < kNumTiles; ++t) {
      const int row_bytes = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8;
      const int rows = bytes[48 + t];
      if (row_bytes > kMaxRowBytes || rows > kMaxRows || (rows == 0) != (row_bytes == 0)) {
        throw Fault("ldtilecfg: wanted up to 16 rows of up to 64 bytes, or neither, got " +
                    shape(rows, row_bytes));
      }
      tiles_[t].rows = rows;
      tiles_[t].row_bytes = row_bytes;
    }
    configured_ = true;
  }

  void release() {
    configured_ = false;
    for (Tile& tile : tiles_) tile = Tile();
  }

  void zero(int t) { std::memset(used("tilezero", t).data, 0, sizeof tiles_[t].data); }

  void load(int t, const void* memory, int64_t stride) {
    Tile& tile = used("tileloadd", t);
    ++counts.loads;
    std::memset(tile.data, 0, sizeof tile.data);
    for (int row = 0; row < tile.rows; ++row) {
      std::memcpy(tile.data[row], static_cast<const char*>(memory) + row * stride, size(tile.row_bytes));
    }
  }

  void store(int t, void* memory, int64_t stride) {
    const Tile& tile = used("tilestored", t);
    for (int row = 0; row < tile.rows; ++row) {
      std::memcpy(static_cast<char*>(memory) + row * stride, tile.data[row], size(tile.row_bytes));
    }
  }

  // tdpbssd
  void dot_s8s8(int sums, int a, int b) {
    check(sums != a && sums != b && a != b, "tdpbssd: wanted three different tiles");
    Tile& c = used("tdpbssd", sums);
    const Tile& left = used("tdpbssd", a);
    const Tile& right = used("tdpbssd", b);
    check(c.row_bytes % 4 == 0 && left.row_bytes % 4 == 0 && right.row_bytes % 4 == 0,
          "tdpbssd: wanted rows of whole 4 bytes");
    if (c.rows != left.rows || c.row_bytes != right.row_bytes || left.row_bytes / 4 != right.rows) {
      throw Fault("tdpbssd: shapes do not match: sums " + shape(c.rows, c.row_bytes) + ", A " +
                  shape(left.rows, left.row_bytes) + ", B " + shape(right.rows, right.row_bytes));
    }
    ++counts.products;
    for (int m = 0; m < c.rows; ++m) {
      uint32_t row[kMaxRowBytes / 4];  // unsigned: the CPU wraps
      std::memcpy(row, c.data[m], sizeof row);
      for (int k = 0; k < right.rows; ++k) add_products(left.data[m] + 4 * k, right.data[k], row);
      std::memset(c.data[m], 0, kMaxRowBytes);
      std::memcpy(c.data[m], row, size(c.row_bytes));
    }
    for (int m = c.rows; m < kMaxRows; ++m) std::memset(c.data[m], 0, kMaxRowBytes);
  }

  bool configured() const { return configured_; }

  Counts counts;  // kept by release()

 private:
  struct Tile {
    int rows = 0;
    int row_bytes = 0;
    int8_t data[kMaxRows][kMaxRowBytes] = {};
  };

  static size_t size(int n) { return static_cast<size_t>(n); }

  static std::string shape(int rows, int row_bytes) {
    return std::to_string(rows) + " x " + std::to_string(row_bytes);
  }

  static bool all_zero(const uint8_t* bytes, int n) {
    for (int i = 0; i < n; ++i) {
      if (bytes[i] != 0) return false;
    }
    return true;
  }

  static void check(bool holds, const char* sentence) {
    if (!holds) throw Fault(sentence);
  }

  // A tile that may be an operand.
  Tile& used(const char* instruction, int t) {
    if (!configured_) throw Fault(std::string(instruction) + ": no tiles are configured");
    if (tiles_[t].rows == 0) {
      throw Fault(std::string(instruction) + ": tile " + std::to_string(t) + " is not configured");
    }
    return tiles_[t];
  }

  static void add_products(const int8_t* quad, const int8_t* weights, uint32_t* sums) {
    for (int n = 0; n < kMaxRowBytes / 4; ++n) {
      int32_t sum = 0;
      for (int j = 0; j < 4; ++j) sum += quad[j] * weights[4 * n + j];
      sums[n] += static_cast<uint32_t>(sum);
    }
  }

  bool configured_ = false;
  Tile tiles_[kNumTiles];
};

inline TileRegisters& this_thread() {
  thread_local TileRegisters registers;
  return registers;
}

}  // namespace adpdm::cpu::amx_emulation
