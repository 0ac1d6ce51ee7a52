// Attention in integers on the CPU: keys and values of some heads in codes, then all their queries in
// parallel.
#include "cpu/int8_attention.h"

#include <algorithm>
#include <vector>

#include "core/igemm.h"
#include "core/row_view.h"
#include "cpu/int8_attention_kernels.h"
#include "cpu/parallel.h"

namespace adpdm::cpu {
namespace {

// Multiplications per thread, some 20 us of work: below, a second thread costs more than it saves.
constexpr int64_t kMinProducts = int64_t{1} << 21;

// Elements per thread of the packing, the same time.
constexpr int64_t kMinPacked = 16384;

// Words and floats that the packed heads of one round may take, 16 MiB; a single head may take more.
constexpr int64_t kRoundSize = int64_t{1} << 22;

constexpr int64_t kLanes = 16;
constexpr int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }

// The arrays of one packed head, how long they are.
struct HeadSizes {
  int64_t keys, values;  // words
  int64_t tokens, channels;
  int64_t words() const { return keys + values; }
  int64_t floats() const { return 3 * tokens + channels; }
};

HeadSizes sizes_of(const AttentionQuantizeArgs& args, int64_t word_codes) {
  const int64_t tokens = padded(args.keys);
  const int64_t channels = padded(args.head_size);
  return {tokens * ceil_div(args.head_size, word_codes), channels * tokens / word_codes, tokens, channels};
}

// Kept between calls, because fresh pages cost more than small heads take to fill.
struct Buffers {
  std::vector<uint32_t> words;
  std::vector<float> floats;
  std::vector<int32_t> offsets;

  void grow(int64_t num_words, int64_t num_floats, int64_t num_offsets) {
    grow(words, num_words);
    grow(floats, num_floats);
    grow(offsets, num_offsets);
  }
  template <typename T>
  static void grow(std::vector<T>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  }
};

// The arrays of head `i` of a round.
Int8Head head_of(const AttentionQuantizeArgs& args, const HeadSizes& sizes, Buffers& buffers, int64_t i) {
  Int8Head head{};
  head.keys = buffers.words.data() + i * sizes.words();
  head.values = head.keys + sizes.keys;
  head.key_offset = buffers.offsets.data() + i * sizes.tokens;
  head.key_scale = buffers.floats.data() + i * sizes.floats();
  head.value_exponent = head.key_scale + sizes.tokens;
  head.value_inverse = head.value_exponent + sizes.tokens;
  head.channel_scale = head.value_inverse + sizes.tokens;
  head.tokens = args.keys;
  head.head_size = args.head_size;
  return head;
}

Int8Scratch thread_scratch(int64_t channels) {
  thread_local Buffers buffers;
  buffers.grow(kInt8Scratch * channels, kInt8Scratch * channels, 0);
  return {buffers.floats.data(), buffers.words.data()};
}

// The rows of head `index` of all images, from a token on.
HeadRows rows_of(const AttentionQuantizeArgs& args, const TokenView& view, int64_t index, int64_t token) {
  const int64_t begin = token_begin(args, view, index / args.heads, index % args.heads, token);
  const char* data = static_cast<const char*>(view.data) + begin * float_size(args.type);
  return {data, args.type, view.token_step};
}

}  // namespace

void int8_attention(const AttentionQuantizeArgs& args, const AttentionEnd& end) {
  const Int8AttentionKernel& kernel = ADPDM_SELECT_ISA_OR_VNNI(int8_attention_kernel);
  const HeadSizes sizes = sizes_of(args, kernel.word_codes);
  const int64_t all_heads = args.batch * args.heads;
  const int64_t round_heads =
      std::clamp(kRoundSize / (sizes.words() + sizes.floats()), int64_t{1}, all_heads);
  thread_local Buffers kept;
  Buffers& buffers = kept;
  buffers.grow(round_heads * sizes.words(), round_heads * sizes.floats(), round_heads * sizes.tokens);
  const int64_t channels = args.heads * args.head_size;
  const int64_t blocks = ceil_div(args.queries, kInt8Queries);
  const int64_t pack_grain = ceil_div(kMinPacked, args.keys * args.head_size);
  const int64_t attend_grain = ceil_div(kMinProducts, 2 * kInt8Queries * args.keys * args.head_size);
  for (int64_t first = 0; first < all_heads; first += round_heads) {
    const int64_t count = std::min(round_heads, all_heads - first);
    parallel_for(0, count, pack_grain, [&](int64_t begin, int64_t end) {
      const Int8Scratch scratch = thread_scratch(sizes.channels);
      for (int64_t i = begin; i < end; ++i) {
        kernel.pack(head_of(args, sizes, buffers, i), rows_of(args, args.key, first + i, 0),
                    rows_of(args, args.value, first + i, 0), scratch);
      }
    });
    parallel_for(0, count * blocks, attend_grain, [&](int64_t begin, int64_t last) {
      const Int8Scratch scratch = thread_scratch(sizes.channels);
      for (int64_t block = begin; block < last; ++block) {
        const int64_t i = block / blocks;
        const int64_t query = block % blocks * kInt8Queries;
        const int64_t image = (first + i) / args.heads;
        const int64_t element =
            (image * args.queries + query) * channels + (first + i) % args.heads * args.head_size;
        kernel.attend(head_of(args, sizes, buffers, i), rows_of(args, args.query, first + i, query),
                      std::min(kInt8Queries, args.queries - query), scratch, end.at(element));
      }
    });
  }
}

}  // namespace adpdm::cpu
