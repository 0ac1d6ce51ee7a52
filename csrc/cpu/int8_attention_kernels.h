// The per-instruction-set part of attention in integers: keys and values of a head in codes, then a few
// queries against all of them.
#pragma once

#include "core/types.h"
#include "cpu/attention_kernels.h"
#include "cpu/isa.h"
#include "cpu/quantize_kernels.h"

namespace adpdm::cpu {

// Queries that run together.
constexpr int64_t kInt8Queries = 6;

// Tokens whose weights share a scale: the largest of them is 255.
constexpr int64_t kInt8Block = 64;

// One head of one image. "Padded" is rounded up to a multiple of 16; a word holds word_codes codes
// (code_words.h).
struct Int8Head {
  uint32_t* keys;         // [padded tokens / 16][words of head_size][16 tokens]
  uint32_t* values;       // [padded channels / 16][words of padded tokens][16 channels]
  int32_t* key_offset;    // [padded tokens] what takes the shift of the query's codes out of a sum
  float* key_scale;       // [padded tokens] step size of a key
  float* value_exponent;  // [padded tokens] log2 of the step size of a value; -inf beyond the last
  float* value_inverse;   // [padded tokens] 1 / step size of a value; 0 beyond the last
  float* channel_scale;   // [padded channels] what the values of a channel were divided by first
  int64_t tokens;
  int64_t head_size;
};

// Rows of one head, head_size elements each.
struct HeadRows {
  const void* data;
  FloatType type;
  int64_t step;  // elements between rows
};

// What the functions below work in.
struct Int8Scratch {
  float* floats;    // [kInt8Scratch * padded channels]
  uint32_t* words;  // [kInt8Scratch * padded channels]
};
constexpr int64_t kInt8Scratch = 8;

struct Int8AttentionKernel {
  int64_t word_codes;
  // Fills all arrays of head.
  void (*pack)(const Int8Head& head, const HeadRows& keys, const HeadRows& values,
               const Int8Scratch& scratch);
  // queries -> end, up to kInt8Queries of them.
  void (*attend)(const Int8Head& head, const HeadRows& queries, int64_t num_queries,
                 const Int8Scratch& scratch, const AttentionEnd& end);
};

ADPDM_DECLARE_PER_ISA_AND_VNNI(extern const Int8AttentionKernel int8_attention_kernel)

}  // namespace adpdm::cpu
