// Rotations of channels on CUDA: a thread holds one block in registers. Neighbouring threads have
// neighbouring channels, so that every load and store of a warp is one run of memory.
#include "core/hadamard.h"
#include "cuda/elementwise.cuh"
#include "cuda/hadamard.cuh"
#include "cuda/launch.cuh"
#include "cuda/nvtx.h"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 4;  // lets a thread have 128 registers, half of them for a block of 64

template <FloatType kType, int kBlock>
ADPDM_KERNEL(kThreads, kBlocksPerSm)
hadamard_kernel(RowView x, float* y) {
  const RotatedPlace place(block_x() * kThreads + thread_index(), x.columns, kBlock);
  if (place.row >= x.rows) return;
  float values[kBlock];
  load_block<kType>(x.data, place.row * x.stride + place.channel, place.stride, values);
  hadamard_block<kBlock>(values);
  float* const first = y + place.row * x.columns + place.channel;
  ADPDM_UNROLL
  for (int j = 0; j < kBlock; ++j) store(first + j * place.stride, values[j]);
}

template <FloatType kType, int kBlock>
ADPDM_KERNEL(kThreads, kBlocksPerSm)
hadamard_quantize_kernel(RowView x, GroupedQParams qparams, int num_bits, int8_t* codes) {
  const RotatedPlace place(block_x() * kThreads + thread_index(), x.columns, kBlock);
  if (place.row >= x.rows) return;
  const Quantizer q = current_quantizer(qparams, signed_range(num_bits));
  float values[kBlock];
  load_block<kType>(x.data, place.row * x.stride + place.channel, place.stride, values);
  store_rotated(values, q, codes + place.row * x.columns + place.channel, place.stride);
}

LaunchShape shape_of(const RowView& x, int64_t block, Stream stream, const char* op) {
  const int64_t threads = x.rows * (x.columns / block);
  return {(threads + kThreads - 1) / kThreads, 1, 1, kThreads, 0, stream, op};
}

}  // namespace

void hadamard(const RowView& x, int64_t block, float* y, Stream stream) {
  const Range range([&] { return range_text("hadamard", {x.rows, x.columns, block}, x.type); });
  const LaunchShape shape = shape_of(x, block, stream, "hadamard");
  with_float_type(x.type, [&](auto type) {
    with_hadamard_block(block, [&](auto size) { launch(hadamard_kernel<type(), size()>, shape, x, y); });
  });
}

void hadamard_quantize(const RowView& x, int64_t block, const GroupedQParams& qparams, int num_bits,
                       int8_t* codes, Stream stream) {
  const Range range([&] { return range_text("hadamard_quantize", {x.rows, x.columns, block}, x.type); });
  const LaunchShape shape = shape_of(x, block, stream, "hadamard_quantize");
  with_float_type(x.type, [&](auto type) {
    with_hadamard_block(block, [&](auto size) {
      launch(hadamard_quantize_kernel<type(), size()>, shape, x, qparams, num_bits, codes);
    });
  });
}

}  // namespace adpdm::cuda
