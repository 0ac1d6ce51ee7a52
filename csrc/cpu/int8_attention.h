// Attention whose products are integer ones; attention_quantize() checks and calls.
#pragma once

#include "core/attention_quantize.h"
#include "cpu/attention_kernels.h"

namespace adpdm::cpu {

// Where the head's part of a token begins, in elements.
inline int64_t token_begin(const AttentionQuantizeArgs& args, const TokenView& view, int64_t image,
                           int64_t head, int64_t token) {
  return image * view.image_step + token * view.token_step + head * args.head_size;
}

void int8_attention(const AttentionQuantizeArgs& args, const AttentionEnd& end);

}  // namespace adpdm::cpu
