// attention_quantize.inc for the baseline of the architecture.
#define ADPDM_ISA_NAMESPACE portable
#include "cpu/attention_quantize.inc"
