// Rotations on the CPU: rows are handed to the threads.
#include "core/hadamard.h"

#include "cpu/chunks.h"
#include "cpu/hadamard_kernels.h"

namespace adpdm::cpu {

void hadamard(const RowView& x, int64_t block, float* y) {
  const auto hadamard_row = ADPDM_SELECT_ISA(hadamard_row);
  if (x.columns == 0) return;
  const int64_t grain = std::max<int64_t>(1, kMinElementsPerThread / x.columns);
  parallel_for(0, x.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const char* data = static_cast<const char*>(x.data) + row * x.stride * float_size(x.type);
      hadamard_row(data, x.type, x.columns, block, y + row * x.columns);
    }
  });
}

}  // namespace adpdm::cpu
