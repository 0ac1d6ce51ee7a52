// Winograd's F(2x2, 3x3) and F(4x4, 3x3) for AVX2.
#define ADPDM_ISA_NAMESPACE avx2
#include "cpu/winograd_256.inc"

namespace adpdm::cpu::avx2 {

extern const WinogradKernel winograd_2x2 = kernel<2>(1);
// Times with 2x2 tiles and with these: 1.05 to 1.13 for 4 of these, 0.64 for one (Zen 4, 2026-11).
extern const WinogradKernel winograd_4x4 = kernel<4>(4);

}  // namespace adpdm::cpu::avx2
