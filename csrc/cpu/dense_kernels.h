// The per-instruction-set part of the float layers of an adaptive embedding.
#pragma once

#include "core/adaptive_embedding.h"
#include "cpu/isa.h"

namespace adpdm::cpu {

// Rows that reach up to a multiple of 16 floats, filled up with zeros.
struct PaddedRows {
  float* data;
  int64_t rows;
  int64_t step;  // floats from row to row, a multiple of 16
};

// Some outputs of a layer: y [x.rows, y_step] gets columns [0, layer.outputs).
ADPDM_DECLARE_PER_ISA(void dense(const PaddedRows& x, const DenseLayer& layer, float* y, int64_t y_step))

// data [n] = silu(data), n a multiple of 16; zero stays zero.
ADPDM_DECLARE_PER_ISA(void silu_in_place(float* data, int64_t n))

}  // namespace adpdm::cpu
