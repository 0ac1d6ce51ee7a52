// Rotations of channels on CUDA: a thread holds one block in registers. Neighbouring threads have
// neighbouring channels, so that every load and store of a warp is one run of memory.
#include "core/hadamard.h"
#include "cuda/elementwise.cuh"
#include "cuda/launch.cuh"
#include "cuda/nvtx.h"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 4;  // lets a thread have 128 registers, half of them for a block of 64

template <FloatType kType, int kBlock>
ADPDM_KERNEL(kThreads, kBlocksPerSm)
hadamard_kernel(RowView x, float* y) {
  const int64_t stride = x.columns / kBlock, index = block_x() * kThreads + thread_index();
  if (index >= x.rows * stride) return;
  const int64_t row = index / stride, first = index % stride;
  float v[kBlock];
  ADPDM_UNROLL
  for (int j = 0; j < kBlock; ++j) v[j] = load_float(x.data, row * x.stride + first + j * stride, kType);
  hadamard_block<kBlock>(v);
  ADPDM_UNROLL
  for (int j = 0; j < kBlock; ++j) store(y + row * x.columns + first + j * stride, v[j]);
}

}  // namespace

void hadamard(const RowView& x, int64_t block, float* y, Stream stream) {
  const Range range([&] { return range_text("hadamard", {x.rows, x.columns, block}, x.type); });
  const int64_t threads = x.rows * (x.columns / block);
  const LaunchShape shape = {(threads + kThreads - 1) / kThreads, 1, 1, kThreads, 0, stream, "hadamard"};
  with_float_type(x.type, [&](auto type) {
    if (block == 4) return launch(hadamard_kernel<type(), 4>, shape, x, y);
    if (block == 16) return launch(hadamard_kernel<type(), 16>, shape, x, y);
    launch(hadamard_kernel<type(), 64>, shape, x, y);
  });
}

}  // namespace adpdm::cuda
