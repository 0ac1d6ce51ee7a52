// Instances of the wgmma kernel. A build compiles this file for sm_90a only, where that is wanted at all.
#include <stdexcept>

#include "cuda/igemm_wgmma.cuh"

namespace adpdm::cuda {

const WgmmaKernel& find_wgmma_kernel(IgemmTile tile) {
  static const WgmmaKernel kernels[] = {wgmma_kernel<128>(), wgmma_kernel<160>(), wgmma_kernel<256>()};
  for (const WgmmaKernel& kernel : kernels) {
    if (tile == IgemmTile{kWgmmaTileRows, kernel.tile_outputs}) return kernel;
  }
  throw std::logic_error("igemm: the planner chose a wgmma kernel that does not exist");
}

}  // namespace adpdm::cuda
