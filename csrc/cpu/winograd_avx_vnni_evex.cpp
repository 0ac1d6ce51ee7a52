// Winograd's F(4x4, 3x3) for AVX-VNNI's products where only AVX-512 VNNI encodes them.
#define ADPDM_ISA_NAMESPACE avx_vnni_evex
#define ADPDM_DOT_ENCODING "evex"
#include "cpu/winograd_256.inc"

namespace adpdm::cpu::avx_vnni_evex {

// Times without and with, 64 and 256 channels: 0.73 and 0.79 for 4 tiles, 0.92 and 1.05 for 9, 1.13 for 16
// (Zen 4, 2026-11).
extern const WinogradKernel winograd_4x4 = kernel<4>(12);

}  // namespace adpdm::cpu::avx_vnni_evex
