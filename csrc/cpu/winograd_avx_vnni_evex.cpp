// Winograd's F(4x4, 3x3) for AVX-VNNI's products where only AVX-512 VNNI encodes them.
#define ADPDM_ISA_NAMESPACE avx_vnni_evex
#define ADPDM_DOT_ENCODING "evex"
#include "cpu/winograd_256.inc"

namespace adpdm::cpu::avx_vnni_evex {

extern const WinogradKernel winograd_4x4 = kernel<4>(kMinTilesAvxVnni);

}  // namespace adpdm::cpu::avx_vnni_evex
