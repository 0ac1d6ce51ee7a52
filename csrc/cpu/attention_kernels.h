// The per-instruction-set part of attention: a few queries of one head against all its keys.
#pragma once

#include "core/types.h"
#include "cpu/isa.h"
#include "cpu/quantize_kernels.h"

namespace adpdm::cpu {

// Queries that run together: with two vectors of results each they keep 12 accumulators busy, which hides the
// latency of a multiplication on every CPU so far.
constexpr int64_t kAttentionQueries = 6;

// Columns of a panel, two AVX-512 vectors.
constexpr int64_t kPanel = 32;

// One head of one image. A panel holds 32 columns of a matrix, rows dense, zeros beyond the last column.
struct AttentionHead {
  const float* keys;    // [panels of tokens][head_size][kPanel] f32: keys transposed
  const float* values;  // [panels of channels][tokens][kPanel] f32
  int64_t tokens;       // of keys and values
  int64_t head_size;
};

// Floats that attend() works in.
constexpr int64_t attention_scratch(int64_t tokens, int64_t head_size) {
  const auto padded = [](int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; };
  return kAttentionQueries * (padded(tokens) + 2 * padded(head_size));
}

// Where the results of a head go: codes, or values where they are rotated before they are quantized.
struct AttentionEnd {
  Quantizer quantizer;
  int8_t* codes;  // [queries, step], or nullptr
  float* values;  // [queries, step]
  int64_t step;

  // From an element on.
  AttentionEnd at(int64_t element) const {
    return {quantizer, codes ? codes + element : nullptr, codes ? nullptr : values + element, step};
  }
};

// query [num_queries, query_step] type -> end, up to kAttentionQueries of them.
ADPDM_DECLARE_PER_ISA(void attend(const AttentionHead& head, const void* query, FloatType type,
                                  int64_t query_step, int64_t num_queries, float* scratch,
                                  const AttentionEnd& end))

}  // namespace adpdm::cpu
