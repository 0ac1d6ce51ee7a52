// Winograd's F(4x4, 3x3) for AVX-VNNI.
#define ADPDM_ISA_NAMESPACE avx_vnni
#define ADPDM_DOT_ENCODING "vex"
#include "cpu/winograd_256.inc"

namespace adpdm::cpu::avx_vnni {

extern const WinogradKernel winograd_4x4 = kernel<4>(kMinTilesAvxVnni);

}  // namespace adpdm::cpu::avx_vnni
