// hadamard.inc for AVX2.
#define ADPDM_ISA_NAMESPACE avx2
#include "cpu/hadamard.inc"
