// Inner loops of the integer kernels for AVX2 and AVX-VNNI: a few pixels times 16 outputs, sums in registers.
// Per instruction set, like vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/igemm.h"
#if defined(ADPDM_DOT_ENCODING)
#include "cpu/dot_products.h"
#endif

namespace adpdm::cpu::ADPDM_ISA_NAMESPACE {
namespace {

// Pixels multiplied together where both operands have 16 bits: 12 sums, 2 weights, codes and a product are
// the 16 registers. 4 pixels took 10 to 15 % longer on a busy Zen 3, 2026-11.
constexpr int kPairPixels = 6;

// Vectors of 8 outputs in a block.
constexpr int kOutputVectors = 2;

inline __m256i load_vector(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_vector(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline __m256i broadcast_bytes(const void* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}

// sums [8] += the 2 products of 16-bit numbers in each lane. The empty asm keeps GCC 12 from making all
// products first and moving sums around.
inline void add_pairs(__m256i codes, __m256i weights, __m256i& sums) {
#if defined(ADPDM_DOT_ENCODING)
  sums = dot_pairs(sums, codes, weights);
#else
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(codes, weights));
  asm("" : "+x"(sums));
#endif
}

// sums [P][16 outputs] = or += codes [P][code_step], pairs of 16-bit channels, x weights [pairs][16][2].
// Not inlined, so that its registers are its own.
template <int P, bool kAdd>
__attribute__((noinline)) void multiply_pairs(const int16_t* codes, int64_t code_step, const int16_t* weights,
                                              int64_t pairs, int32_t (*sums)[kBlockOutputs]) {
  __m256i registers[P][kOutputVectors];
#pragma GCC unroll 6
  for (int p = 0; p < P; ++p) {
    registers[p][0] = kAdd ? load_vector(sums[p]) : _mm256_setzero_si256();
    registers[p][1] = kAdd ? load_vector(sums[p] + 8) : _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < pairs; ++i, codes += 2, weights += 2 * kBlockOutputs) {
    const __m256i low = load_vector(weights);
    const __m256i high = load_vector(weights + kBlockOutputs);
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) {
      const __m256i pair = broadcast_bytes(codes + p * code_step);
      add_pairs(pair, low, registers[p][0]);
      add_pairs(pair, high, registers[p][1]);
    }
  }
#pragma GCC unroll 6
  for (int p = 0; p < P; ++p) {
    store_vector(sums[p], registers[p][0]);
    store_vector(sums[p] + 8, registers[p][1]);
  }
}

// multiply_pairs for one to kPairPixels pixels.
template <bool kAdd, int P = kPairPixels>
inline void multiply_group(int pixels, const int16_t* codes, int64_t code_step, const int16_t* weights,
                           int64_t pairs, int32_t (*sums)[kBlockOutputs]) {
  if constexpr (P > 1) {
    if (pixels < P) return multiply_group<kAdd, P - 1>(pixels, codes, code_step, weights, pairs, sums);
  }
  multiply_pairs<P, kAdd>(codes, code_step, weights, pairs, sums);
}

// Weights of one quad, [16 outputs][4 channels] i8, as 16-bit pairs: channels 0 and 1 of outputs 0-7 and
// 8-15, then channels 2 and 3.
struct WidePairs {
  __m256i v[2 * kOutputVectors];
};

inline __m256i shuffle_pairs(__m256i pairs) { return _mm256_permute4x64_epi64(pairs, 0xd8); }

inline WidePairs widen_pairs(__m256i low,  // outputs 0-7
                             __m256i high) {
  WidePairs wide;
  const __m256i halves[kOutputVectors] = {low, high};
#pragma GCC unroll 2
  for (int i = 0; i < kOutputVectors; ++i) {
    const __m256 first = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(halves[i])));
    const __m256 second = _mm256_castsi256_ps(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(halves[i], 1)));
    wide.v[i] = shuffle_pairs(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0x88)));
    wide.v[kOutputVectors + i] = shuffle_pairs(_mm256_castps_si256(_mm256_shuffle_ps(first, second, 0xdd)));
  }
  return wide;
}

// 32 weights of an even (low nibbles) or odd quad of 4-bit codes, as bytes.
inline __m256i unpack_nibbles(__m256i both, bool odd) {
  const __m256i nibbles = _mm256_and_si256(odd ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(0xf));
  return _mm256_sub_epi8(nibbles, _mm256_set1_epi8(8));
}

// What turns the integer sums of 16 outputs into floats; 0 for outputs beyond num_outputs, whose sums are 0.
class BlockParams {
 public:
  // first: the block's first output within the tile. code_shift was added to the codes.
  BlockParams(const TileSegment& segment, int64_t first, int64_t num_outputs, int32_t code_shift) {
    for (int v = 0; v < kOutputVectors; ++v) {
      const int64_t left = num_outputs - first - 8 * v;
      const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(left)), lanes);
      const int64_t at = left > 0 ? first + 8 * v : 0;
      const __m256i sum = _mm256_maskload_epi32(segment.weight_sum + at, mask);
      const __m256 scale = _mm256_maskload_ps(segment.weight_scale + at, mask);
      correction_[v] = _mm256_mullo_epi32(_mm256_set1_epi32(segment.zero_point + code_shift), sum);
      factor_[v] = _mm256_mul_ps(_mm256_set1_ps(segment.scale), scale);
    }
  }

  // after [8 outputs from 8 * v on] = before + factor * (sums - correction).
  void add(int v, __m256i sums, const float* before, float* after) const {
    const __m256 centred = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, correction_[v]));
    _mm256_storeu_ps(after + 8 * v, _mm256_fmadd_ps(centred, factor_[v], _mm256_loadu_ps(before + 8 * v)));
  }

  void add(int v, __m256i sums, float* values) const { add(v, sums, values, values); }

 private:
  __m256i correction_[kOutputVectors];
  __m256 factor_[kOutputVectors];
};

// values [rows][num_blocks][16 outputs] = bias, or 0.
inline void start_values(const Tile& tile, int64_t rows, float* values) {
  alignas(64) float first[kMaxTileBlocks * kBlockOutputs] = {};
  const auto width = static_cast<int64_t>(tile.num_blocks) * kBlockOutputs;
  if (tile.output.bias) {
    __builtin_memcpy(first, tile.output.bias, static_cast<size_t>(tile.num_outputs) * sizeof(float));
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; i += 8) _mm256_store_ps(values + r * width + i, _mm256_load_ps(first + i));
  }
}

}  // namespace
}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
