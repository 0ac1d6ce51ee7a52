// int8_attention.inc for AVX2.
#define ADPDM_ISA_NAMESPACE avx2
#include "cpu/int8_attention.inc"
