// Quantization to codes, packing and back on CUDA: 16 bytes a lane and load, codes put side by side by
// shuffles so that they leave 16 bytes a lane, too.
#include "core/quantize.h"
#include "cuda/elementwise.cuh"
#include "cuda/launch.cuh"
#include "cuda/nvtx.h"
#include "cuda/quantizer.cuh"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 128;  // small blocks spread the small tensors of low resolutions over the device
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 8;  // lets a thread have 64 registers: up to 32 of them hold values in flight
constexpr int kHalfBlock = kInt4Block / 2;

// One warp's share of the codes, and of the blocks of 32 packed ones.
constexpr int64_t kWarpCodes = 16 * kWarpSize;
constexpr int64_t kWarpBlocks = kWarpSize;

// Lanes whose vectors of x make 16 codes.
template <FloatType kType>
constexpr int kLanesPerStore = 16 / kVector<kType>;

// Words of four codes in a vector.
template <FloatType kType>
constexpr int kVectorWords = kVector<kType> / 4;

ADPDM_DEVICE int64_t global_warp() { return block_x() * kWarps + warp_index(); }

LaunchShape shape_for_warps(const char* op, int64_t warps, Stream stream) {
  return {(warps + kWarps - 1) / kWarps, 1, 1, kThreads, 0, stream, op};
}

// Among kLanes neighbouring lanes, lane l gives item[i] to lane i and gets its item[l], as item[i].
template <int kLanes, int kWords>
ADPDM_DEVICE void transpose_lanes(uint32_t (&item)[kLanes][kWords]) {
  ADPDM_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    const bool upper = (lane_index() & mask) != 0;
    ADPDM_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if ((i & mask) != 0) continue;
      ADPDM_UNROLL
      for (int w = 0; w < kWords; ++w) {
        uint32_t& low = item[i][w];
        uint32_t& high = item[i | mask][w];
        const uint32_t other = shuffle_xor(upper ? low : high, mask);
        low = upper ? other : low;
        high = upper ? high : other;
      }
    }
  }
}

template <int kLanes, int kWords>
ADPDM_DEVICE Bytes16 joined(const uint32_t (&item)[kLanes][kWords]) {
  static_assert(kLanes * kWords == 4, "16 bytes");
  Bytes16 bytes;
  ADPDM_UNROLL
  for (int w = 0; w < 4; ++w) bytes.word[w] = item[w / kWords][w % kWords];
  return bytes;
}

// ---- 8-bit codes ----

// The warp's 512 codes from `first` on. The quantizer takes three dependent loads: x is asked for before.
template <FloatType kType>
ADPDM_DEVICE void quantize_warp(const RowView& x, int64_t first, const GroupedQParams& qparams,
                                CodeRange range, int8_t* codes) {
  constexpr int kLanes = kLanesPerStore<kType>, kStep = kWarpSize * kVector<kType>;
  Bytes16 raw[kLanes];
  load_chunks<kType>(x, first, raw);
  const Quantizer q = current_quantizer(qparams, range);
  uint32_t words[kLanes][kVectorWords<kType>];
  ADPDM_UNROLL
  for (int c = 0; c < kLanes; ++c) {
    float values[kVector<kType>];
    unpack_vector<kType>(raw[c], values);
    ADPDM_UNROLL
    for (int w = 0; w < kVectorWords<kType>; ++w) words[c][w] = code_word(values + 4 * w, q);
  }
  transpose_lanes(words);  // lane l of a group now holds chunk l of all its lanes
  const int chunk = lane_index() % kLanes, group = lane_index() / kLanes;
  store(reinterpret_cast<Bytes16*>(codes + first + chunk * kStep) + group, joined(words));
}

template <FloatType kType>
ADPDM_KERNEL(kThreads, kBlocksPerSm)
quantize_kernel(RowView x, GroupedQParams qparams, CodeRange range, int8_t* codes, bool vectors) {
  const int64_t first = global_warp() * kWarpCodes, size = x.rows * x.columns;
  if (first >= size) return;
  if (vectors && size - first >= kWarpCodes) return quantize_warp<kType>(x, first, qparams, range, codes);
  const Quantizer q = current_quantizer(qparams, range);
  const int64_t end = first + kWarpCodes < size ? first + kWarpCodes : size;
  for (int64_t i = first + lane_index(); i < end; i += kWarpSize) {
    store(codes + i, code_of(load_float(x.data, element_offset(x, i), kType), q));
  }
}

template <FloatType kType>
ADPDM_KERNEL(kThreads, kBlocksPerSm)
dequantize_kernel(const int8_t* codes, int64_t size, GroupedQParams qparams, void* x, bool vectors) {
  constexpr int kSteps = kLanesPerStore<kType>, kSize = kVector<kType>;
  const int64_t first = global_warp() * kWarpCodes;
  if (first >= size) return;
  const Quantizer q = current_quantizer(qparams, signed_range(8));
  if (!vectors || size - first < kWarpCodes) {
    const int64_t end = first + kWarpCodes < size ? first + kWarpCodes : size;
    for (int64_t i = first + lane_index(); i < end; i += kWarpSize) {
      store_float(x, i, kType, dequantize_value(static_cast<float>(load(codes + i)), q.zero_point, q.scale));
    }
    return;
  }
  using Codes = std::conditional_t<kSize == 4, uint32_t, Bytes8>;
  Codes packed[kSteps];
  ADPDM_UNROLL
  for (int c = 0; c < kSteps; ++c) {
    packed[c] = load(reinterpret_cast<const Codes*>(codes + first) + c * kWarpSize + lane_index());
  }
  ADPDM_UNROLL
  for (int c = 0; c < kSteps; ++c) {
    int8_t bytes[kSize];
    memcpy(bytes, &packed[c], sizeof bytes);
    float values[kSize];
    ADPDM_UNROLL
    for (int i = 0; i < kSize; ++i) {
      values[i] = dequantize_value(static_cast<float>(bytes[i]), q.zero_point, q.scale);
    }
    store_vector<kType>(x, first + (c * kWarpSize + lane_index()) * kSize, values);
  }
}

// ---- packed 4-bit codes ----

// Low nibbles of `low` and of `high`, byte by byte.
ADPDM_DEVICE uint32_t pack_words(uint32_t low, uint32_t high) {
  return (low & 0x0f0f0f0fu) | (high << 4 & 0xf0f0f0f0u);
}

// A nibble with its sign.
ADPDM_DEVICE int sign_extended(uint32_t nibble) { return static_cast<int>((nibble & 15u) ^ 8u) - 8; }

// Writes the bytes of blocks [begin, end) of 32 codes; code(row, column) gives one, missing columns are 0.
template <typename Code>
ADPDM_DEVICE void pack_bytes(int64_t begin, int64_t end, int64_t columns, uint8_t* packed, Code&& code) {
  const int64_t row_bytes = int4_row_bytes(columns);
  for (int64_t i = begin * kHalfBlock + lane_index(); i < end * kHalfBlock; i += kWarpSize) {
    const int64_t row = i / row_bytes, byte = i % row_bytes;
    const int64_t low = byte / kHalfBlock * kInt4Block + byte % kHalfBlock, high = low + kHalfBlock;
    const uint32_t low_code = low < columns ? static_cast<uint32_t>(code(row, low)) : 0;
    const uint32_t high_code = high < columns ? static_cast<uint32_t>(code(row, high)) : 0;
    store(packed + i, static_cast<uint8_t>(pack_words(low_code & 0xffu, high_code & 0xffu)));
  }
}

// The code of element `index` of rows of packed codes, counted without gaps.
ADPDM_DEVICE int packed_code(const uint8_t* packed, int64_t index, int64_t columns) {
  const int64_t row = index / columns, column = index % columns;
  const int64_t byte = column / kInt4Block * kHalfBlock + column % kHalfBlock;
  const uint32_t pair = load(packed + row * int4_row_bytes(columns) + byte);
  return sign_extended(column % kInt4Block < kHalfBlock ? pair : pair >> 4);
}

// The warp's 32 blocks from `first` on. Half of the 2 * kLanes lanes over a block hold its low nibbles, the
// other half the high ones; each half takes every other chunk and gives the rest away.
template <FloatType kType>
ADPDM_DEVICE void quantize_int4_warp(const RowView& x, int64_t first, const GroupedQParams& qparams,
                                     uint8_t* packed) {
  constexpr int kLanes = kLanesPerStore<kType>, kWords = kVectorWords<kType>, kChunks = 2 * kLanes;
  Bytes16 raw[kChunks];
  load_chunks<kType>(x, first * kInt4Block, raw);
  const Quantizer q = current_quantizer(qparams, signed_range(4));
  const bool upper = (lane_index() & kLanes) != 0;
  uint32_t words[kLanes][kWords];
  ADPDM_UNROLL
  for (int pair = 0; pair < kLanes; ++pair) {
    float even[kVector<kType>], odd[kVector<kType>];
    unpack_vector<kType>(raw[2 * pair], even);
    unpack_vector<kType>(raw[2 * pair + 1], odd);
    ADPDM_UNROLL
    for (int w = 0; w < kWords; ++w) {
      const uint32_t even_word = code_word(even + 4 * w, q), odd_word = code_word(odd + 4 * w, q);
      const uint32_t other = shuffle_xor(upper ? even_word : odd_word, kLanes);
      words[pair][w] = upper ? pack_words(other, odd_word) : pack_words(even_word, other);
    }
  }
  transpose_lanes(words);
  const int chunk = 2 * (lane_index() % kLanes) + (upper ? 1 : 0), block = lane_index() / (2 * kLanes);
  store(reinterpret_cast<Bytes16*>(packed) + first + chunk * kVector<kType> + block, joined(words));
}

template <FloatType kType>
ADPDM_KERNEL(kThreads, kBlocksPerSm)
quantize_int4_kernel(RowView x, GroupedQParams qparams, uint8_t* packed, bool vectors) {
  const int64_t first = global_warp() * kWarpBlocks;
  const int64_t blocks = x.rows * (int4_row_bytes(x.columns) / kHalfBlock);
  if (first >= blocks) return;
  if (vectors && blocks - first >= kWarpBlocks) return quantize_int4_warp<kType>(x, first, qparams, packed);
  const Quantizer q = current_quantizer(qparams, signed_range(4));
  const int64_t end = first + kWarpBlocks < blocks ? first + kWarpBlocks : blocks;
  pack_bytes(first, end, x.columns, packed, [&](int64_t row, int64_t column) {
    return code_of(load_float(x.data, row * x.stride + column, kType), q);
  });
}

// A lane and step turns kVector bytes into as many codes of the first half of a block and as many of the
// second.
template <FloatType kType>
ADPDM_KERNEL(kThreads, kBlocksPerSm)
dequantize_int4_kernel(const uint8_t* packed, int64_t rows, int64_t columns, GroupedQParams qparams, void* x,
                       bool vectors) {
  constexpr int kSize = kVector<kType>, kSteps = kHalfBlock / kSize;
  const int64_t first = global_warp() * kWarpBlocks;  // also where there are no whole blocks: 1024 codes
  const int64_t size = rows * columns, begin = first * kInt4Block;
  if (begin >= size) return;
  const Quantizer q = current_quantizer(qparams, signed_range(4));
  const auto value = [&](int code) {
    return dequantize_value(static_cast<float>(code), q.zero_point, q.scale);
  };
  if (!vectors || size - begin < kWarpBlocks * kInt4Block) {
    const int64_t end = begin + kWarpBlocks * kInt4Block;
    for (int64_t i = begin + lane_index(); i < (end < size ? end : size); i += kWarpSize) {
      store_float(x, i, kType, value(packed_code(packed, i, columns)));
    }
    return;
  }
  using Codes = std::conditional_t<kSize == 4, uint32_t, Bytes8>;
  Codes pairs[kSteps];
  ADPDM_UNROLL
  for (int c = 0; c < kSteps; ++c) {
    pairs[c] =
        load(reinterpret_cast<const Codes*>(packed + first * kHalfBlock) + c * kWarpSize + lane_index());
  }
  ADPDM_UNROLL
  for (int c = 0; c < kSteps; ++c) {
    uint8_t bytes[kSize];
    memcpy(bytes, &pairs[c], sizeof bytes);
    float low[kSize], high[kSize];
    ADPDM_UNROLL
    for (int i = 0; i < kSize; ++i) {
      low[i] = value(sign_extended(bytes[i]));
      high[i] = value(sign_extended(bytes[i] >> 4));
    }
    const int byte = (c * kWarpSize + lane_index()) * kSize;
    const int64_t index = begin + byte / kHalfBlock * kInt4Block + byte % kHalfBlock;
    store_vector<kType>(x, index, low);
    store_vector<kType>(x, index + kHalfBlock, high);
  }
}

// A lane packs a block of its own.
ADPDM_KERNEL(kThreads, kBlocksPerSm)
pack_int4_kernel(const int8_t* codes, int64_t rows, int64_t columns, uint8_t* packed, bool vectors) {
  const int64_t first = global_warp() * kWarpBlocks;
  const int64_t blocks = rows * (int4_row_bytes(columns) / kHalfBlock);
  if (first >= blocks) return;
  const int64_t end = first + kWarpBlocks < blocks ? first + kWarpBlocks : blocks;
  if (!vectors) {
    return pack_bytes(first, end, columns, packed,
                      [&](int64_t row, int64_t column) { return load(codes + row * columns + column); });
  }
  const int64_t block = first + lane_index();
  if (block >= end) return;
  const auto* halves = reinterpret_cast<const Bytes16*>(codes) + 2 * block;
  const Bytes16 low = load(halves), high = load(halves + 1);
  Bytes16 bytes;
  ADPDM_UNROLL
  for (int w = 0; w < 4; ++w) bytes.word[w] = pack_words(low.word[w], high.word[w]);
  store(reinterpret_cast<Bytes16*>(packed) + block, bytes);
}

// Four nibbles in the low halves of the bytes, with their signs: (n ^ 8) - 8 in every byte without a borrow.
ADPDM_DEVICE uint32_t sign_extended_word(uint32_t nibbles) {
  const uint32_t n = nibbles & 0x0f0f0f0fu;
  return n | (n & 0x08080808u) * 30u;  // 8 * 30 = 0xf0
}

ADPDM_KERNEL(kThreads, kBlocksPerSm)
unpack_int4_kernel(const uint8_t* packed, int64_t rows, int64_t columns, int8_t* codes, bool vectors) {
  const int64_t first = global_warp() * kWarpBlocks;
  const int64_t size = rows * columns, begin = first * kInt4Block;
  if (begin >= size) return;
  if (!vectors) {
    const int64_t end = begin + kWarpBlocks * kInt4Block;
    for (int64_t i = begin + lane_index(); i < (end < size ? end : size); i += kWarpSize) {
      store(codes + i, static_cast<int8_t>(packed_code(packed, i, columns)));
    }
    return;
  }
  const int64_t block = first + lane_index();
  if (block >= size / kInt4Block) return;
  const Bytes16 bytes = load(reinterpret_cast<const Bytes16*>(packed) + block);
  Bytes16 low, high;
  ADPDM_UNROLL
  for (int w = 0; w < 4; ++w) {
    low.word[w] = sign_extended_word(bytes.word[w]);
    high.word[w] = sign_extended_word(bytes.word[w] >> 4);
  }
  auto* halves = reinterpret_cast<Bytes16*>(codes) + 2 * block;
  store(halves, low);
  store(halves + 1, high);
}

// Warps for rows of packed codes, or for codes in shares of the same size.
int64_t warps_for_blocks(int64_t blocks) { return (blocks + kWarpBlocks - 1) / kWarpBlocks; }
int64_t warps_for_codes(int64_t codes, int64_t share) { return (codes + share - 1) / share; }

}  // namespace

void quantize(const RowView& view, const GroupedQParams& qparams, int num_bits, int8_t* codes,
              Stream stream) {
  const Range range([&] { return range_text("quantize", {view.rows, view.columns}, view.type, num_bits); });
  const RowView x = collapse(view);
  const bool vectors = rows_have_vectors(x) && is_aligned(codes, 16);
  const LaunchShape shape =
      shape_for_warps("quantize", warps_for_codes(x.rows * x.columns, kWarpCodes), stream);
  with_float_type(x.type, [&](auto type) {
    launch(quantize_kernel<type()>, shape, x, qparams, signed_range(num_bits), codes, vectors);
  });
}

void quantize_int4(const RowView& view, const GroupedQParams& qparams, uint8_t* packed, Stream stream) {
  const Range range([&] { return range_text("quantize_int4", {view.rows, view.columns}, view.type); });
  const bool whole_blocks = view.columns % kInt4Block == 0;
  const RowView x = whole_blocks ? collapse(view) : view;
  const bool vectors = whole_blocks && rows_have_vectors(x) && is_aligned(packed, 16);
  const int64_t blocks = x.rows * (int4_row_bytes(x.columns) / kHalfBlock);
  const LaunchShape shape = shape_for_warps("quantize_int4", warps_for_blocks(blocks), stream);
  with_float_type(
      x.type, [&](auto type) { launch(quantize_int4_kernel<type()>, shape, x, qparams, packed, vectors); });
}

void dequantize(const int8_t* codes, int64_t size, const GroupedQParams& qparams, FloatType type, void* x,
                Stream stream) {
  const Range range([&] { return range_text("dequantize", {size}, type); });
  const bool vectors = is_aligned(codes, 8) && is_aligned(x, 16);
  const LaunchShape shape = shape_for_warps("dequantize", warps_for_codes(size, kWarpCodes), stream);
  with_float_type(
      type, [&](auto tag) { launch(dequantize_kernel<tag()>, shape, codes, size, qparams, x, vectors); });
}

void dequantize_int4(const uint8_t* packed, int64_t rows, int64_t columns, const GroupedQParams& qparams,
                     FloatType type, void* x, Stream stream) {
  const Range range([&] { return range_text("dequantize_int4", {rows, columns}, type); });
  const bool vectors = columns % kInt4Block == 0 && is_aligned(packed, 8) && is_aligned(x, 16);
  const LaunchShape shape =
      shape_for_warps("dequantize_int4", warps_for_codes(rows * columns, kWarpBlocks * kInt4Block), stream);
  with_float_type(type, [&](auto tag) {
    launch(dequantize_int4_kernel<tag()>, shape, packed, rows, columns, qparams, x, vectors);
  });
}

void pack_int4(const int8_t* codes, int64_t rows, int64_t columns, uint8_t* packed, Stream stream) {
  const bool vectors = columns % kInt4Block == 0 && is_aligned(codes, 16) && is_aligned(packed, 16);
  const int64_t blocks = rows * (int4_row_bytes(columns) / kHalfBlock);
  launch(pack_int4_kernel, shape_for_warps("pack_int4", warps_for_blocks(blocks), stream), codes, rows,
         columns, packed, vectors);
}

void unpack_int4(const uint8_t* packed, int64_t rows, int64_t columns, int8_t* codes, Stream stream) {
  const bool vectors = columns % kInt4Block == 0 && is_aligned(codes, 16) && is_aligned(packed, 16);
  const int64_t warps = warps_for_codes(rows * columns, kWarpBlocks * kInt4Block);
  launch(unpack_int4_kernel, shape_for_warps("unpack_int4", warps, stream), packed, rows, columns, codes,
         vectors);
}

}  // namespace adpdm::cuda
