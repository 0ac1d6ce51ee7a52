// The embedding of timestep and class, and the rows it makes of a block, on the CPU.
#include "core/adaptive_embedding.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/igemm.h"
#include "cpu/dense_kernels.h"
#include "cpu/parallel.h"

namespace adpdm::cpu {
namespace {

constexpr int64_t kLaneFloats = 16;
constexpr int64_t kGrainOutputs = 16;  // a multiple of what a kernel takes at a time

// Multiplications per thread, some 20 us of work: below, a second thread costs more than it saves.
constexpr int64_t kMinProducts = int64_t{1} << 19;

int64_t padded(int64_t columns) { return ceil_div(columns, kLaneFloats) * kLaneFloats; }

// Rows of zeros in a buffer that is kept between calls.
PaddedRows zeros(std::vector<float>& buffer, int64_t rows, int64_t columns) {
  buffer.assign(static_cast<size_t>(rows * padded(columns)), 0.0f);
  return {buffer.data(), rows, padded(columns)};
}

PaddedRows copy(std::vector<float>& buffer, const float* x, int64_t rows, int64_t columns) {
  const PaddedRows copied = zeros(buffer, rows, columns);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * columns, columns, copied.data + r * copied.step);
  return copied;
}

void apply_silu(const PaddedRows& x) { ADPDM_SELECT_ISA(silu_in_place)(x.data, x.rows * x.step); }

// The outputs [first, last) of a layer.
DenseLayer part_of(const DenseLayer& layer, int64_t first, int64_t last) {
  return {layer.weight + first * layer.columns, layer.bias ? layer.bias + first : nullptr, last - first,
          layer.columns};
}

void run_dense(const PaddedRows& x, const DenseLayer& layer, float* y, int64_t y_step) {
  const auto dense = ADPDM_SELECT_ISA(dense);
  const int64_t grain = ceil_div(kMinProducts, std::max<int64_t>(1, kGrainOutputs * x.rows * layer.columns));
  parallel_for(0, ceil_div(layer.outputs, kGrainOutputs), grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kGrainOutputs;
    const int64_t last = std::min(end * kGrainOutputs, layer.outputs);
    dense(x, part_of(layer, first, last), y + first, y_step);
  });
}

// Rows that differ: 1 where all are the same.
int64_t distinct_rows(const float* x, int64_t rows, int64_t columns) {
  const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
  for (int64_t r = 1; r < rows; ++r) {
    if (std::memcmp(x, x + r * columns, bytes) != 0) return rows;
  }
  return rows == 0 ? 0 : 1;
}

// silu(x) of the rows that differ.
PaddedRows silu_rows(const float* x, int64_t rows, int64_t columns) {
  thread_local std::vector<float> buffer;
  const PaddedRows copied = copy(buffer, x, distinct_rows(x, rows, columns), columns);
  apply_silu(copied);
  return copied;
}

// Fill rows [have, rows) of y with the first one; nothing where it has them all.
void repeat_first(float* y, int64_t have, int64_t rows, int64_t columns) {
  for (int64_t r = have; r < rows; ++r) std::copy_n(y, columns, y + r * columns);
}

void check_labels(const TimestepEmbeddingArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    if (args.labels[r] >= 0 && args.labels[r] < args.classes) continue;
    throw std::out_of_range("timestep_embedding: labels must be in [0, classes=" +
                            std::to_string(args.classes) + "), got " + std::to_string(args.labels[r]));
  }
}

}  // namespace

void timestep_embedding(const TimestepEmbeddingArgs& args) {
  if (args.table) check_labels(args);
  if (args.rows == 0) return;
  thread_local std::vector<float> buffers[2];
  const int64_t rows = distinct_rows(args.waves, args.wave_rows, args.first.columns);
  const int64_t channels = args.second.outputs;
  const PaddedRows hidden = zeros(buffers[1], rows, args.first.outputs);
  run_dense(copy(buffers[0], args.waves, rows, args.first.columns), args.first, hidden.data, hidden.step);
  apply_silu(hidden);
  run_dense(hidden, args.second, args.result, channels);
  repeat_first(args.result, rows, args.rows, channels);
  if (!args.table) return;
  for (int64_t r = 0; r < args.rows; ++r) {
    const float* row = args.table + args.labels[r] * channels;
    float* result = args.result + r * channels;
    for (int64_t c = 0; c < channels; ++c) result[c] += row[c];
  }
}

void silu_linear(const SiluLinearArgs& args) {
  if (args.rows == 0 || args.layer.outputs == 0) return;
  const PaddedRows x = silu_rows(args.x, args.rows, args.layer.columns);
  run_dense(x, args.layer, args.result, args.layer.outputs);
  repeat_first(args.result, x.rows, args.rows, args.layer.outputs);
}

void adaptive_rows(const AdaptiveRowsArgs& args) {
  const int64_t channels = args.layer.outputs / kAdaptiveParts;
  if (args.rows == 0 || channels == 0) return;
  const PaddedRows x = silu_rows(args.embedding, args.rows, args.layer.columns);
  for (int64_t p = 0; p < kAdaptiveParts; ++p) {
    const int64_t role = p % 3;  // shift, scale, gate
    float* modulation = args.modulation[p / 3];
    float* y = role == 2 ? args.gate[p / 3] : modulation + (role == 0 ? channels : 0);
    run_dense(x, part_of(args.layer, p * channels, (p + 1) * channels), y,
              role == 2 ? channels : 2 * channels);
  }
  for (float* modulation : args.modulation) repeat_first(modulation, x.rows, args.rows, 2 * channels);
  for (float* gate : args.gate) repeat_first(gate, x.rows, args.rows, channels);
}

}  // namespace adpdm::cpu
