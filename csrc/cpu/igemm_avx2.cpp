// The integer GEMM tile for AVX2: products of bytes where weights of 7 bits and fewer cannot saturate 16-bit
// sums, 16-bit products otherwise.
#define ADPDM_ISA_NAMESPACE avx2
#include "cpu/igemm.h"
#include "cpu/multiply_avx2.h"
#include "cpu/tile_floats.h"

namespace adpdm::cpu::avx2 {
namespace {

// Codes and weights are made ready for this many quads at a time: with the sums, 16 KiB of the L1 cache.
constexpr int64_t kChunkQuads = 32;
constexpr int64_t kChunkChannels = kChunkQuads * kQuadChannels;

// vpmaddubsw wants unsigned codes: flipping the sign bit adds 128, which the zero-point correction takes
// back.
constexpr int32_t kCodeShift = 128;

// Pixels multiplied together: 12 sums, 2 weights, codes and a product are the 16 registers.
constexpr int kBytePixels = 6;

// 6 pixels and ones, which every product is widened by, would be a register too many.
constexpr int k7BitPixels = 4;

using Sums = int32_t[kBlockOutputs];

// Weights of b bits make pair sums of at most 2 * 255 * 2^(b-1), of which this many fit 16 bits.
constexpr int quads_in_16_bits(int weight_bits) { return weight_bits <= 4 ? 8 : 1 << (7 - weight_bits); }

template <int P>
using ShortSums = __m256i[P][kOutputVectors];

// sums [P][16] in 16 bits += one quad of codes [P][kChunkChannels] x weights [16][4].
template <int P>
ADPDM_VEC void add_quad(const uint8_t* codes, const int8_t* weights, ShortSums<P>& sums) {
  const __m256i low = load_vector(weights);
  const __m256i high = load_vector(weights + kQuadBytes / 2);
#pragma GCC unroll 6
  for (int p = 0; p < P; ++p) {
    const __m256i quad = broadcast_bytes(codes + p * kChunkChannels);
    sums[p][0] = _mm256_add_epi16(sums[p][0], _mm256_maddubs_epi16(quad, low));
    asm("" : "+x"(sums[p][0]));
    sums[p][1] = _mm256_add_epi16(sums[p][1], _mm256_maddubs_epi16(quad, high));
    asm("" : "+x"(sums[p][1]));
  }
}

// clang-format off
static_assert(kChunkChannels == 128, "written into the instructions");
#define ADPDM_ADD_PIXEL(p)                                \
  "vpbroadcastd 128 * " #p "(%[codes]), %[quad]\n\t"      \
  "vpmaddubsw %[low], %[quad], %[product]\n\t"           \
  "vpaddw %[product], %[low" #p "], %[low" #p "]\n\t"     \
  "vpmaddubsw %[high], %[quad], %[quad]\n\t"             \
  "vpaddw %[quad], %[high" #p "], %[high" #p "]\n\t"

// Left to itself GCC 12 moves sums from register to register: 1.05 to 1.14 times the time on a Zen 3, 2026-11. All
// 16 registers are taken, and as many operands as GCC allows.
template <>
ADPDM_VEC void add_quad<6>(const uint8_t* codes, const int8_t* weights, ShortSums<6>& s) {
  using Read = const uint8_t[5 * kChunkChannels + kQuadChannels];
  __m256i quad, product;
  asm(ADPDM_ADD_PIXEL(0) ADPDM_ADD_PIXEL(1) ADPDM_ADD_PIXEL(2) ADPDM_ADD_PIXEL(3) ADPDM_ADD_PIXEL(4)
      ADPDM_ADD_PIXEL(5)
      : [low0] "+&x"(s[0][0]), [high0] "+&x"(s[0][1]), [low1] "+&x"(s[1][0]), [high1] "+&x"(s[1][1]),
        [low2] "+&x"(s[2][0]), [high2] "+&x"(s[2][1]), [low3] "+&x"(s[3][0]), [high3] "+&x"(s[3][1]),
        [low4] "+&x"(s[4][0]), [high4] "+&x"(s[4][1]), [low5] "+&x"(s[5][0]), [high5] "+&x"(s[5][1]),
        [quad] "=&x"(quad), [product] "=&x"(product)
      : [low] "x"(load_vector(weights)), [high] "x"(load_vector(weights + kQuadBytes / 2)),
        [codes] "r"(codes), "m"(*reinterpret_cast<Read*>(codes)));
}
// clang-format on

#undef ADPDM_ADD_PIXEL

// sums [P][16] += codes [P][kChunkChannels], shifted to unsigned, x weights [quads][16][4]; kQuads of them
// are added in 16 bits before they are widened.
template <int P, int kQuads>
__attribute__((noinline)) void multiply_bytes(const uint8_t* codes, const int8_t* weights, int64_t quads,
                                              Sums* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t first = 0; first < quads; first += kQuads) {
    const int64_t last = quads - first < kQuads ? quads : first + kQuads;
    ShortSums<P> registers;
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) registers[p][0] = registers[p][1] = _mm256_setzero_si256();
    for (int64_t q = first; q < last; ++q, codes += kQuadChannels, weights += kQuadBytes) {
      add_quad<P>(codes, weights, registers);
    }
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
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

// multiply_bytes() or multiply_7bit() for one to P pixels.
template <int kQuads, int P>
void multiply_pixels(int pixels, const uint8_t* codes, const int8_t* weights, int64_t quads, Sums* sums) {
  if constexpr (P > 1) {
    if (pixels < P) return multiply_pixels<kQuads, P - 1>(pixels, codes, weights, quads, sums);
  }
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
  static constexpr int kPixels = kQuads == 1 ? k7BitPixels : kBytePixels;

  static void copy_codes(const int8_t* source, int64_t quads, Code* target) {
    for (int64_t i = 0; i < quads * kQuadChannels; ++i) target[i] = static_cast<Code>(source[i] ^ 0x80);
  }

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

  // sums [pixels][16 outputs] = or += products.
  static void multiply(bool add, int pixels, const Code* codes, const Weight* weights, int64_t quads,
                       Sums* sums) {
    if (!add) std::memset(sums, 0, static_cast<size_t>(pixels) * sizeof *sums);
    multiply_pixels<kQuads, kPixels>(pixels, codes, weights, quads, sums);
  }
};

// The same with 8-bit weights. Channels 0 and 2 of a quad meet as a pair of 16 bits, and channels 1 and 3: of
// up to 8 quads at a time first all even pairs, then all odd ones.
struct Words {
  using Code = int16_t;
  using Weight = int16_t;
  static constexpr int32_t kShift = 0;
  static constexpr int kPixels = kPairPixels;
  static constexpr int64_t kVectorQuads = 32 / kQuadChannels;

  static void copy_codes(const int8_t* source, int64_t quads, Code* target) {
    for (; quads >= kVectorQuads; quads -= kVectorQuads, source += 32, target += 32) {
      const __m256i bytes = load_vector(source);
      store_vector(target, even_bytes(bytes));
      store_vector(target + 16, odd_bytes(bytes));
    }
    for (int64_t q = 0; q < quads; ++q, source += kQuadChannels, target += 2) {
      target[0] = source[0];
      target[1] = source[2];
      target[2 * quads] = source[1];
      target[2 * quads + 1] = source[3];
    }
  }

  static const Weight* weights(const uint8_t* packed, int64_t quads, bool, Weight* scratch) {
    Weight* even = scratch;
    for (; quads > 0; quads -= kVectorQuads, even += kVectorQuads * kQuadBytes) {
      const int64_t count = quads < kVectorQuads ? quads : kVectorQuads;
      Weight* const odd = even + count * 2 * kBlockOutputs;
      for (int64_t q = 0; q < count; ++q, packed += kQuadBytes) {
        for (int v = 0; v < kOutputVectors; ++v) {
          const __m256i bytes = load_vector(packed + 32 * v);
          store_vector(even + q * 2 * kBlockOutputs + 16 * v, even_bytes(bytes));
          store_vector(odd + q * 2 * kBlockOutputs + 16 * v, odd_bytes(bytes));
        }
      }
    }
    return scratch;
  }

  static void multiply(bool add, int pixels, const Code* codes, const Weight* weights, int64_t quads,
                       Sums* sums) {
    if (add) return multiply_group<true>(pixels, codes, kChunkChannels, weights, quads * 2, sums);
    multiply_group<false>(pixels, codes, kChunkChannels, weights, quads * 2, sums);
  }
};

// Some quads of a tap.
struct Chunk {
  int64_t tap;    // bytes from the first tap
  int64_t first;  // quad of the tap
  int64_t quads;
  const uint8_t* packed;  // weights of the first block
};

// sums [blocks][kMaxTilePixels] = or += the chunk's products.
template <typename Kernel>
void multiply_chunk(const Tile& tile, const TileSegment& segment, const Chunk& chunk, bool add,
                    Sums (*sums)[kMaxTilePixels]) {
  alignas(64) typename Kernel::Weight scratch[kChunkQuads * kQuadBytes];
  alignas(64) typename Kernel::Code codes[kMaxTilePixels * kChunkChannels];
  for (int p = 0; p < tile.num_pixels; ++p) {
    const int8_t* source = segment.pixels[p] + chunk.tap + chunk.first * kQuadChannels;
    Kernel::copy_codes(source, chunk.quads, codes + p * kChunkChannels);
  }
  for (int b = 0; b < tile.num_blocks; ++b) {
    const auto* weights =
        Kernel::weights(chunk.packed + b * segment.block_bytes, chunk.quads, tile.nibbles, scratch);
    for (int p = 0; p < tile.num_pixels; p += Kernel::kPixels) {
      const int left = tile.num_pixels - p;
      Kernel::multiply(add, left < Kernel::kPixels ? left : Kernel::kPixels, codes + p * kChunkChannels,
                       weights, chunk.quads, sums[b] + p);
    }
  }
}

// sums [blocks][kMaxTilePixels] = the tile's products of one segment.
template <typename Kernel>
void multiply_segment(const Tile& tile, const TileSegment& segment, Sums (*sums)[kMaxTilePixels]) {
  const int64_t quad_bytes = tile.nibbles ? kQuadBytes / 2 : kQuadBytes;
  Chunk chunk{0, 0, 0, segment.weight};
  bool begun = false;
  for (int64_t y = 0; y < tile.tap_rows; ++y) {
    for (int64_t x = 0; x < tile.tap_columns; ++x) {
      chunk.tap = y * segment.tap_row_step + x * segment.tap_column_step;
      for (chunk.first = 0; chunk.first < segment.quads; chunk.first += kChunkQuads) {
        const int64_t left = segment.quads - chunk.first;
        chunk.quads = left < kChunkQuads ? left : kChunkQuads;
        multiply_chunk<Kernel>(tile, segment, chunk, begun, sums);
        begun = true;
        chunk.packed += chunk.quads * quad_bytes;
      }
    }
  }
}

template <typename Kernel>
void run_with(const Tile& tile) {
  run_segments(tile, [&](const TileSegment& segment, const Rows& before, const Rows& after) {
    alignas(64) Sums sums[kMaxTileBlocks][kMaxTilePixels];
    multiply_segment<Kernel>(tile, segment, sums);
    for (int b = 0; b < tile.num_blocks; ++b) {
      add_sums(tile, segment, b, 1, Kernel::kShift, sums[b], before, after);
    }
  });
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
