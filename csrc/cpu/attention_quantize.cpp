// Attention on the CPU: keys and values of one head at a time in panels, then its queries in parallel.
#include "core/attention_quantize.h"

#include <algorithm>
#include <vector>

#include "core/float_convert.h"
#include "core/hadamard.h"
#include "core/igemm.h"
#include "core/row_view.h"
#include "cpu/attention_kernels.h"
#include "cpu/int8_attention.h"
#include "cpu/parallel.h"

namespace adpdm::cpu {
namespace {

// Multiplications per thread, some 20 us of work: below, a second thread costs more than it saves.
constexpr int64_t kMinProducts = int64_t{1} << 20;

// Elements per thread of the packing, the same time.
constexpr int64_t kMinPacked = 32768;

// Calls body(element), where element(i) is element i of data as a float.
template <typename Body>
void with_elements(const void* data, FloatType type, Body&& body) {
  if (type == FloatType::kFloat32) {
    return body([=](int64_t i) { return static_cast<const float*>(data)[i]; });
  }
  const auto* half = static_cast<const uint16_t*>(data);
  if (type == FloatType::kBFloat16) return body([=](int64_t i) { return bf16_to_float(half[i]); });
  body([=](int64_t i) { return f16_to_float(half[i]); });
}

// Panels of 32 tokens: [head_size][32], the keys of a panel side by side.
void pack_keys(const AttentionQuantizeArgs& args, int64_t image, int64_t head, float* keys) {
  const auto pack_panel = [&](int64_t panel, auto element) {
    float* target = keys + panel * args.head_size * kPanel;
    const int64_t first = panel * kPanel;
    const int64_t count = std::min(kPanel, args.keys - first);
    if (count < kPanel) std::fill_n(target, args.head_size * kPanel, 0.0f);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t from = token_begin(args, args.key, image, head, first + j);
      for (int64_t d = 0; d < args.head_size; ++d) target[d * kPanel + j] = element(from + d);
    }
  };
  with_elements(args.key.data, args.type, [&](auto element) {
    parallel_for(0, ceil_div(args.keys, kPanel), ceil_div(kMinPacked, kPanel * args.head_size),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t panel = begin; panel < end; ++panel) pack_panel(panel, element);
                 });
  });
}

// Panels of 32 channels: [tokens][32].
void pack_values(const AttentionQuantizeArgs& args, int64_t image, int64_t head, float* values) {
  const auto pack_token = [&](int64_t token, auto element) {
    const int64_t from = token_begin(args, args.value, image, head, token);
    for (int64_t d = 0; d < args.head_size; d += kPanel) {
      float* target = values + (d / kPanel * args.keys + token) * kPanel;
      const int64_t count = std::min(kPanel, args.head_size - d);
      for (int64_t i = 0; i < count; ++i) target[i] = element(from + d + i);
      std::fill(target + count, target + kPanel, 0.0f);
    }
  };
  with_elements(args.value.data, args.type, [&](auto element) {
    parallel_for(0, args.keys, ceil_div(kMinPacked, args.head_size), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) pack_token(token, element);
    });
  });
}

float* grown(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

void attend_head(const AttentionQuantizeArgs& args, int64_t image, int64_t head, const AttentionHead& packed,
                 const AttentionEnd& end) {
  const auto attend = ADPDM_SELECT_ISA(attend);
  const int64_t channels = args.heads * args.head_size;
  const int64_t blocks = ceil_div(args.queries, kAttentionQueries);
  const int64_t products = 2 * kAttentionQueries * args.keys * args.head_size;
  parallel_for(0, blocks, ceil_div(kMinProducts, products), [&](int64_t begin, int64_t last) {
    thread_local std::vector<float> buffer;
    float* scratch = grown(buffer, attention_scratch(args.keys, args.head_size));
    for (int64_t block = begin; block < last; ++block) {
      const int64_t first = block * kAttentionQueries;
      const int64_t count = std::min(kAttentionQueries, args.queries - first);
      const char* query = static_cast<const char*>(args.query.data) +
                          token_begin(args, args.query, image, head, first) * float_size(args.type);
      attend(packed, query, args.type, args.query.token_step, count, scratch,
             end.at((image * args.queries + first) * channels + head * args.head_size));
    }
  });
}

void float_attention(const AttentionQuantizeArgs& args, const AttentionEnd& end) {
  // Kept between calls, because fresh pages cost more than small ones take to fill.
  thread_local std::vector<float> buffer;
  const int64_t key_floats = ceil_div(args.keys, kPanel) * kPanel * args.head_size;
  const int64_t value_floats = ceil_div(args.head_size, kPanel) * kPanel * args.keys;
  float* const keys = grown(buffer, key_floats + value_floats);
  float* const values = keys + key_floats;
  for (int64_t image = 0; image < args.batch; ++image) {
    for (int64_t head = 0; head < args.heads; ++head) {
      pack_keys(args, image, head, keys);
      pack_values(args, image, head, values);
      attend_head(args, image, head, {keys, values, args.keys, args.head_size}, end);
    }
  }
}

}  // namespace

void attention_quantize(const AttentionQuantizeArgs& args) {
  const Quantizer quantizer = current_quantizer("attention_quantize", args.qparams, args.num_bits);
  const int64_t channels = args.heads * args.head_size;
  const int64_t rows = args.batch * args.queries;
  if (rows * channels == 0) return;
  // Of all heads, which are rotated together.
  thread_local std::vector<float> kept;
  AttentionEnd end{quantizer, args.codes, nullptr, channels};
  if (args.hadamard) end = {quantizer, nullptr, grown(kept, rows * channels), channels};
  args.int8 ? int8_attention(args, end) : float_attention(args, end);
  if (!args.hadamard) return;
  hadamard_quantize({end.values, FloatType::kFloat32, rows, channels, channels}, args.hadamard, args.qparams,
                    args.num_bits, args.codes);
}

}  // namespace adpdm::cpu
