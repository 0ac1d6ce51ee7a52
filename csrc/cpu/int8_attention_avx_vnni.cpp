// int8_attention.inc for AVX-VNNI.
#define ADPDM_ISA_NAMESPACE avx_vnni
#define ADPDM_DOT_ENCODING "vex"
#include "cpu/int8_attention.inc"
