// The per-instruction-set part of rotations: whole rows.
#pragma once

#include "core/types.h"
#include "cpu/isa.h"

namespace adpdm::cpu {

// x [columns] of type -> y [columns]; see core/hadamard.h.
ADPDM_DECLARE_PER_ISA(void hadamard_row(const void* x, FloatType type, int64_t columns, int64_t block,
                                        float* y))

}  // namespace adpdm::cpu
