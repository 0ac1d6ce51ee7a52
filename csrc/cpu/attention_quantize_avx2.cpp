// attention_quantize.inc for AVX2.
#define ADPDM_ISA_NAMESPACE avx2
#include "cpu/attention_quantize.inc"
