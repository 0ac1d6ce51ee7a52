// Tests of the emulated wgmma: a right kernel gives the right product, and every wrong one is found.
#include "simt/wgmma.h"

#include <gtest/gtest.h>

#include <cstring>
#include <ostream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device_memory.h"
#include "cuda/wgmma.cuh"
#include "simt/executor.h"

namespace adpdm {
namespace {

using namespace adpdm::cuda;
using testing::DeviceBuffer;

// What a kernel does wrong.
enum class Fault {
  kNone,
  kCopiesNotAwaited,    // wgmma reads a stage whose copies are pending
  kNoProxyFence,        // before the barrier
  kProxyFenceTooEarly,  // before the copies have arrived
  kNoFence,             // wgmma.fence
  kNoCommit,            // of the products
  kNoWait,              // for the products at the end
  kReadBeforeWait,      // reads accumulators of pending products
  kWriteWhilePending,   // writes them
  kWriteAfterFence,     // writes them between the fence and the product
  kStageOverwritten,    // copies into a stage that wgmma reads
  kUnswizzledStore,     // rows as they are
  kSwizzleByHalfRow,    // the swizzle of 64-byte rows
  kNoSwizzleMode,       // in the descriptor
  kStrideOfHalfAnAtom,  // in the descriptor
  kStrideOfTwoAtoms,    // in the descriptor: past the end of shared memory
  kOperandOffAtom,      // begins in the second row of an atom
  kReservedBits,        // set in the descriptor
  kLanesDisagree,       // on the descriptor
  kWarpsDisagree,       // on the descriptor
  kWarpDiverges,        // half of it makes no product
  kTransposedStore,     // rows for columns of the accumulator layout
};

struct Product {
  int depth;            // K, a multiple of 128
  const int8_t* a;      // [64 * warpgroups, K] s8
  const int8_t* b;      // [N, K] s8
  const int32_t* base;  // [64 * warpgroups, N] s32: added to the product
  int32_t* c;           // [64 * warpgroups, N] s32
  Fault fault;
};

constexpr int kStages = 2;

// Copies `rows` rows of 128 codes into an operand.
void copy_rows(unsigned char* operand, const int8_t* source, int rows, const Product& g, int step) {
  for (int i = thread_index(); i < rows * 8; i += num_threads()) {
    const int row = i / 8, chunk = i % 8;
    int offset = swizzled_offset(row, chunk);
    if (g.fault == Fault::kUnswizzledStore) offset = row * kSwizzleRowBytes + chunk * 16;
    if (g.fault == Fault::kSwizzleByHalfRow)
      offset = row * kSwizzleRowBytes + ((chunk ^ (row >> 1 & 3)) << 4);
    copy_async16(operand + offset, source + int64_t{row} * g.depth + step * kSwizzleRowBytes + chunk * 16);
  }
}

uint64_t faulty(uint64_t descriptor, Fault fault) {
  switch (fault) {
    case Fault::kNoSwizzleMode:
      return descriptor & ~(uint64_t{3} << 62);
    case Fault::kStrideOfHalfAnAtom:
      return descriptor - (uint64_t{32} << 32);
    case Fault::kStrideOfTwoAtoms:
      return descriptor + (uint64_t{64} << 32);
    case Fault::kOperandOffAtom:
      return descriptor + kSwizzleRowBytes / 16;
    case Fault::kReservedBits:
      return descriptor | uint64_t{1} << 49;
    case Fault::kLanesDisagree:
      return descriptor + (lane_index() == 7 ? kWgmmaDepthStep : 0);
    case Fault::kWarpsDisagree:
      return descriptor + (warp_index() == 3 ? kWgmmaDepthStep : 0);
    default:
      return descriptor;
  }
}

template <int R>
void multiply_stage(int32_t (&c)[R], const unsigned char* a, const unsigned char* b, Fault fault) {
  uint64_t a_descriptor = faulty(wgmma_descriptor(a), fault);
  uint64_t b_descriptor = faulty(wgmma_descriptor(b), fault);
  if (fault != Fault::kNoFence) wgmma_fence(c);
  if (fault == Fault::kWriteAfterFence) c[3] += 1;
  for (int k = 0; k < kSwizzleRowBytes / kWgmmaDepth; ++k) {
    if (fault == Fault::kWarpDiverges && lane_index() >= 16) break;
    wgmma_s8(c, a_descriptor, b_descriptor);
    a_descriptor += kWgmmaDepthStep;
    b_descriptor += kWgmmaDepthStep;
  }
  if (fault != Fault::kNoCommit) wgmma_commit();
}

template <int R>
void store_result(const int32_t (&c)[R], const Product& g) {
  for (int i = 0; i < R; ++i) {
    int row = 16 * warp_index() + lane_index() / 4 + 8 * (i % 4 / 2);
    int column = 8 * (i / 4) + 2 * (lane_index() % 4) + i % 2;
    if (g.fault == Fault::kTransposedStore) row ^= 8, column ^= 1;
    store(g.c + int64_t{row} * 2 * R + column, c[i]);
  }
}

// One block: c = base + a b^T, two stages deep.
template <int R>
void multiply(const Product& g) {
  const int rows = num_threads() / 2, steps = g.depth / kSwizzleRowBytes;
  const int a_bytes = rows * kSwizzleRowBytes, stage_bytes = a_bytes + 2 * R * kSwizzleRowBytes;
  const auto stage = [&](int step) { return shared_memory() + step % kStages * stage_bytes; };
  const auto copy = [&](int step) {
    if (step < steps) {
      copy_rows(stage(step), g.a, rows, g, step);
      copy_rows(stage(step) + a_bytes, g.b, 2 * R, g, step);
    }
    copy_async_commit();
  };
  int32_t c[R];
  for (int i = 0; i < R; ++i) {
    const int row = 16 * warp_index() + lane_index() / 4 + 8 * (i % 4 / 2);
    c[i] = load(g.base + int64_t{row} * 2 * R + 8 * (i / 4) + 2 * (lane_index() % 4) + i % 2);
  }
  copy(0);
  for (int step = 0; step < steps; ++step) {
    copy(step + 1);
    if (g.fault == Fault::kProxyFenceTooEarly) fence_proxy_async();
    if (g.fault == Fault::kCopiesNotAwaited) {
      copy_async_wait<2>();
    } else {
      copy_async_wait<1>();
    }
    if (g.fault != Fault::kNoProxyFence && g.fault != Fault::kProxyFenceTooEarly) fence_proxy_async();
    block_barrier();
    const unsigned char* a = stage(step) + warp_index() / 4 * kWgmmaRows * kSwizzleRowBytes;
    multiply_stage(c, a, stage(step) + a_bytes, g.fault);
    if (g.fault == Fault::kWriteWhilePending) c[0] = 0;
    if (g.fault == Fault::kReadBeforeWait && step + 1 == steps) store_result(c, g);
    if (g.fault == Fault::kStageOverwritten) {
      wgmma_wait<1>(c);
    } else if (g.fault != Fault::kNoWait) {
      wgmma_wait<0>(c);
    }
    block_barrier();
  }
  if (g.fault == Fault::kStageOverwritten) wgmma_wait<0>(c);
  if (g.fault != Fault::kReadBeforeWait) store_result(c, g);
  copy_async_wait<0>();
}

struct Operands {
  int rows, columns, depth;
  std::vector<int8_t> a, b;
  std::vector<int32_t> base;

  Operands(int warpgroups, int columns, int depth)
      : rows(64 * warpgroups), columns(columns), depth(depth), base(static_cast<size_t>(rows * columns)) {
    std::mt19937 random(7);
    std::uniform_int_distribution<int> code(-128, 127);
    for (int i = 0; i < rows * depth; ++i) a.push_back(static_cast<int8_t>(code(random)));
    for (int i = 0; i < columns * depth; ++i) b.push_back(static_cast<int8_t>(code(random)));
    for (int32_t& value : base) value = code(random);
  }

  std::vector<int32_t> product() const {
    std::vector<int32_t> c = base;
    for (int i = 0; i < rows * columns; ++i) {
      const int8_t* x = a.data() + i / columns * depth;
      const int8_t* y = b.data() + i % columns * depth;
      for (int k = 0; k < depth; ++k) c[static_cast<size_t>(i)] += x[k] * y[k];
    }
    return c;
  }
};

template <int R>
std::vector<int32_t> run(const Operands& operands, Fault fault = Fault::kNone) {
  const DeviceBuffer<int8_t> a(operands.a), b(operands.b);
  const DeviceBuffer<int32_t> base(operands.base);
  DeviceBuffer<int32_t> c(operands.base.size());
  const Product g = {operands.depth, a.data(), b.data(), base.data(), c.data(), fault};
  const int64_t shared_bytes = int64_t{kStages} * (operands.rows + 2 * R) * kSwizzleRowBytes;
  simt::executor().launch({"multiply", {}, 2 * operands.rows, shared_bytes}, [&] { multiply<R>(g); });
  return c.host();
}

template <int R>
void expect_product(int warpgroups) {
  const Operands operands(warpgroups, 2 * R, 3 * 128);
  for (const bool late : {false, true}) {
    const simt::ScopedOptions scope({5, late});
    EXPECT_EQ(run<R>(operands), operands.product()) << "late_async " << late;
  }
}

TEST(Wgmma, MultipliesWithOneAndTwoWarpgroups) {
  expect_product<64>(1);
  expect_product<64>(2);
}

TEST(Wgmma, MultipliesAllWidths) {
  expect_product<80>(2);
  expect_product<128>(2);
}

TEST(Wgmma, DescriptorHasTheDocumentedBits) {
  uint64_t descriptor = 0;
  simt::executor().launch({"op", {}, 32, 4096},
                          [&] { descriptor = wgmma_descriptor(shared_memory() + 2048); });
  EXPECT_EQ(descriptor, 0x4000004000010080u);
}

TEST(Wgmma, SwizzlePermutesTheChunksOfARowByItsNumber) {
  EXPECT_EQ(swizzled_offset(0, 5), 80);
  EXPECT_EQ(swizzled_offset(1, 0), 128 + 16);
  EXPECT_EQ(swizzled_offset(1, 1), 128);
  EXPECT_EQ(swizzled_offset(7, 7), 7 * 128);
  EXPECT_EQ(swizzled_offset(10, 4), 10 * 128 + 6 * 16);
}

TEST(Wgmma, OverflowOfTheSumIsAnError) {
  Operands operands(1, 128, 128);
  std::fill(operands.a.begin(), operands.a.end(), int8_t{1});
  std::fill(operands.b.begin(), operands.b.end(), int8_t{1});
  operands.base.assign(operands.base.size(), INT32_MAX - 127);
  try {
    run<64>(operands);
    FAIL() << "no error";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("the sum 2147483648 overflows int32"), std::string::npos)
        << error.what();
  }
}

// ---- wrong kernels ----

constexpr const char* kWrongProduct = "the kernel ends with a wrong product";

struct Wrong {
  Fault fault;
  const char* message;  // of the error, or kWrongProduct
  const char* name;
};

std::ostream& operator<<(std::ostream& out, const Wrong& wrong) { return out << wrong.name; }

class WrongKernel : public ::testing::TestWithParam<Wrong> {};

// The message of the error, or whether the product is right.
std::string outcome(Fault fault) {
  const Operands operands(2, 128, 3 * 128);
  try {
    return run<64>(operands, fault) == operands.product() ? "right" : kWrongProduct;
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

TEST_P(WrongKernel, IsFound) {
  const std::string found = outcome(GetParam().fault);
  EXPECT_NE(found.find(GetParam().message), std::string::npos) << found;
}

INSTANTIATE_TEST_SUITE_P(
    Wgmma, WrongKernel,
    ::testing::Values(
        Wrong{Fault::kCopiesNotAwaited, kWrongProduct, "CopiesNotAwaited"},
        Wrong{Fault::kNoProxyFence, "written without fence_proxy_async", "NoProxyFence"},
        Wrong{Fault::kProxyFenceTooEarly, "written without fence_proxy_async", "ProxyFenceTooEarly"},
        Wrong{Fault::kNoFence, "wanted wgmma_fence before the first product of a group", "NoFence"},
        Wrong{Fault::kNoCommit, "leaves the kernel with asynchronous operations", "NoCommit"},
        Wrong{Fault::kNoWait, "leaves the kernel with asynchronous operations", "NoWait"},
        Wrong{Fault::kReadBeforeWait, kWrongProduct, "ReadBeforeWait"},
        Wrong{Fault::kWriteWhilePending, "the accumulators are written while a product is pending",
              "WriteWhilePending"},
        Wrong{Fault::kWriteAfterFence, "the accumulators are written after wgmma_fence", "WriteAfterFence"},
        Wrong{Fault::kStageOverwritten, kWrongProduct, "StageOverwritten"},
        Wrong{Fault::kUnswizzledStore, kWrongProduct, "UnswizzledStore"},
        Wrong{Fault::kSwizzleByHalfRow, kWrongProduct, "SwizzleByHalfRow"},
        Wrong{Fault::kNoSwizzleMode, "has swizzle mode 0, wanted 1", "NoSwizzleMode"},
        Wrong{Fault::kStrideOfHalfAnAtom, "has a stride of 512 bytes, wanted a multiple of 1024",
              "StrideOfHalfAnAtom"},
        Wrong{Fault::kStrideOfTwoAtoms, "of shared memory", "StrideOfTwoAtoms"},
        Wrong{Fault::kOperandOffAtom, "begins 128 bytes into an atom", "OperandOffAtom"},
        Wrong{Fault::kReservedBits, "has bits set where wanted zeros", "ReservedBits"},
        Wrong{Fault::kLanesDisagree, "differ from those of its warpgroup", "LanesDisagree"},
        Wrong{Fault::kWarpsDisagree, "differ from those of its warpgroup", "WarpsDisagree"},
        Wrong{Fault::kWarpDiverges, "is stuck", "WarpDiverges"},
        Wrong{Fault::kTransposedStore, kWrongProduct, "TransposedStore"}),
    [](const ::testing::TestParamInfo<Wrong>& info) { return info.param.name; });

}  // namespace
}  // namespace adpdm
