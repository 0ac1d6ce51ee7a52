// The integer GEMM tile for AVX2 with FMA, vectorised by the compiler.
#define ADPDM_ISA_NAMESPACE avx2
#include "cpu/igemm.inc"
