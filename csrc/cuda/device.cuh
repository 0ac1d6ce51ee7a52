// The device functions that kernels are written with. Two implementations: instructions with nvcc, and with
// ADPDM_SIMT calls of the host executor, which checks every access. Kernels touch memory through these only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/float_convert.h"
#include "core/types.h"

#ifdef ADPDM_SIMT
#include "simt/executor.h"
#include "simt/warp_ops.h"
#include "simt/wgmma.h"
#define ADPDM_DEVICE inline
#define ADPDM_KERNEL(max_threads, min_blocks) void
#define ADPDM_UNROLL
#define ADPDM_NO_UNROLL
#define ADPDM_GRID_CONSTANT
#else
#define ADPDM_DEVICE __device__ __forceinline__
#define ADPDM_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define ADPDM_UNROLL _Pragma("unroll")
#define ADPDM_NO_UNROLL _Pragma("unroll 1")
// For a const struct parameter of a kernel: members are read where the driver put them, never from a local
// copy.
#define ADPDM_GRID_CONSTANT __grid_constant__
#endif

namespace adpdm::cuda {

constexpr int kWarpSize = 32;

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

struct alignas(8) Bytes8 {
  uint32_t word[2];
};

#ifdef ADPDM_SIMT

// ---- where a thread is ----
ADPDM_DEVICE int thread_index() { return simt::executor().thread_index(); }
ADPDM_DEVICE int num_threads() { return simt::executor().num_threads(); }
ADPDM_DEVICE int64_t block_x() { return simt::executor().block().x; }
ADPDM_DEVICE int64_t block_y() { return simt::executor().block().y; }
ADPDM_DEVICE int64_t block_z() { return simt::executor().block().z; }
ADPDM_DEVICE int64_t grid_x() { return simt::executor().grid().x; }
ADPDM_DEVICE int64_t grid_y() { return simt::executor().grid().y; }
ADPDM_DEVICE int64_t grid_z() { return simt::executor().grid().z; }

// ---- barriers and shuffles ----
ADPDM_DEVICE void block_barrier() { simt::executor().block_barrier(); }
ADPDM_DEVICE void warp_barrier() { simt::executor().exchange("warp_barrier", nullptr, 0); }
ADPDM_DEVICE void memory_fence() {}  // blocks run one after the other

template <typename T>
ADPDM_DEVICE T shuffle_xor(T value, int lane_mask) {
  return simt::shuffle("shuffle_xor", value, (simt::executor().thread_index() % kWarpSize) ^ lane_mask);
}

template <typename T>
ADPDM_DEVICE T shuffle_down(T value, int delta) {
  return simt::shuffle("shuffle_down", value, simt::executor().thread_index() % kWarpSize + delta);
}

// ---- memory ----
ADPDM_DEVICE unsigned char* shared_memory() { return simt::executor().shared_memory(); }

template <typename T>
ADPDM_DEVICE T shared_load(const T* p) {
  simt::executor().check_shared(p, sizeof(T), "shared_load");
  return *p;
}

template <typename T>
ADPDM_DEVICE void shared_store(T* p, T value) {
  simt::executor().check_shared(p, sizeof(T), "shared_store");
  simt::note_shared_write(p, sizeof(T));
  *p = value;
}

template <typename T>
ADPDM_DEVICE T load(const T* p) {
  simt::executor().check_global(p, sizeof(T), "load", simt::GlobalAccess::kReadOnly);
  return *p;
}

template <typename T>
ADPDM_DEVICE T load_coherent(const T* p) {
  simt::executor().check_global(p, sizeof(T), "load_coherent", simt::GlobalAccess::kRead);
  return *p;
}

template <typename T>
ADPDM_DEVICE void store(T* p, T value) {
  simt::executor().check_global(p, sizeof(T), "store", simt::GlobalAccess::kWrite);
  *p = value;
}

ADPDM_DEVICE int32_t atomic_add_shared(int32_t* p, int32_t value) {
  simt::executor().check_shared(p, 4, "atomic_add_shared");
  const int32_t old = *p;
  *p = old + value;
  return old;
}

template <typename T>
ADPDM_DEVICE T atomic_add(T* p, T value) {
  static_assert(std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);
  simt::executor().check_global(p, sizeof(T), "atomic_add", simt::GlobalAccess::kWrite);
  const T old = *p;
  *p = old + value;
  return old;
}

template <typename T>
ADPDM_DEVICE T atomic_min(T* p, T value) {
  static_assert(std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t>);
  simt::executor().check_global(p, 4, "atomic_min", simt::GlobalAccess::kWrite);
  const T old = *p;
  *p = value < old ? value : old;
  return old;
}

template <typename T>
ADPDM_DEVICE T atomic_max(T* p, T value) {
  static_assert(std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t>);
  simt::executor().check_global(p, 4, "atomic_max", simt::GlobalAccess::kWrite);
  const T old = *p;
  *p = value > old ? value : old;
  return old;
}

// ---- asynchronous copies and tensor cores ----
ADPDM_DEVICE void copy_async16(void* shared, const void* global) { simt::copy_async16(shared, global); }
ADPDM_DEVICE void copy_async16_if(bool wanted, void* shared, const void* global) {
  if (wanted) simt::copy_async16(shared, global);
}
ADPDM_DEVICE void copy_async_commit() { simt::executor().commit_async(simt::Async::kCopy); }

template <int N>
ADPDM_DEVICE void copy_async_wait() {
  simt::executor().wait_async(simt::Async::kCopy, N);
}

ADPDM_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  simt::load_matrix_x4(r, shared_row);
}

ADPDM_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma_s8(c, a, b);
}

ADPDM_DEVICE void mma_s4(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma_s4(c, a, b);
}

// ---- integer arithmetic ----
ADPDM_DEVICE int32_t dot4(uint32_t a, uint32_t b, int32_t sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  }
  return sum;
}

template <uint32_t kSelector>
ADPDM_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (8 * (kSelector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}

// ---- float arithmetic ----
ADPDM_DEVICE float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
ADPDM_DEVICE float reciprocal(float x) { return 1.0f / x; }

ADPDM_DEVICE float half_bits_to_float(uint16_t bits, FloatType type) {
  return type == FloatType::kBFloat16 ? bf16_to_float(bits) : f16_to_float(bits);
}

ADPDM_DEVICE uint16_t float_to_half_bits(float x, FloatType type) {
  return type == FloatType::kBFloat16 ? float_to_bf16(x) : float_to_f16(x);
}

#else

namespace detail {

template <typename To, typename From>
ADPDM_DEVICE To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The built-in type of a size that one load or store instruction moves.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = unsigned char;
};
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};
template <typename T>
using WordOf = typename Word<sizeof(T)>::Type;

ADPDM_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace detail

// ---- where a thread is ----
ADPDM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ADPDM_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
ADPDM_DEVICE int64_t block_x() { return blockIdx.x; }
ADPDM_DEVICE int64_t block_y() { return blockIdx.y; }
ADPDM_DEVICE int64_t block_z() { return blockIdx.z; }
ADPDM_DEVICE int64_t grid_x() { return gridDim.x; }
ADPDM_DEVICE int64_t grid_y() { return gridDim.y; }
ADPDM_DEVICE int64_t grid_z() { return gridDim.z; }

// ---- barriers and shuffles: all threads of the block, all lanes of the warp must come ----
ADPDM_DEVICE void block_barrier() { __syncthreads(); }
ADPDM_DEVICE void warp_barrier() { __syncwarp(); }

// What this thread wrote to global memory before is seen by whoever sees what it writes after.
ADPDM_DEVICE void memory_fence() { __threadfence(); }

// The value of lane (lane_index() ^ lane_mask); T has 4 or 8 bytes.
template <typename T>
ADPDM_DEVICE T shuffle_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  using Moved = std::conditional_t<sizeof(T) == 4, unsigned int, unsigned long long>;
  return detail::same_bits<T>(__shfl_xor_sync(0xffffffffu, detail::same_bits<Moved>(value), lane_mask));
}

// The value of lane lane_index() + delta; the own one where there is no such lane.
template <typename T>
ADPDM_DEVICE T shuffle_down(T value, int delta) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  using Moved = std::conditional_t<sizeof(T) == 4, unsigned int, unsigned long long>;
  return detail::same_bits<T>(
      __shfl_down_sync(0xffffffffu, detail::same_bits<Moved>(value), static_cast<unsigned>(delta)));
}

// ---- memory: T has 1, 2, 4, 8 or 16 bytes and its address is a multiple of that ----

// The block's dynamic shared memory, the only one that kernels use.
ADPDM_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char adpdm_shared_memory[];
  return adpdm_shared_memory;
}

template <typename T>
ADPDM_DEVICE T shared_load(const T* p) {
  return detail::same_bits<T>(*reinterpret_cast<const detail::WordOf<T>*>(p));
}

template <typename T>
ADPDM_DEVICE void shared_store(T* p, T value) {
  *reinterpret_cast<detail::WordOf<T>*>(p) = detail::same_bits<detail::WordOf<T> >(value);
}

// Global memory that nobody, this thread included, writes while the kernel runs.
template <typename T>
ADPDM_DEVICE T load(const T* p) {
  return detail::same_bits<T>(__ldg(reinterpret_cast<const detail::WordOf<T>*>(p)));
}

// Global memory that this kernel may have written: from L2, past the first-level cache.
template <typename T>
ADPDM_DEVICE T load_coherent(const T* p) {
  return detail::same_bits<T>(__ldcg(reinterpret_cast<const detail::WordOf<T>*>(p)));
}

template <typename T>
ADPDM_DEVICE void store(T* p, T value) {
  *reinterpret_cast<detail::WordOf<T>*>(p) = detail::same_bits<detail::WordOf<T> >(value);
}

// Atomics return the old value. Only integer ones: they give the same sum in every order.
ADPDM_DEVICE int32_t atomic_add_shared(int32_t* p, int32_t value) { return atomicAdd(p, value); }

template <typename T>
ADPDM_DEVICE T atomic_add(T* p, T value) {
  static_assert(std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);
  if constexpr (sizeof(T) == 8) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
  } else {
    return atomicAdd(p, value);
  }
}

template <typename T>
ADPDM_DEVICE T atomic_min(T* p, T value) {
  static_assert(std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t>);
  return atomicMin(p, value);
}
template <typename T>
ADPDM_DEVICE T atomic_max(T* p, T value) {
  static_assert(std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t>);
  return atomicMax(p, value);
}

// ---- asynchronous copies and tensor cores ----

// 16 bytes from global to shared memory, past the registers and the first-level cache; both 16-byte aligned.
ADPDM_DEVICE void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(detail::shared_address(shared)), "l"(global)
               : "memory");
}

// The same under a predicate: without a branch, around which products could not be scheduled.
ADPDM_DEVICE void copy_async16_if(bool wanted, void* shared, const void* global) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %2, 0;\n\t"
      "@wanted cp.async.cg.shared.global [%0], [%1], 16;\n\t}" ::"r"(detail::shared_address(shared)),
      "l"(global), "r"(static_cast<int>(wanted))
      : "memory");
}

// Closes a group of this thread's copies.
ADPDM_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N youngest groups of this thread are pending. Others see the copies after a
// barrier.
template <int N>
ADPDM_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and receives
// of matrix i, as r[i], the elements 2 * (l % 4) and the next of row l / 4.
ADPDM_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(shared_row))
               : "memory");
}

// c += A B with A [16, 32] s8 by rows, B [32, 8] s8 by columns, C [16, 8] s32. With group = lane / 4 and
// quarter = lane % 4, a lane holds of A, 4 per register from k = 4 * quarter: rows group (a[0]) and group + 8
// (a[1]), and the same 16 further in k (a[2], a[3]); of B column group at the same k (b[0], b[1]); of C rows
// group (c[0], c[1]) and group + 8 (c[2], c[3]), columns 2 * quarter and the next.
ADPDM_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with A [16, 64] s4 and B [64, 8] s4, 8 per register. Native on sm_80 to sm_89; ptxas replaces it
// by a slow routine from sm_90 on.
ADPDM_DEVICE void mma_s4(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- integer arithmetic ----

// sum + the products of four pairs of int8.
ADPDM_DEVICE int32_t dot4(uint32_t a, uint32_t b, int32_t sum) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}

// Byte i of the result is the one that hexadecimal digit i of kSelector names, 0..3 of a and 4..7 of b.
template <uint32_t kSelector>
ADPDM_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, kSelector);
}

// ---- float arithmetic: the bits of the host ----
ADPDM_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ADPDM_DEVICE float reciprocal(float x) { return __frcp_rn(x); }

// One instruction each, with the results of core/float_convert.h except for the bits of a NaN, which no
// result of an op depends on; restoring them took 14 more instructions per element.
ADPDM_DEVICE float half_bits_to_float(uint16_t bits, FloatType type) {
  if (type == FloatType::kBFloat16) return bf16_to_float(bits);
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

ADPDM_DEVICE uint16_t float_to_half_bits(float x, FloatType type) {
  uint16_t bits;
  if (type == FloatType::kBFloat16) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
  }
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

#endif

ADPDM_DEVICE int lane_index() { return thread_index() % kWarpSize; }
ADPDM_DEVICE int warp_index() { return thread_index() / kWarpSize; }

// Element `index` of a tensor of that type, read-only while the kernel runs.
ADPDM_DEVICE float load_float(const void* base, int64_t index, FloatType type) {
  if (type == FloatType::kFloat32) return load(static_cast<const float*>(base) + index);
  return half_bits_to_float(load(static_cast<const uint16_t*>(base) + index), type);
}

// Writes element `index`, rounded to nearest even.
ADPDM_DEVICE void store_float(void* base, int64_t index, FloatType type, float value) {
  if (type == FloatType::kFloat32) return store(static_cast<float*>(base) + index, value);
  store(static_cast<uint16_t*>(base) + index, float_to_half_bits(value, type));
}

}  // namespace adpdm::cuda
