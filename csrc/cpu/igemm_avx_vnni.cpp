// igemm_avx_vnni.inc for AVX-VNNI.
#define ADPDM_ISA_NAMESPACE avx_vnni
#define ADPDM_DOT_ENCODING "vex"
#include "cpu/igemm_avx_vnni.inc"
