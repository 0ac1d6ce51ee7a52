// Softmax attention that ends in the codes of the layer behind it: no score and no float result is stored.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace adpdm {

// Heads lie side by side in the channels: head h has channels [h * head_size, (h + 1) * head_size).
struct TokenView {
  const void* data;    // [N, tokens, heads * head_size] type
  int64_t image_step;  // elements between images
  int64_t token_step;  // elements between tokens
};

struct AttentionQuantizeArgs {
  TokenView query, key, value;
  FloatType type;
  int64_t batch;  // N
  int64_t heads;
  int64_t head_size;
  int64_t queries;   // tokens of query
  int64_t keys;      // tokens of key and value, at least 1
  bool int8;         // multiply codes of 8 bits instead of floats
  int64_t hadamard;  // channels of all heads rotated together before they are quantized, 0: none
  GroupedQParams qparams;
  int num_bits;
  int8_t* codes;  // [N, queries, heads * head_size] i8
};

namespace cpu {
// softmax(query key^T / sqrt(head_size)) value per head, in codes. Throws std::out_of_range for a group index
// outside [0, num_groups) before anything is written.
//
// With int8, both products are integer ones, at a quarter of the multiplications of float32: of queries and
// of keys less their mean under a step size per token, and of weights (0 to 255 in each block of 64 tokens)
// and values under a step size per channel times one per token. docs/numerics.md has the formulas.
void attention_quantize(const AttentionQuantizeArgs& args);
}  // namespace cpu

}  // namespace adpdm
