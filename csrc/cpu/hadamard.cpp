// Rotations on the CPU: rows are handed to the threads.
#include "core/hadamard.h"

#include <vector>

#include "cpu/chunks.h"
#include "cpu/hadamard_kernels.h"

namespace adpdm::cpu {
namespace {

// Calls body(row, its address) for all rows, in parallel, with one `make()` per thread as a last argument.
template <typename Make, typename Body>
void for_each_row(const RowView& x, Make&& make, Body&& body) {
  if (x.columns == 0) return;
  const int64_t grain = std::max<int64_t>(1, kMinElementsPerThread / x.columns);
  parallel_for(0, x.rows, grain, [&](int64_t begin, int64_t end) {
    auto own = make();
    for (int64_t row = begin; row < end; ++row) {
      body(row, static_cast<const char*>(x.data) + row * x.stride * float_size(x.type), own);
    }
  });
}

}  // namespace

void hadamard(const RowView& x, int64_t block, float* y) {
  const auto hadamard_row = ADPDM_SELECT_ISA(hadamard_row);
  for_each_row(
      x, [] { return 0; },
      [&](int64_t row, const char* data, int) {
        hadamard_row(data, x.type, x.columns, block, y + row * x.columns);
      });
}

void hadamard_quantize(const RowView& x, int64_t block, const GroupedQParams& qparams, int num_bits,
                       int8_t* codes) {
  const auto hadamard_quantize_row = ADPDM_SELECT_ISA(hadamard_quantize_row);
  const Quantizer quantizer = current_quantizer("quantize", qparams, num_bits);
  for_each_row(
      x, [&] { return std::vector<float>(static_cast<size_t>(hadamard_room(x.columns))); },
      [&](int64_t row, const char* data, std::vector<float>& room) {
        hadamard_quantize_row(data, x.type, x.columns, block, quantizer, room.data(),
                              codes + row * x.columns);
      });
}

}  // namespace adpdm::cpu
