// Histograms of activations per sampler step, from which every later choice of a range is made.
#pragma once

#include "core/row_view.h"
#include "core/stream.h"
#include "core/types.h"

namespace adpdm {

struct ObserverTables {
  int64_t* counts;            // [num_steps, kHistogramBins], added to
  float* extrema;             // [num_steps, 2] min and max, widened; NaN sticks as NaN in both
  const int32_t* step_index;  // [1] row of the current step
  int64_t num_steps;
};

namespace cpu {

// Adds every element of x to the row of the current step. Throws std::out_of_range for a step outside [0,
// num_steps).
void observe(const RowView& x, const ObserverTables& tables);

}  // namespace cpu

namespace cuda {

// The same on the stream. A step outside [0, num_steps) acts as the nearest inside: a kernel cannot raise.
// Throws CudaError where the launch fails.
void observe(const RowView& x, const ObserverTables& tables, Stream stream);

}  // namespace cuda
}  // namespace adpdm
