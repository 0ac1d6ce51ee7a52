// Instances of the mma.sync kernel: int8 activations, 4-bit weights.
#include "cuda/igemm_mma.cuh"

namespace adpdm::cuda {

MmaKernelList mma_kernels_a8w4() {
  static const MmaKernel kernels[] = {
      mma_kernel<IgemmMode::kA8W4, 64, 64, 32, false>(),
      mma_kernel<IgemmMode::kA8W4, 128, 64, 64, false>(),
      mma_kernel<IgemmMode::kA8W4, 128, 128, 64, false>(),
      mma_kernel<IgemmMode::kA8W4, 64, 64, 32, true>(),
  };
  return {std::begin(kernels), std::end(kernels)};
}

}  // namespace adpdm::cuda
