// Kernels that exist only for device_test.cpp.
#include "cuda/device.cuh"
#include "cuda/device_kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace adpdm::testing {
namespace {

using namespace adpdm::cuda;

constexpr int kThreads = 128;

LaunchShape elementwise(int64_t size) {
  return {(size + kThreads - 1) / kThreads, 1, 1, kThreads, 0, nullptr, "device_test"};
}

ADPDM_KERNEL(kThreads, 1) to_float_kernel(const uint16_t* x, float* y, int64_t size, FloatType type) {
  const int64_t i = block_x() * num_threads() + thread_index();
  if (i < size) store_float(y, i, FloatType::kFloat32, load_float(x, i, type));
}

ADPDM_KERNEL(kThreads, 1) from_float_kernel(const float* x, uint16_t* y, int64_t size, FloatType type) {
  const int64_t i = block_x() * num_threads() + thread_index();
  if (i < size) store_float(y, i, type, load_float(x, i, FloatType::kFloat32));
}

ADPDM_KERNEL(kThreads, 1)
arithmetic_kernel(const float* a, const float* b, const float* c, float* y, float* z, int64_t size) {
  const int64_t i = block_x() * num_threads() + thread_index();
  if (i >= size) return;
  store(y + i, fused_multiply_add(load(a + i), load(b + i), load(c + i)));
  store(z + i, reciprocal(load(a + i)));
}

ADPDM_KERNEL(1024, 1) reduce_kernel(const float* x, Reduced* result) {
  auto* floats = reinterpret_cast<float*>(shared_memory());
  auto* doubles = reinterpret_cast<double*>(shared_memory());
  const float value = load(x + thread_index());
  Reduced reduced;
  reduced.sum = block_sum(value, floats);
  reduced.precise_sum = block_sum(static_cast<double>(value), doubles);
  reduced.smallest = block_min(value, floats);
  reduced.largest = block_max(value, floats);
  Reduced* mine = result + thread_index();
  store(&mine->sum, reduced.sum);
  store(&mine->precise_sum, reduced.precise_sum);
  store(&mine->smallest, reduced.smallest);
  store(&mine->largest, reduced.largest);
}

ADPDM_KERNEL(64, 1) count_kernel(int32_t* by_block, int32_t* total, uint64_t* wide_total, int32_t* extrema) {
  auto* count = reinterpret_cast<int32_t*>(shared_memory());
  if (thread_index() == 0) shared_store(count, 0);
  block_barrier();
  atomic_add_shared(count, 1);
  block_barrier();
  if (thread_index() == 0) store(by_block + block_x(), shared_load(count));
  atomic_add(total, 1);
  atomic_add(wide_total, uint64_t{1} << 33);
  const auto id = static_cast<int32_t>(block_x() * 64 + thread_index());
  atomic_min(extrema, id);
  atomic_max(extrema + 1, id);
}

// Rows of 32 bytes: two 16-byte chunks, of A as the matrices (rows 0-7, 8-15) x (k 0-15, 16-31).
ADPDM_KERNEL(32, 1) multiply_kernel(const int8_t* a, const int8_t* b, int32_t* c) {
  unsigned char* shared_a = shared_memory();
  unsigned char* shared_b = shared_a + 512;
  const int lane = lane_index();
  copy_async16(shared_a + 16 * lane, a + 16 * lane);
  if (lane < 16) copy_async16(shared_b + 16 * lane, b + 16 * lane);
  copy_async_commit();
  copy_async_wait<0>();
  block_barrier();
  uint32_t fragment_a[4], fragment_b[4];
  load_matrix_x4(fragment_a, shared_a + 32 * (lane % 16) + 16 * (lane / 16));
  load_matrix_x4(fragment_b, shared_b + 32 * (lane % 8) + 16 * (lane / 8 % 2));
  const uint32_t halves_b[2] = {fragment_b[0], fragment_b[1]};
  int32_t sums[4] = {};
  mma_s8(sums, fragment_a, halves_b);
  ADPDM_UNROLL
  for (int i = 0; i < 4; ++i) store(c + (lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2, sums[i]);
}

ADPDM_KERNEL(1024, 1) store_kernel(int32_t* x, int32_t value) {
  if (block_x() == 0 && thread_index() == 0) store(x, value);
}

// Swizzles and descriptors of wgmma take an address that is a multiple of 1024 for granted.
ADPDM_KERNEL(32, 1) alignment_kernel(int32_t* remainder) {
#ifdef ADPDM_SIMT
  const auto address = reinterpret_cast<uintptr_t>(shared_memory());
#else
  const uint32_t address = detail::shared_address(shared_memory());
#endif
  if (thread_index() == 0) store(remainder, static_cast<int32_t>(address % 1024));
}

}  // namespace

void convert_to_float(const uint16_t* x, float* y, int64_t size, FloatType type) {
  launch(to_float_kernel, elementwise(size), x, y, size, type);
}

void convert_from_float(const float* x, uint16_t* y, int64_t size, FloatType type) {
  launch(from_float_kernel, elementwise(size), x, y, size, type);
}

void multiply_add_and_invert(const float* a, const float* b, const float* c, float* y, float* z,
                             int64_t size) {
  launch(arithmetic_kernel, elementwise(size), a, b, c, y, z, size);
}

void reduce_block(const float* x, Reduced* result, int threads) {
  launch(reduce_kernel, {1, 1, 1, threads, kReduceScratchBytes<double>, nullptr, "device_test"}, x, result);
}

void count_threads(int32_t* by_block, int32_t* total, uint64_t* wide_total, int32_t* extrema) {
  launch(count_kernel, {3, 1, 1, 64, 4, nullptr, "device_test"}, by_block, total, wide_total, extrema);
}

void multiply_tile(const int8_t* a, const int8_t* b, int32_t* c) {
  launch(multiply_kernel, {1, 1, 1, 32, 768, nullptr, "device_test"}, a, b, c);
}

void launch_anything(int32_t* x, int32_t value, int64_t blocks, int threads, int64_t shared_bytes) {
  launch(store_kernel, {blocks, 1, 1, threads, shared_bytes, nullptr, "device_test"}, x, value);
}

void find_shared_alignment(int32_t* remainder) {
  launch(alignment_kernel, {1, 1, 1, 32, 96 * 1024, nullptr, "device_test"}, remainder);
}

void set_bytes(uint8_t* x, int value, int64_t bytes) {
  memset_async(x, value, bytes, nullptr, "device_test");
}

}  // namespace adpdm::testing
