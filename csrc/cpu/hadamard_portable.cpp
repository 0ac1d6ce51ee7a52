// hadamard.inc for the baseline of the architecture.
#define ADPDM_ISA_NAMESPACE portable
#include "cpu/hadamard.inc"
