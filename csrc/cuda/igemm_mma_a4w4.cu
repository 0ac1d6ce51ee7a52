// Instances of the mma.sync kernel: 4-bit activations and weights on 4-bit tensor cores.
#include "cuda/igemm_mma.cuh"

namespace adpdm::cuda {

MmaKernelList mma_kernels_a4w4() {
  static const MmaKernel kernels[] = {
      mma_kernel<IgemmMode::kA4W4, 64, 64, 32, false>(),
      mma_kernel<IgemmMode::kA4W4, 128, 64, 64, false>(),
      mma_kernel<IgemmMode::kA4W4, 128, 128, 64, false>(),
  };
  return {std::begin(kernels), std::end(kernels)};
}

}  // namespace adpdm::cuda
