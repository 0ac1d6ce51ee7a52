// Matrix loads, matrix products and asynchronous copies of the emulated warp.
#include "simt/warp_ops.h"

#include <limits>
#include <string>

#include "simt/wgmma.h"

namespace adpdm::simt {
namespace {

// Sum of the products of the 4 s8 in two registers.
struct DotS8 {
  int32_t operator()(uint32_t a, uint32_t b) const {
    int32_t sum = 0;
    for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
  }
};

// Sum of the products of the 8 s4 in two registers.
struct DotS4 {
  static int32_t element(uint32_t word, int i) { return static_cast<int32_t>(word << (28 - 4 * i)) >> 28; }

  int32_t operator()(uint32_t a, uint32_t b) const {
    int32_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += element(a, i) * element(b, i);
    return sum;
  }
};

// Fragments of m16n8 products with 32-bit registers: with group = lane / 4 and quarter = lane % 4, lane holds
// A rows {group, group + 8} in a[0], a[1], the second half of k in a[2], a[3]; column `group` of B; and of C,
// rows {group, group + 8} x columns {2 * quarter, 2 * quarter + 1}.
template <typename Dot>
void mma(const char* name, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Dot dot) {
  const uint32_t message[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Messages& messages = executor().exchange(name, message, sizeof message);
  const auto registers = [&](int lane) {
    return reinterpret_cast<const uint32_t*>(messages[static_cast<size_t>(lane)].bytes);
  };
  const int lane = executor().thread_index() % kWarpSize;
  const int group = lane / 4, quarter = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2, column = 2 * quarter + i % 2;
    int64_t sum = c[i];
    for (int k = 0; k < 4; ++k) {
      const uint32_t* row = registers(group * 4 + k);
      const uint32_t* col = registers(column * 4 + k);
      sum += dot(row[lower], col[4]) + dot(row[lower + 2], col[5]);
    }
    if (sum != static_cast<int32_t>(sum)) {
      executor().fail(std::string(name) + ": the sum " + std::to_string(sum) + " overflows int32");
    }
    c[i] = static_cast<int32_t>(sum);
  }
}

}  // namespace

void copy_async16(void* shared, const void* global) {
  Executor& self = executor();
  self.check_shared(shared, 16, "copy_async16 to shared memory");
  self.check_global(global, 16, "copy_async16 from global memory", GlobalAccess::kRead);
  std::memset(shared, kCopyPoison, 16);
  self.add_async(Async::kCopy, [shared, global] {
    std::memcpy(shared, global, 16);
    note_shared_write(shared, 16);
  });
}

void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  Executor& self = executor();
  self.check_shared(shared_row, 16, "load_matrix_x4");
  const Messages& messages = self.exchange("load_matrix_x4", &shared_row, sizeof shared_row);
  const size_t lane = static_cast<size_t>(self.thread_index() % kWarpSize);
  for (size_t i = 0; i < 4; ++i) {
    const unsigned char* row;
    std::memcpy(&row, messages[8 * i + lane / 4].bytes, sizeof row);
    std::memcpy(&r[i], row + 4 * (lane % 4), 4);
  }
}

void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma("mma_s8", c, a, b, DotS8());
}

void mma_s4(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma("mma_s4", c, a, b, DotS4());
}

}  // namespace adpdm::simt
