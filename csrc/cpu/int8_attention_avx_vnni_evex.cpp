// int8_attention.inc for AVX-VNNI's products where only AVX-512 VNNI encodes them.
#define ADPDM_ISA_NAMESPACE avx_vnni_evex
#define ADPDM_DOT_ENCODING "evex"
#include "cpu/int8_attention.inc"
