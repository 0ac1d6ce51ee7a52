// The products of a warpgroup, thread by thread.
#include "simt/wgmma.h"

#include <algorithm>
#include <string>
#include <vector>

#include "simt/executor.h"

namespace adpdm::simt {

namespace {

constexpr int kWarpgroupThreads = 128;
constexpr int kRows = 64;
constexpr int kDepth = 32;
constexpr int kChunk = 16;
constexpr int kRowBytes = 128;  // of the 128-byte swizzle
constexpr int kAtomRows = 8;
constexpr int kAtomBytes = kAtomRows * kRowBytes;

struct Call {
  uint64_t a;
  uint64_t b;
  int registers;

  bool operator==(const Call& other) const {
    return a == other.a && b == other.b && registers == other.registers;
  }
};

// The accumulators of one thread, by their address.
struct Accumulators {
  const int32_t* address;
  bool fenced = false;          // since the last commit
  std::vector<int32_t> fence;   // what they held then
  int pending = 0;              // products
  std::vector<int32_t> values;  // while products are pending
};

struct ThreadState {
  std::vector<Accumulators> accumulators;
  size_t num_calls = 0;
  uint64_t num_proxy_fences = 0;

  Accumulators& at(const int32_t* address) {
    for (Accumulators& known : accumulators) {
      if (known.address == address) return known;
    }
    accumulators.push_back({});
    accumulators.back().address = address;
    return accumulators.back();
  }
};

// Who wrote 16 bytes of shared memory last, and how many proxy fences that thread had made by then.
struct Write {
  int thread = -1;
  uint64_t num_proxy_fences = 0;
};

}  // namespace

struct WgmmaState {
  std::vector<ThreadState> threads;
  std::vector<std::vector<Call>> warpgroups;  // every call, in order
  std::vector<Write> writes;                  // per 16 bytes of shared memory
};

namespace {

WgmmaState& block_state() {
  Executor& self = executor();
  if (self.wgmma_state == nullptr) {
    self.wgmma_state = std::make_shared<WgmmaState>();
    self.wgmma_state->threads.resize(static_cast<size_t>(self.num_threads()));
    self.wgmma_state->warpgroups.resize(static_cast<size_t>(self.num_threads() / kWarpgroupThreads));
    self.wgmma_state->writes.resize(static_cast<size_t>(self.shared_bytes() / kChunk + 1));
  }
  return *self.wgmma_state;
}

ThreadState& thread_state() { return block_state().threads[static_cast<size_t>(executor().thread_index())]; }

// A matrix of rows of codes in shared memory, and where the hardware finds them.
class Operand {
 public:
  Operand(uint64_t descriptor, int rows, const char* name) : name_(name) {
    start_ = static_cast<int>(descriptor & 0x3FFF) * 16;
    stride_ = static_cast<int>(descriptor >> 32 & 0x3FFF) * 16;
    check_form(descriptor);
    const int64_t end =
        start_ / kAtomBytes * int64_t{kAtomBytes} + int64_t{rows / kAtomRows - 1} * stride_ + kAtomBytes;
    if (end > executor().shared_bytes()) {
      fail("ends at byte " + std::to_string(end) + " of " + std::to_string(executor().shared_bytes()) +
           " bytes of shared memory");
    }
  }

  // 16 codes: half 0 or 1 of a row.
  const int8_t* chunk(int row, int half) const {
    const int plain = start_ + row / kAtomRows * stride_ + row % kAtomRows * kRowBytes + half * kChunk;
    const int swizzled = plain ^ (plain >> 7 & 7) << 4;
    check_proxy(swizzled);
    return reinterpret_cast<const int8_t*>(executor().shared_memory()) + swizzled;
  }

 private:
  void check_form(uint64_t descriptor) const {
    constexpr uint64_t kKnownBits =
        0x3FFF | uint64_t{0x3FFF} << 16 | uint64_t{0x3FFF} << 32 | uint64_t{3} << 62;
    if (descriptor >> 62 != 1) {
      fail("has swizzle mode " + std::to_string(descriptor >> 62) + ", wanted 1 (128 bytes)");
    }
    if ((descriptor & ~kKnownBits) != 0) fail("has bits set where wanted zeros (base offset or reserved)");
    if (start_ % kAtomBytes > kRowBytes - kDepth || start_ % kDepth != 0) {
      fail("begins " + std::to_string(start_ % kAtomBytes) +
           " bytes into an atom, wanted a multiple of 32 within the first row of 128");
    }
    if (stride_ % kAtomBytes != 0) {
      fail("has a stride of " + std::to_string(stride_) + " bytes, wanted a multiple of 1024");
    }
  }

  void check_proxy(int offset) const {
    const Write& write = block_state().writes[static_cast<size_t>(offset / kChunk)];
    if (write.thread < 0) return;
    if (block_state().threads[static_cast<size_t>(write.thread)].num_proxy_fences > write.num_proxy_fences)
      return;
    fail("holds bytes that thread " + std::to_string(write.thread) +
         " has written without fence_proxy_async after it");
  }

  [[noreturn]] void fail(const std::string& sentence) const {
    executor().fail(std::string("wgmma_s8: operand ") + name_ + " " + sentence);
  }

  const char* name_;
  int start_;   // byte in shared memory
  int stride_;  // bytes from 8 rows to the next 8
};

int32_t dot(const int8_t* x, const int8_t* y) {
  int32_t sum = 0;
  for (int i = 0; i < kChunk; ++i) sum += x[i] * y[i];
  return sum;
}

bool all_poison(const int32_t* c, int registers) {
  return std::all_of(c, c + registers, [](int32_t value) { return value == kAccumulatorPoison; });
}

void complete(const Call& call, int32_t* c) {
  Accumulators& mine = thread_state().at(c);
  const Operand a(call.a, kRows, "A"), b(call.b, 2 * call.registers, "B");
  const int thread = executor().thread_index();
  const int first_row = 16 * (thread % kWarpgroupThreads / kWarpSize) + thread % kWarpSize / 4;
  const int8_t* rows[2][2];
  for (int i = 0; i < 2; ++i) {
    for (int half = 0; half < 2; ++half) rows[i][half] = a.chunk(first_row + 8 * i, half);
  }
  for (int i = 0; i < call.registers; i += 4) {
    for (int parity = 0; parity < 2; ++parity) {
      const int column = 2 * i + 2 * (thread % 4) + parity;
      const int8_t* lower = b.chunk(column, 0);
      const int8_t* upper = b.chunk(column, 1);
      for (int e = 0; e < 2; ++e) {
        int32_t& value = mine.values[static_cast<size_t>(i + 2 * e + parity)];
        const int64_t sum = int64_t{value} + dot(rows[e][0], lower) + dot(rows[e][1], upper);
        if (sum != static_cast<int32_t>(sum)) {
          executor().fail("wgmma_s8: the sum " + std::to_string(sum) + " overflows int32");
        }
        value = static_cast<int32_t>(sum);
      }
    }
  }
  if (!all_poison(c, call.registers)) {
    executor().fail("wgmma_s8: the accumulators are written while a product is pending");
  }
  if (--mine.pending != 0) return;
  std::copy(mine.values.begin(), mine.values.end(), c);
  mine.fence = mine.values;  // a fence made in the meantime covers the results
}

// All lanes of the warp and all warps of the warpgroup must make the same calls.
void check_agreement(const Call& call) {
  Executor& self = executor();
  if (self.num_threads() % kWarpgroupThreads != 0) {
    self.fail("wgmma_s8: wanted a multiple of 128 threads, got " + std::to_string(self.num_threads()));
  }
  self.exchange("wgmma_s8", nullptr, 0);
  std::vector<Call>& calls =
      block_state().warpgroups[static_cast<size_t>(self.thread_index() / kWarpgroupThreads)];
  const size_t index = thread_state().num_calls++;
  if (index == calls.size()) calls.push_back(call);
  if (!(calls[index] == call)) {
    self.fail("wgmma_s8: this thread's descriptors or shape differ from those of its warpgroup");
  }
}

}  // namespace

void wgmma_s8(int32_t* c, int registers, uint64_t a, uint64_t b) {
  const Call call{a, b, registers};
  check_agreement(call);
  Accumulators& mine = thread_state().at(c);
  if (!mine.fenced) executor().fail("wgmma_s8: wanted wgmma_fence before the first product of a group");
  if (mine.pending == 0) {
    if (!std::equal(c, c + registers, mine.fence.begin(), mine.fence.end())) {
      executor().fail("wgmma_s8: the accumulators are written after wgmma_fence");
    }
    mine.values.assign(c, c + registers);
    std::fill_n(c, registers, kAccumulatorPoison);
  }
  ++mine.pending;
  executor().add_async(Async::kMatrix, [call, c] { complete(call, c); });
}

void wgmma_fence(const int32_t* c, int registers) {
  Accumulators& mine = thread_state().at(c);
  mine.fenced = true;
  mine.fence.assign(c, c + registers);
}

void wgmma_commit() {
  executor().commit_async(Async::kMatrix);
  for (Accumulators& known : thread_state().accumulators) known.fenced = false;
}

void fence_proxy_async() { ++thread_state().num_proxy_fences; }

void note_shared_write(const void* p, int bytes) {
  WgmmaState& state = block_state();
  const int thread = executor().thread_index();
  const auto offset = static_cast<const unsigned char*>(p) - executor().shared_memory();
  for (auto i = offset / kChunk; i <= (offset + bytes - 1) / kChunk; ++i) {
    state.writes[static_cast<size_t>(i)] = {thread,
                                            state.threads[static_cast<size_t>(thread)].num_proxy_fences};
  }
}

}  // namespace adpdm::simt
