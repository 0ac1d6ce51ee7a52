// The integer GEMM tile for AVX2 with FMA.
#define ADPDM_ISA_NAMESPACE avx2
#include "cpu/igemm.inc"
