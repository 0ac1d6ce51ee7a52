// hadamard.inc for AVX-512.
#define ADPDM_ISA_NAMESPACE avx512
#include "cpu/hadamard.inc"
