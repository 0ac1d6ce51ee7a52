// Hopper's asynchronous matrix product on int8 operands in shared memory: where operands lie, and the
// instructions, on the device and on the host executor.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace adpdm::cuda {

// One wgmma of a warpgroup: [64, 32] s8 times [32, N] s8 onto [64, N] s32, N / 2 registers a thread:
// c[4 * j + e] is row 16 * warp + lane / 4 + 8 * (e / 2), column 8 * j + 2 * (lane % 4) + e % 2. That is the
// layout of mma.m16n8k32, once per 8 columns.
constexpr int kWarpgroupThreads = 128;
constexpr int kWgmmaRows = 64;
constexpr int kWgmmaDepth = 32;

// An operand is rows of 128 codes (128 bytes, four instructions deep), in atoms of 8 rows that begin at a
// multiple of 1024 bytes. Within an atom, the 16-byte chunks of row r are permuted by xor with r, so that the
// same chunk of 8 rows lies in 8 different groups of banks.
constexpr int kSwizzleRowBytes = 128;
constexpr int kSwizzleAtomBytes = 8 * kSwizzleRowBytes;

// Where the 16-byte chunk [0, 8) of a row lies in its operand.
ADPDM_DEVICE int swizzled_offset(int row, int chunk) {
  return row * kSwizzleRowBytes + ((chunk ^ (row & 7)) << 4);
}

#ifdef ADPDM_SIMT
namespace detail {
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared_memory());
}
}  // namespace detail
#endif

// The descriptor of an operand: address / 16 | 1 (unused with this swizzle) << 16 | bytes from an atom to the
// next one / 16 << 32 | 128-byte swizzle << 62.
ADPDM_DEVICE uint64_t wgmma_descriptor(const void* operand) {
  const uint64_t address = detail::shared_address(operand) & 0x3FFFFu;
  return address >> 4 | uint64_t{1} << 16 | uint64_t{kSwizzleAtomBytes >> 4} << 32 | uint64_t{1} << 62;
}

// What is added to a descriptor to get to the next kWgmmaDepth codes.
constexpr uint64_t kWgmmaDepthStep = kWgmmaDepth >> 4;

// The order of a product: write shared memory; fence_proxy_async; barrier; wgmma_fence; wgmma_s8, ...;
// wgmma_commit; wgmma_wait. Until that, neither the accumulators nor the operands may be touched.

#ifdef ADPDM_SIMT

inline void fence_proxy_async() { simt::fence_proxy_async(); }

template <int R>
void wgmma_fence(int32_t (&c)[R]) {
  simt::wgmma_fence(c, R);
}

template <int R>
void wgmma_s8(int32_t (&c)[R], uint64_t a, uint64_t b) {
  simt::wgmma_s8(c, R, a, b);
}

inline void wgmma_commit() { simt::wgmma_commit(); }

template <int Keep, int R>
void wgmma_wait(int32_t (&)[R]) {
  simt::executor().wait_async(simt::Async::kMatrix, Keep);
}

#else

// Makes what this thread has written to shared memory visible to wgmma, which reads by another path.
ADPDM_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler must not move uses of accumulators across the instructions that start and end their use by
// wgmma; it knows of none of them.
template <int R>
ADPDM_DEVICE void pin_registers(int32_t (&c)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+r"(c[i])::"memory");
}

// Orders this thread's accesses of the accumulators before the products that follow.
template <int R>
ADPDM_DEVICE void wgmma_fence(int32_t (&c)[R]) {
  pin_registers(c);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

ADPDM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most Keep groups of products are pending; only after Keep = 0 may c be read.
template <int Keep, int R>
ADPDM_DEVICE void wgmma_wait(int32_t (&c)[R]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Keep) : "memory");
  pin_registers(c);
}

// Names and operands of 10 accumulators, c[10 * t] to c[10 * t + 9], after a comma.
// clang-format off
#define ADPDM_NAMES(t) \
  ",%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define ADPDM_OPERANDS(t)                                                                        \
  , "+r"(c[t##0]), "+r"(c[t##1]), "+r"(c[t##2]), "+r"(c[t##3]), "+r"(c[t##4]), "+r"(c[t##5]), \
    "+r"(c[t##6]), "+r"(c[t##7]), "+r"(c[t##8]), "+r"(c[t##9])
#define ADPDM_NAMES_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9"
#define ADPDM_OPERANDS_0                                                                        \
  "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(c[4]), "+r"(c[5]), "+r"(c[6]), "+r"(c[7]), \
  "+r"(c[8]), "+r"(c[9])
#define ADPDM_TENS_TO_60(F) F(1) F(2) F(3) F(4) F(5)
#define ADPDM_TENS_TO_80(F) ADPDM_TENS_TO_60(F) F(6) F(7)
#define ADPDM_TENS_TO_120(F) ADPDM_TENS_TO_80(F) F(8) F(9) F(10) F(11)
// clang-format on

// c += A B for the operands with descriptors a [64, 32] and b [N, 32], N = 2 * R.
ADPDM_DEVICE void wgmma_s8(int32_t (&c)[64], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" ADPDM_NAMES_0 ADPDM_TENS_TO_60(
                   ADPDM_NAMES) ",%60,%61,%62,%63}, %64, %65, 1;"
               : ADPDM_OPERANDS_0 ADPDM_TENS_TO_60(ADPDM_OPERANDS), "+r"(c[60]), "+r"(c[61]), "+r"(c[62]),
                 "+r"(c[63])
               : "l"(a), "l"(b));
}

ADPDM_DEVICE void wgmma_s8(int32_t (&c)[80], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n160k32.s32.s8.s8 {" ADPDM_NAMES_0 ADPDM_TENS_TO_80(
                   ADPDM_NAMES) "}, %80, %81, 1;"
               : ADPDM_OPERANDS_0 ADPDM_TENS_TO_80(ADPDM_OPERANDS)
               : "l"(a), "l"(b));
}

ADPDM_DEVICE void wgmma_s8(int32_t (&c)[128], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" ADPDM_NAMES_0 ADPDM_TENS_TO_120(
                   ADPDM_NAMES) ",%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, 1;"
               : ADPDM_OPERANDS_0 ADPDM_TENS_TO_120(ADPDM_OPERANDS), "+r"(c[120]), "+r"(c[121]), "+r"(c[122]),
                 "+r"(c[123]), "+r"(c[124]), "+r"(c[125]), "+r"(c[126]), "+r"(c[127])
               : "l"(a), "l"(b));
}

#undef ADPDM_NAMES
#undef ADPDM_OPERANDS
#undef ADPDM_NAMES_0
#undef ADPDM_OPERANDS_0
#undef ADPDM_TENS_TO_60
#undef ADPDM_TENS_TO_80
#undef ADPDM_TENS_TO_120

#endif

}  // namespace adpdm::cuda
