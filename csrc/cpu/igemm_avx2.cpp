// The integer GEMM tile for AVX2: products of bytes where weights of 7 bits and fewer cannot saturate 16-bit
// sums, 16-bit products otherwise.
#define ADPDM_ISA_NAMESPACE avx2
#include "cpu/igemm.h"
#include "cpu/igemm_epilogue.h"
#include "cpu/multiply_avx2.h"

namespace adpdm::cpu::avx2 {
namespace {

// Codes and weights are made ready for this many quads at a time: with the sums, 16 KiB of the L1 cache.
constexpr int64_t kChunkQuads = 32;
constexpr int64_t kChunkChannels = kChunkQuads * kQuadChannels;

// vpmaddubsw wants unsigned codes: flipping the sign bit adds 128, which the zero-point correction takes
// back.
constexpr int32_t kCodeShift = 128;

// Pixels multiplied together: 6 took 12 % longer than 4 on a Zen 3, because GCC 12 moves sums to the stack.
constexpr int kBytePixels = 4;

using Sums = int32_t[kBlockOutputs];

// Weights of b bits make pair sums of at most 2 * 255 * 2^(b-1), of which this many fit 16 bits.
constexpr int quads_in_16_bits(int weight_bits) { return weight_bits <= 4 ? 8 : 1 << (7 - weight_bits); }

// sums [P][16] += codes [P][kChunkChannels], shifted to unsigned, x weights [quads][16][4]; kQuads of them
// are added in 16 bits before they are widened.
template <int P, int kQuads>
__attribute__((noinline)) void multiply_bytes(const uint8_t* codes, const int8_t* weights, int64_t quads,
                                              Sums* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t first = 0; first < quads; first += kQuads) {
    const int64_t last = quads - first < kQuads ? quads : first + kQuads;
    __m256i registers[P][kOutputVectors];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) registers[p][0] = registers[p][1] = _mm256_setzero_si256();
    for (int64_t q = first; q < last; ++q, codes += kQuadChannels, weights += kQuadBytes) {
      const __m256i low = load_vector(weights);
      const __m256i high = load_vector(weights + kQuadBytes / 2);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const __m256i quad = broadcast_bytes(codes + p * kChunkChannels);
        registers[p][0] = _mm256_add_epi16(registers[p][0], _mm256_maddubs_epi16(quad, low));
        asm("" : "+x"(registers[p][0]));
        registers[p][1] = _mm256_add_epi16(registers[p][1], _mm256_maddubs_epi16(quad, high));
        asm("" : "+x"(registers[p][1]));
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < kOutputVectors; ++v) {
        const __m256i wide = _mm256_madd_epi16(registers[p][v], ones);
        store_vector(sums[p] + 8 * v, _mm256_add_epi32(load_vector(sums[p] + 8 * v), wide));
      }
    }
  }
}

// As above for 7-bit weights: every product is widened, and 32-bit sums stay in registers.
template <int P>
__attribute__((noinline)) void multiply_7bit(const uint8_t* codes, const int8_t* weights, int64_t quads,
                                             Sums* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i registers[P][kOutputVectors];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    registers[p][0] = load_vector(sums[p]);
    registers[p][1] = load_vector(sums[p] + 8);
  }
  for (int64_t q = 0; q < quads; ++q, codes += kQuadChannels, weights += kQuadBytes) {
    const __m256i low = load_vector(weights);
    const __m256i high = load_vector(weights + kQuadBytes / 2);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const __m256i quad = broadcast_bytes(codes + p * kChunkChannels);
      const __m256i first = _mm256_madd_epi16(_mm256_maddubs_epi16(quad, low), ones);
      registers[p][0] = _mm256_add_epi32(registers[p][0], first);
      asm("" : "+x"(registers[p][0]));
      const __m256i second = _mm256_madd_epi16(_mm256_maddubs_epi16(quad, high), ones);
      registers[p][1] = _mm256_add_epi32(registers[p][1], second);
      asm("" : "+x"(registers[p][1]));
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) {
    store_vector(sums[p], registers[p][0]);
    store_vector(sums[p] + 8, registers[p][1]);
  }
}

template <int P, int kQuads>
inline void multiply_bytes_or_7bit(const uint8_t* codes, const int8_t* weights, int64_t quads, Sums* sums) {
  if constexpr (kQuads == 1) {
    multiply_7bit<P>(codes, weights, quads, sums);
  } else {
    multiply_bytes<P, kQuads>(codes, weights, quads, sums);
  }
}

// One block of outputs of a tile whose weights have fewer than 8 bits.
template <int kQuads>
struct Bytes {
  using Code = uint8_t;
  using Weight = int8_t;
  static constexpr int32_t kShift = kCodeShift;
  static constexpr int kPixels = kBytePixels;

  static Code code(int8_t code) { return static_cast<Code>(code ^ 0x80); }

  static const Weight* weights(const uint8_t* packed, int64_t quads, bool nibbles, Weight* scratch) {
    if (!nibbles) return reinterpret_cast<const Weight*>(packed);
    for (int64_t i = 0; i < quads * kQuadBytes / 2; i += 32) {
      const __m256i both = load_vector(packed + i);
      Weight* even = scratch + i / kQuadBytes * 2 * kQuadBytes + i % kQuadBytes;
      store_vector(even, unpack_nibbles(both, false));
      store_vector(even + kQuadBytes, unpack_nibbles(both, true));
    }
    return scratch;
  }

  static void multiply(int pixels, const Code* codes, const Weight* weights, int64_t quads, Sums* sums) {
    switch (pixels) {
      case 1:
        return multiply_bytes_or_7bit<1, kQuads>(codes, weights, quads, sums);
      case 2:
        return multiply_bytes_or_7bit<2, kQuads>(codes, weights, quads, sums);
      case 3:
        return multiply_bytes_or_7bit<3, kQuads>(codes, weights, quads, sums);
      default:
        return multiply_bytes_or_7bit<kBytePixels, kQuads>(codes, weights, quads, sums);
    }
  }
};

// The same with 8-bit weights.
struct Words {
  using Code = int16_t;
  using Weight = int16_t;
  static constexpr int32_t kShift = 0;
  static constexpr int kPixels = kPairPixels;

  static Code code(int8_t code) { return code; }

  static const Weight* weights(const uint8_t* packed, int64_t quads, bool, Weight* scratch) {
    for (int64_t q = 0; q < quads; ++q, packed += kQuadBytes) {
      const WidePairs wide = widen_pairs(load_vector(packed), load_vector(packed + kQuadBytes / 2));
      for (int v = 0; v < 2 * kOutputVectors; ++v) store_vector(scratch + q * kQuadBytes + 16 * v, wide.v[v]);
    }
    return scratch;
  }

  static void multiply(int pixels, const Code* codes, const Weight* weights, int64_t quads, Sums* sums) {
    multiply_group<true>(pixels, codes, kChunkChannels, weights, quads * 2, sums);
  }
};

// sums [blocks][kMaxTilePixels] += the tile's products of one segment.
template <typename Kernel>
void accumulate(const Tile& tile, const TileSegment& segment, Sums (*sums)[kMaxTilePixels]) {
  alignas(64) typename Kernel::Weight scratch[kChunkQuads * kQuadBytes];
  alignas(64) typename Kernel::Code codes[kMaxTilePixels * kChunkChannels];
  const int64_t quad_bytes = tile.nibbles ? kQuadBytes / 2 : kQuadBytes;
  const uint8_t* packed = segment.weight;
  for (int64_t y = 0; y < tile.tap_rows; ++y) {
    for (int64_t x = 0; x < tile.tap_columns; ++x) {
      const int64_t tap = y * segment.tap_row_step + x * segment.tap_column_step;
      for (int64_t first = 0; first < segment.quads; first += kChunkQuads) {
        const int64_t quads = segment.quads - first < kChunkQuads ? segment.quads - first : kChunkQuads;
        for (int p = 0; p < tile.num_pixels; ++p) {
          const int8_t* source = segment.pixels[p] + tap + first * kQuadChannels;
          typename Kernel::Code* target = codes + p * kChunkChannels;
          for (int64_t i = 0; i < quads * kQuadChannels; ++i) target[i] = Kernel::code(source[i]);
        }
        for (int b = 0; b < tile.num_blocks; ++b) {
          const auto* weights =
              Kernel::weights(packed + b * segment.block_bytes, quads, tile.nibbles, scratch);
          for (int p = 0; p < tile.num_pixels; p += Kernel::kPixels) {
            Kernel::multiply(tile.num_pixels - p, codes + p * kChunkChannels, weights, quads, sums[b] + p);
          }
        }
        packed += quads * quad_bytes;
      }
    }
  }
}

// Adds the segment to values [num_pixels][num_blocks][16 outputs].
void add_segment(const Tile& tile, const TileSegment& segment, int32_t code_shift,
                 const Sums (*sums)[kMaxTilePixels], float* values) {
  for (int b = 0; b < tile.num_blocks; ++b) {
    const BlockParams params(segment, b * kBlockOutputs, tile.num_outputs, code_shift);
    for (int p = 0; p < tile.num_pixels; ++p) {
      float* at = values + (p * tile.num_blocks + b) * kBlockOutputs;
      for (int v = 0; v < kOutputVectors; ++v) params.add(v, load_vector(sums[b][p] + 8 * v), at);
    }
  }
}

template <typename Kernel>
void run_with(const Tile& tile) {
  alignas(64) float values[kMaxTilePixels * kMaxTileBlocks * kBlockOutputs];
  start_values(tile, tile.num_pixels, values);
  for (int s = 0; s < tile.num_segments; ++s) {
    alignas(64) Sums sums[kMaxTileBlocks][kMaxTilePixels];
    std::memset(sums, 0, static_cast<size_t>(tile.num_blocks) * sizeof sums[0]);
    accumulate<Kernel>(tile, tile.segments[s], sums);
    add_segment(tile, tile.segments[s], Kernel::kShift, sums, values);
  }
  finish_tile(tile, values);
}

void run(const Tile& tile) {
  if (tile.weight_bits == 8) return run_with<Words>(tile);
  switch (quads_in_16_bits(tile.weight_bits)) {
    case 1:
      return run_with<Bytes<1>>(tile);
    case 2:
      return run_with<Bytes<2>>(tile);
    case 4:
      return run_with<Bytes<4>>(tile);
    default:
      return run_with<Bytes<8>>(tile);
  }
}

}  // namespace

extern const IgemmKernel igemm_kernel = {
    run, kMaxTileBlocks, {0, kMaxTilePixels, kMaxTilePixels, kMaxTilePixels, kMaxTilePixels}};

}  // namespace adpdm::cpu::avx2
