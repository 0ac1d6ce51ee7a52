// The integer GEMM tile for the architecture's baseline.
#define ADPDM_ISA_NAMESPACE portable
#include "cpu/igemm.inc"
