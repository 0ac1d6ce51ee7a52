// Tests of the host executor: right kernels give the right numbers, and every detector finds a wrong kernel.
#include "simt/executor.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/device_memory.h"
#include "cuda/launch.cuh"

namespace adpdm {
namespace {

using namespace adpdm::cuda;
using testing::DeviceBuffer;

void run(int threads, int64_t shared_bytes, const std::function<void()>& body, simt::Dim3 grid = {}) {
  simt::executor().launch({"op", grid, threads, shared_bytes}, body);
}

// The message of the error that the kernel ends with.
std::string fault(int threads, int64_t shared_bytes, const std::function<void()>& body) {
  try {
    run(threads, shared_bytes, body);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

// ---- right kernels ----

TEST(Executor, RunsEveryThreadOfEveryBlockOnce) {
  DeviceBuffer<int32_t> counts(std::vector<int32_t>(2 * 3 * 2 * 64, 0));
  const auto body = [&] {
    const int64_t block = (block_z() * grid_y() + block_y()) * grid_x() + block_x();
    EXPECT_EQ(grid_z(), 2);
    atomic_add(counts.data() + block * num_threads() + warp_index() * 32 + lane_index(), 1);
  };
  run(64, 0, body, {2, 3, 2});
  EXPECT_EQ(counts.host(), std::vector<int32_t>(2 * 3 * 2 * 64, 1));
}

TEST(Executor, ShufflesMoveValuesBetweenLanes) {
  DeviceBuffer<double> xored(32);
  DeviceBuffer<int32_t> down(32);
  run(32, 0, [&] {
    store(xored.data() + lane_index(), shuffle_xor(lane_index() + 0.5, 5));
    store(down.data() + lane_index(), shuffle_down(lane_index(), 3));
  });
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(xored.host()[static_cast<size_t>(lane)], (lane ^ 5) + 0.5);
    EXPECT_EQ(down.host()[static_cast<size_t>(lane)], lane < 29 ? lane + 3 : lane);
  }
}

TEST(Executor, BarrierMakesSharedMemoryVisible) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const simt::ScopedOptions scope({seed, true});
    DeviceBuffer<int32_t> reversed(128);
    run(128, 512, [&] {
      auto* shared = reinterpret_cast<int32_t*>(shared_memory());
      shared_store(shared + thread_index(), thread_index());
      block_barrier();
      store(reversed.data() + thread_index(), shared_load(shared + 127 - thread_index()));
    });
    std::vector<int32_t> expected(128);
    std::iota(expected.rbegin(), expected.rend(), 0);
    EXPECT_EQ(reversed.host(), expected);
  }
}

TEST(Executor, WarpsRunInAnOrderThatTheSeedChanges) {
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const simt::ScopedOptions scope({seed, true});
    std::vector<int> order, again;
    run(128, 0, [&] { order.push_back(thread_index()); });
    run(128, 0, [&] { again.push_back(thread_index()); });
    EXPECT_EQ(order, again);
    orders.insert(order);
  }
  EXPECT_GT(orders.size(), 3u);
}

TEST(Executor, SharedMemoryIsPoisonedForEveryBlock) {
  const auto body = [&] {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(shared_memory()) % 1024, 0u);
    auto* word = reinterpret_cast<uint32_t*>(shared_memory()) + thread_index();
    EXPECT_EQ(shared_load(word), 0xEEEEEEEEu);
    shared_store(word, 0u);
  };
  run(32, 128, body, {3, 1, 1});
}

TEST(Executor, LoadMatrixDistributesRowsOfFourMatrices) {
  std::vector<int32_t> seen(32 * 4);
  run(32, 512, [&] {
    const int lane = lane_index();
    auto* row = shared_memory() + 16 * lane;  // row lane % 8 of matrix lane / 8
    for (int i = 0; i < 4; ++i) shared_store(reinterpret_cast<int32_t*>(row) + i, 4 * lane + i);
    warp_barrier();
    uint32_t r[4];
    load_matrix_x4(r, row);
    for (int i = 0; i < 4; ++i) seen[static_cast<size_t>(4 * lane + i)] = static_cast<int32_t>(r[i]);
  });
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i)
      EXPECT_EQ(seen[static_cast<size_t>(4 * lane + i)], 4 * (8 * i + lane / 4) + lane % 4);
  }
}

// c [16, 8] of a warp's product of random codes by the fragments the PTX manual draws, and by a plain loop.
void expect_product(int num_bits,
                    const std::function<void(int32_t (&)[4], uint32_t (&)[4], uint32_t (&)[2])>& mma) {
  const int per_register = 32 / num_bits, depth = 8 * per_register;
  std::mt19937 engine(7);
  std::uniform_int_distribution<int> code(-(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1);
  std::vector<int> a(static_cast<size_t>(16 * depth)),
      b(static_cast<size_t>(8 * depth));  // [16, depth], [8, depth]
  for (int& x : a) x = code(engine);
  for (int& x : b) x = code(engine);
  const auto pack = [&](const std::vector<int>& matrix, int row, int k) {
    uint32_t word = 0;
    for (int i = 0; i < per_register; ++i) {
      const auto bits = static_cast<uint32_t>(matrix[static_cast<size_t>(row * depth + k + i)]);
      word |= (bits & ((1u << num_bits) - 1)) << (num_bits * i);
    }
    return word;
  };
  std::vector<int> c(16 * 8);
  run(32, 0, [&] {
    const int group = lane_index() / 4, quarter = lane_index() % 4;
    const int k = quarter * per_register, half = depth / 2;
    uint32_t ra[4] = {pack(a, group, k), pack(a, group + 8, k), pack(a, group, k + half),
                      pack(a, group + 8, k + half)};
    uint32_t rb[2] = {pack(b, group, k), pack(b, group, k + half)};
    int32_t rc[4] = {1, 2, 3, 4};
    mma(rc, ra, rb);
    for (int i = 0; i < 4; ++i)
      c[static_cast<size_t>((group + i / 2 * 8) * 8 + 2 * quarter + i % 2)] = rc[i] - i - 1;
  });
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      const auto first = a.begin() + row * depth;
      EXPECT_EQ(c[static_cast<size_t>(row * 8 + column)],
                std::inner_product(first, first + depth, b.begin() + column * depth, 0));
    }
  }
}

TEST(Executor, MmaS8IsAMatrixProduct) {
  expect_product(8, [](auto& c, auto& a, auto& b) { mma_s8(c, a, b); });
}

TEST(Executor, MmaS4IsAMatrixProduct) {
  expect_product(4, [](auto& c, auto& a, auto& b) { mma_s4(c, a, b); });
}

// ---- asynchronous copies ----

// What shared memory holds after each step of a copy of two groups of 16 bytes, one byte each.
std::vector<int> copy_in_steps(bool late) {
  const simt::ScopedOptions scope({1, late});
  DeviceBuffer<unsigned char> source(std::vector<unsigned char>(32, 7));
  std::vector<int> seen;
  run(32, 32, [&] {
    if (thread_index() != 0) return;
    const auto look = [&] {
      seen.push_back(shared_memory()[0]);
      seen.push_back(shared_memory()[16]);
    };
    for (int i = 0; i < 32; i += 16) {
      copy_async16(shared_memory() + i, source.data() + i);
      copy_async_commit();
    }
    look();
    copy_async_wait<1>();
    look();
    copy_async_wait<0>();
    look();
  });
  return seen;
}

TEST(Executor, LateCopiesShowPoisonUntilTheirGroupIsWaitedFor) {
  EXPECT_EQ(copy_in_steps(true), (std::vector<int>{0xCD, 0xCD, 7, 0xCD, 7, 7}));
}

TEST(Executor, EagerCopiesAreThereAtOnce) {
  EXPECT_EQ(copy_in_steps(false), (std::vector<int>{7, 7, 7, 7, 7, 7}));
}

TEST(Executor, FindsCopiesThatAreNeverWaitedFor) {
  DeviceBuffer<Bytes16> source(1);
  EXPECT_EQ(
      fault(32, 512, [&] { copy_async16(shared_memory() + 16 * thread_index(), source.data()); }),
      "op: block (0, 0, 0), thread 0: it leaves the kernel with asynchronous operations not waited for");
}

TEST(Executor, FindsCopiesFromOutside) {
  DeviceBuffer<Bytes16> source(2);
  const auto body = [&] {
    copy_async16(shared_memory(), source.data() + thread_index());
    copy_async_commit();
    copy_async_wait<0>();
  };
  EXPECT_EQ(fault(32, 512, body),
            "op: block (0, 0, 0), thread 2: copy_async16 from global memory of 16 bytes is out of bounds of "
            "global memory: it begins 32 bytes into a buffer of 32");
}

// ---- wrong kernels ----

TEST(Executor, FindsGlobalAccessBehindABuffer) {
  DeviceBuffer<float> x(40);
  EXPECT_EQ(fault(64, 0, [&] { store(x.data() + thread_index(), 1.0f); }),
            "op: block (0, 0, 0), thread 40: store of 4 bytes is out of bounds of global memory: it begins "
            "160 bytes into a "
            "buffer of 160");
}

TEST(Executor, FindsGlobalAccessThatStraddlesTheEnd) {
  DeviceBuffer<float> x(std::vector<float>(6));
  const std::string message =
      fault(32, 0, [&] { load(reinterpret_cast<const Bytes16*>(x.data()) + thread_index()); });
  EXPECT_NE(message.find("thread 1: load of 16 bytes is out of bounds"), std::string::npos) << message;
}

TEST(Executor, FindsGlobalAccessBeforeABuffer) {
  DeviceBuffer<float> x(4);
  const std::string message = fault(32, 0, [&] { load(x.data() - 1); });
  EXPECT_NE(message.find("it begins 4 bytes before a buffer of 16"), std::string::npos) << message;
}

TEST(Executor, FindsMemoryThatIsNotRegistered) {
  const std::vector<float> x(1);
  const std::string message = fault(32, 0, [&] { load(x.data()); });
  EXPECT_NE(message.find("load of 4 bytes is out of bounds of global memory"), std::string::npos) << message;
}

TEST(Executor, FindsMisalignedGlobalAccess) {
  DeviceBuffer<float> x(8);
  EXPECT_EQ(fault(32, 0, [&] { load(reinterpret_cast<const Bytes8*>(x.data() + 1)); }),
            "op: block (0, 0, 0), thread 0: load of 8 bytes is misaligned: its address is 4 modulo 8");
}

TEST(Executor, FindsReadOnlyLoadsOfWhatTheLaunchWrites) {
  DeviceBuffer<int32_t> x(std::vector<int32_t>(64, 1));
  const std::string reason =
      " of 4 bytes: this launch both writes them and reads them by load(), whose data must not change; use "
      "load_coherent()";
  EXPECT_EQ(fault(32, 0, [&] { store(x.data() + thread_index(), load(x.data() + thread_index())); }),
            "op: block (0, 0, 0), thread 0: store" + reason);
  EXPECT_EQ(fault(32, 0,
                  [&] {
                    store(x.data() + thread_index(), 2);
                    load(x.data() + thread_index());
                  }),
            "op: block (0, 0, 0), thread 0: load" + reason);
}

TEST(Executor, AllowsReadingAndWritingDifferentElementsAndCoherentLoads) {
  DeviceBuffer<int32_t> x(std::vector<int32_t>(64, 1));
  const auto body = [&] {
    store(x.data() + thread_index(), load(x.data() + 32 + thread_index()) + 1);
    store(x.data() + thread_index(), load_coherent(x.data() + thread_index()) + 1);
  };
  EXPECT_EQ(fault(32, 0, body), "no error");
  EXPECT_EQ(fault(32, 0, [&] { load(x.data() + thread_index()); }), "no error");  // a launch of its own
}

TEST(Executor, FindsSharedAccessBehindTheEnd) {
  EXPECT_EQ(fault(64, 128, [] { shared_store(shared_memory() + 4 * thread_index(), uint8_t{1}); }),
            "op: block (0, 0, 0), thread 32: shared_store of 1 bytes is out of bounds of shared memory: "
            "offset 128 of "
            "128");
}

TEST(Executor, FindsMisalignedSharedAccess) {
  EXPECT_EQ(fault(32, 128, [] { shared_load(reinterpret_cast<const uint32_t*>(shared_memory() + 2)); }),
            "op: block (0, 0, 0), thread 0: shared_load of 4 bytes is misaligned: its address is 2 modulo 4");
}

TEST(Executor, FindsWritesBehindSharedMemoryPastTheWrappers) {
  EXPECT_EQ(fault(32, 128, [] { shared_memory()[128 + thread_index()] = 1; }),
            "op: block (0, 0, 0) wrote behind its 128 bytes of shared memory");
}

TEST(Executor, FindsDivergentCollectives) {
  const auto body = [] {
    if (lane_index() < 16) {
      shuffle_xor(1, 1);
    } else {
      warp_barrier();
    }
  };
  EXPECT_EQ(fault(32, 0, body),
            "op: block (0, 0, 0), thread 16: the warp diverges: this lane is at warp_barrier, another one at "
            "shuffle_xor");
}

TEST(Executor, FindsACollectiveThatSomeLanesSkip) {
  const auto body = [] {
    if (lane_index() != 3) shuffle_xor(1, 1);
  };
  EXPECT_EQ(fault(32, 0, body),
            "op: block (0, 0, 0) is stuck: thread 0 waits at shuffle_xor, thread 3 has left the kernel");
}

TEST(Executor, FindsABarrierThatSomeThreadsSkip) {
  const auto body = [] {
    if (thread_index() >= 32) block_barrier();
  };
  EXPECT_EQ(fault(64, 0, body),
            "op: block (0, 0, 0) is stuck: thread 0 has left the kernel, thread 32 waits at block_barrier");
}

TEST(Executor, FindsABarrierThatMeetsACollective) {
  const auto body = [] { lane_index() == 0 ? block_barrier() : warp_barrier(); };
  EXPECT_EQ(fault(32, 0, body),
            "op: block (0, 0, 0) is stuck: thread 0 waits at block_barrier, thread 1 waits at warp_barrier");
}

TEST(Executor, FindsAccumulatorsThatOverflow) {
  const auto body = [] {
    int32_t c[4] = {0, INT32_MAX, 0, 0};
    const uint32_t a[4] = {1, 1, 1, 1}, b[2] = {1, 1};
    mma_s8(c, a, b);
  };
  EXPECT_EQ(fault(32, 0, body), "op: block (0, 0, 0), thread 31: mma_s8: the sum 2147483655 overflows int32");
}

// Counts the objects alive on the stacks of the threads.
struct Counted {
  explicit Counted(int* alive) : alive(alive) { ++*alive; }
  ~Counted() { --*alive; }
  int* alive;
};

TEST(Executor, UnwindsEveryThreadAfterAFaultAndRunsTheNextKernel) {
  int alive = 0;
  const auto wrong = [&] {
    const Counted counted(&alive);
    block_barrier();
    if (thread_index() == 70) simt::executor().fail("wrong");
    block_barrier();
  };
  EXPECT_EQ(fault(128, 0, wrong), "op: block (0, 0, 0), thread 70: wrong");
  EXPECT_EQ(alive, 0);
  int num_run = 0;
  run(128, 0, [&] {
    block_barrier();
    ++num_run;
  });
  EXPECT_EQ(num_run, 128);
}

TEST(Executor, PassesOnWhatTheKernelThrows) {
  EXPECT_THROW(run(32, 0, [] { throw std::out_of_range("mine"); }), std::out_of_range);
}

TEST(Executor, RefusesShapesThatNoDeviceRuns) {
  EXPECT_EQ(fault(48, 0, [] {}), "op: wanted a multiple of 32 threads from 32 to 1024, got 48");
  EXPECT_EQ(fault(1056, 0, [] {}), "op: wanted a multiple of 32 threads from 32 to 1024, got 1056");
}

TEST(Executor, DeviceFunctionsAreRefusedOutsideOfAKernel) { EXPECT_THROW(thread_index(), std::logic_error); }

}  // namespace
}  // namespace adpdm
