// The per-instruction-set part of the observer: contiguous elements into a private histogram.
#pragma once

#include "core/quant_math.h"
#include "core/types.h"
#include "cpu/isa.h"

namespace adpdm::cpu {

// Neighbouring elements count into different copies, so that equal values do not wait for each other's store.
constexpr int kHistogramCopies = 4;

// What one thread has seen.
struct LocalHistogram {
  uint32_t counts[kHistogramCopies][kHistogramBins] = {};
  float smallest = INFINITY;
  float largest = -INFINITY;
  bool has_nan = false;
};

// Adds x [size] of type; the caller keeps the total below 2^32.
ADPDM_DECLARE_PER_ISA(void observe_row(const void* x, FloatType type, int64_t size,
                                       LocalHistogram* histogram))

}  // namespace adpdm::cpu
