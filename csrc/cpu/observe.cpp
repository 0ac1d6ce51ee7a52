// Activation histograms on the CPU: every thread counts for itself; integers and extrema merge the same in
// any order.
#include "core/observe.h"

#include <mutex>

#include "core/group_index.h"
#include "cpu/chunks.h"
#include "cpu/observe_kernels.h"

namespace adpdm::cpu {
namespace {

// A private count is 32 bits wide; chunks are merged before that many elements were seen.
constexpr int64_t kMaxLocalElements = int64_t{1} << 31;

void merge(const LocalHistogram& local, int64_t* counts, float* extrema) {
  for (int bin = 0; bin < kHistogramBins; ++bin) {
    int64_t total = 0;
    for (const auto& copy : local.counts) total += copy[bin];
    counts[bin] += total;
  }
  // A NaN bound compares false and so stays.
  if (local.smallest < extrema[0]) extrema[0] = local.smallest;
  if (local.largest > extrema[1]) extrema[1] = local.largest;
  if (local.has_nan) extrema[0] = extrema[1] = NAN;
}

}  // namespace

void observe(const RowView& view, const ObserverTables& tables) {
  if (*tables.step_index < 0 || *tables.step_index >= tables.num_steps) {
    throw std::out_of_range(
        "observe: step_index must be in [0, num_steps=" + std::to_string(tables.num_steps) + "), got " +
        std::to_string(*tables.step_index));
  }
  const RowView x = collapse(view);
  int64_t* counts = tables.counts + *tables.step_index * int64_t{kHistogramBins};
  float* extrema = tables.extrema + *tables.step_index * int64_t{2};
  const auto observe_row = ADPDM_SELECT_ISA(observe_row);
  std::mutex merging;
  for_each_range(x.rows, x.columns, [&](PieceRange range) {
    while (!range.empty()) {
      LocalHistogram local;
      for (int64_t seen = 0; !range.empty() && seen < kMaxLocalElements; range.next()) {
        const Piece piece = range.piece();
        const char* data = static_cast<const char*>(x.data);
        observe_row(data + (piece.row * x.stride + piece.column) * float_size(x.type), x.type, piece.columns,
                    &local);
        seen += piece.columns;
      }
      const std::lock_guard<std::mutex> lock(merging);
      merge(local, counts, extrema);
    }
  });
}

}  // namespace adpdm::cpu
