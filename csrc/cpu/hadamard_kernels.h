// The per-instruction-set part of rotations: whole rows.
#pragma once

#include "core/types.h"
#include "cpu/isa.h"
#include "cpu/quantize_kernels.h"

namespace adpdm::cpu {

// Floats of `room` below.
constexpr int64_t hadamard_room(int64_t columns) { return columns + 16; }

// x [columns] of type -> y [columns]; see core/hadamard.h.
ADPDM_DECLARE_PER_ISA(void hadamard_row(const void* x, FloatType type, int64_t columns, int64_t block,
                                        float* y))

// x [columns] of type -> codes [columns] of the rotated row.
ADPDM_DECLARE_PER_ISA(void hadamard_quantize_row(const void* x, FloatType type, int64_t columns,
                                                 int64_t block, const Quantizer& quantizer,
                                                 float* room,  // [hadamard_room(columns)], not x
                                                 int8_t* codes))

}  // namespace adpdm::cpu
