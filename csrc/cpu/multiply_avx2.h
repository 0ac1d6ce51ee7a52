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

// 32 bytes, 4 of each quad -> 16 bits: bytes 0 and 2 of the quads, or 1 and 3. Shifts are quicker than
// vpmovsxbw between registers, which crosses lanes: one in 1.3 cycles on a Zen 3, shifts two a cycle.
inline __m256i even_bytes(__m256i quads) { return _mm256_srai_epi16(_mm256_slli_epi16(quads, 8), 8); }
inline __m256i odd_bytes(__m256i quads) { return _mm256_srai_epi16(quads, 8); }

// 32 weights of an even (low nibbles) or odd quad of 4-bit codes, as bytes.
inline __m256i unpack_nibbles(__m256i both, bool odd) {
  const __m256i nibbles = _mm256_and_si256(odd ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(0xf));
  return _mm256_sub_epi8(nibbles, _mm256_set1_epi8(8));
}

}  // namespace
}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
