// Codes in words of 32 bits, the operands of integer matrix products: 4 codes of 8 bits where the instruction
// set multiplies those (AVX-512 VNNI, AVX-VNNI), else 2 of 16. Per instruction set, like vec.h.
#pragma once

#include <cstring>

#include "cpu/vec.h"
#if defined(ADPDM_DOT_ENCODING)
#include "cpu/dot_products.h"
#endif

namespace adpdm::cpu::ADPDM_ISA_NAMESPACE {
namespace {

// Rows of the left operand that are multiplied together: with 4 panels of results they keep 24 accumulators
// of AVX-512 busy, with one panel 12 of AVX2 and AVX-VNNI.
constexpr int kProductRows = 6;

// Panels of 16 columns that are multiplied together.
constexpr int kProductPanels = 4;

#if defined(__AVX512F__)

constexpr int kWordCodes = 4;

ADPDM_VEC Vec load_integers(const int32_t* p) { return Vec(_mm512_cvtepi32_ps(_mm512_loadu_si512(p))); }

// 16 floats in [-128, 255], rounded to even -> 16 / kWordCodes words.
ADPDM_VEC void store_words(uint32_t* p, const Vec* x) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x[0].v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

// rows [kWordCodes][16 lanes], integers held as floats -> 16 words, one of each lane.
ADPDM_VEC void store_interleaved(uint32_t* p, const Vec (*rows)[kVecs]) {
  const __m512i byte = _mm512_set1_epi32(0xff);
  const auto codes = [&](int row) { return _mm512_and_si512(_mm512_cvtps_epi32(rows[row][0].v), byte); };
  const __m512i low = _mm512_or_si512(codes(0), _mm512_slli_epi32(codes(1), 8));
  const __m512i high = _mm512_or_si512(codes(2), _mm512_slli_epi32(codes(3), 8));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

ADPDM_VEC float maximum_of(const Vec* lanes) { return _mm512_reduce_max_ps(lanes[0].v); }

// The bits of x as an integer, converted to float.
ADPDM_VEC Vec bits_as_number(Vec x) { return Vec(_mm512_cvtepi32_ps(_mm512_castps_si512(x.v))); }

// multiply() with a number of panels known to the compiler.
template <int kPanels>
ADPDM_VEC void multiply_panels(const uint32_t* left, int64_t left_step, const uint32_t* right,
                               int64_t panel_step, int64_t words, const int32_t* first, int32_t* sums,
                               int64_t sums_step) {
  __m512i registers[kProductRows][kPanels];
#pragma GCC unroll 4
  for (int panel = 0; panel < kPanels; ++panel) {
    const __m512i start = first ? _mm512_loadu_si512(first + panel * kLanes) : _mm512_setzero_si512();
#pragma GCC unroll 6
    for (int row = 0; row < kProductRows; ++row) registers[row][panel] = start;
  }
  for (int64_t word = 0; word < words; ++word, right += kLanes) {
    __m512i columns[kPanels];
#pragma GCC unroll 4
    for (int panel = 0; panel < kPanels; ++panel) {
      columns[panel] = _mm512_loadu_si512(right + panel * panel_step);
    }
#pragma GCC unroll 6
    for (int row = 0; row < kProductRows; ++row) {
      const __m512i codes = _mm512_set1_epi32(static_cast<int32_t>(left[row * left_step + word]));
#pragma GCC unroll 4
      for (int panel = 0; panel < kPanels; ++panel) {
        registers[row][panel] = _mm512_dpbusd_epi32(registers[row][panel], codes, columns[panel]);
      }
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kProductRows; ++row) {
#pragma GCC unroll 4
    for (int panel = 0; panel < kPanels; ++panel) {
      _mm512_storeu_si512(sums + row * sums_step + panel * kLanes, registers[row][panel]);
    }
  }
}

#elif defined(__AVX2__)

ADPDM_VEC Vec load_integers(const int32_t* p) {
  return Vec(_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

#if defined(ADPDM_DOT_ENCODING)

constexpr int kWordCodes = 4;

// 16 floats in [-128, 255], rounded to even -> 16 / kWordCodes words.
ADPDM_VEC void store_words(uint32_t* p, const Vec* x) {
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0].v), _mm256_cvtps_epi32(x[1].v));
  const __m256i low_bytes = _mm256_and_si256(pairs, _mm256_set1_epi16(0xff));
  const __m256i quads = _mm256_packus_epi16(low_bytes, low_bytes);
  const __m256i in_order = _mm256_permutevar8x32_epi32(quads, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(in_order));
}

// rows [kWordCodes][16 lanes], integers held as floats -> 16 words, one of each lane.
ADPDM_VEC void store_interleaved(uint32_t* p, const Vec (*rows)[kVecs]) {
  const __m256i byte = _mm256_set1_epi32(0xff);
  for (int v = 0; v < kVecs; ++v) {
    const auto codes = [&](int row) { return _mm256_and_si256(_mm256_cvtps_epi32(rows[row][v].v), byte); };
    const __m256i low = _mm256_or_si256(codes(0), _mm256_slli_epi32(codes(1), 8));
    const __m256i high = _mm256_or_si256(codes(2), _mm256_slli_epi32(codes(3), 8));
    const __m256i words = _mm256_or_si256(low, _mm256_slli_epi32(high, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + v * Vec::kSize), words);
  }
}

// sums + the products in each lane, codes unsigned.
ADPDM_VEC __m256i multiply_add(__m256i sums, __m256i codes, __m256i columns) {
  return dot_quads(sums, codes, columns);
}

#else

constexpr int kWordCodes = 2;

// 16 floats in [-128, 255], rounded to even -> 16 / kWordCodes words.
ADPDM_VEC void store_words(uint32_t* p, const Vec* x) {
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0].v), _mm256_cvtps_epi32(x[1].v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(pairs, 0xd8));
}

// rows [kWordCodes][16 lanes], integers held as floats -> 16 words, one of each lane.
ADPDM_VEC void store_interleaved(uint32_t* p, const Vec (*rows)[kVecs]) {
  for (int v = 0; v < kVecs; ++v) {
    const __m256i low = _mm256_cvtps_epi32(rows[0][v].v);
    const __m256i high = _mm256_slli_epi32(_mm256_cvtps_epi32(rows[1][v].v), 16);
    const __m256i words = _mm256_blend_epi16(low, high, 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + v * Vec::kSize), words);
  }
}

// sums + the products in each lane. The empty asm keeps GCC 12 from making all products first.
ADPDM_VEC __m256i multiply_add(__m256i sums, __m256i codes, __m256i columns) {
  __m256i total = _mm256_add_epi32(sums, _mm256_madd_epi16(codes, columns));
  asm("" : "+x"(total));
  return total;
}

#endif

ADPDM_VEC float maximum_of(const Vec* lanes) {
  const __m256 eight = _mm256_max_ps(lanes[0].v, lanes[1].v);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// The bits of x as an integer, converted to float.
ADPDM_VEC Vec bits_as_number(Vec x) { return Vec(_mm256_cvtepi32_ps(_mm256_castps_si256(x.v))); }

// multiply() for one panel.
ADPDM_VEC void multiply_panel(const uint32_t* left, int64_t left_step, const uint32_t* right, int64_t words,
                              const int32_t* first, int32_t* sums, int64_t sums_step) {
  const auto vector = [](const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); };
  __m256i registers[kProductRows][kVecs];
#pragma GCC unroll 6
  for (int row = 0; row < kProductRows; ++row) {
    registers[row][0] = first ? vector(first) : _mm256_setzero_si256();
    registers[row][1] = first ? vector(first + Vec::kSize) : _mm256_setzero_si256();
  }
  for (int64_t word = 0; word < words; ++word, right += kLanes) {
    const __m256i low = vector(right);
    const __m256i high = vector(right + Vec::kSize);
#pragma GCC unroll 6
    for (int row = 0; row < kProductRows; ++row) {
      const __m256i codes = _mm256_set1_epi32(static_cast<int32_t>(left[row * left_step + word]));
      registers[row][0] = multiply_add(registers[row][0], codes, low);
      registers[row][1] = multiply_add(registers[row][1], codes, high);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kProductRows; ++row) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + row * sums_step), registers[row][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + row * sums_step + Vec::kSize), registers[row][1]);
  }
}

#else

constexpr int kWordCodes = 2;

ADPDM_VEC Vec load_integers(const int32_t* p) {
  Vec x;
  for (int i = 0; i < Vec::kSize; ++i) x.v[i] = static_cast<float>(p[i]);
  return x;
}

ADPDM_VEC uint32_t word_of(float low, float high) {
  return (static_cast<uint32_t>(static_cast<int32_t>(low)) & 0xffffu) |
         (static_cast<uint32_t>(static_cast<int32_t>(high)) << 16);
}

// 16 floats in [-128, 255], rounded to even -> 16 / kWordCodes words.
ADPDM_VEC void store_words(uint32_t* p, const Vec* x) {
  for (int i = 0; i < kLanes; i += 2) {
    const Vec rounded = round_half_even(x[i / Vec::kSize]);
    p[i / 2] = word_of(rounded.v[i % Vec::kSize], rounded.v[i % Vec::kSize + 1]);
  }
}

// rows [kWordCodes][16 lanes], integers held as floats -> 16 words, one of each lane.
ADPDM_VEC void store_interleaved(uint32_t* p, const Vec (*rows)[kVecs]) {
  for (int i = 0; i < kLanes; ++i) {
    p[i] = word_of(rows[0][i / Vec::kSize].v[i % Vec::kSize], rows[1][i / Vec::kSize].v[i % Vec::kSize]);
  }
}

ADPDM_VEC float maximum_of(const Vec* lanes) {
  float maximum = lanes[0].v[0];
  for (int i = 1; i < kLanes; ++i) maximum = at_least(lanes[i / Vec::kSize].v[i % Vec::kSize], maximum);
  return maximum;
}

// The bits of x as an integer, converted to float.
ADPDM_VEC Vec bits_as_number(Vec x) {
  Vec number;
  for (int i = 0; i < Vec::kSize; ++i) {
    number.v[i] = static_cast<float>(static_cast<int32_t>(float_to_bits(x.v[i])));
  }
  return number;
}

// multiply() for one panel.
ADPDM_VEC void multiply_panel(const uint32_t* left, int64_t left_step, const uint32_t* right, int64_t words,
                              const int32_t* first, int32_t* sums, int64_t sums_step) {
  for (int row = 0; row < kProductRows; ++row, sums += sums_step) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = first ? first[lane] : 0;
    for (int64_t word = 0; word < words; ++word) {
      const auto codes = static_cast<int32_t>(left[row * left_step + word]);
      for (int lane = 0; lane < kLanes; ++lane) {
        const auto column = static_cast<int32_t>(right[word * kLanes + lane]);
        sums[lane] +=
            static_cast<int16_t>(codes) * static_cast<int16_t>(column) + (codes >> 16) * (column >> 16);
      }
    }
  }
}

#endif

// sums [kProductRows][16 * panels] = first [16 * panels] (nullptr: 0) + left [kProductRows][words] x right
// [panels][words][16]: rows of left, panels and rows of sums are so many words apart. Codes of left are in
// [0, 255], of right in [-128, 127]; all their products together must fit int32.
ADPDM_VEC void multiply(const uint32_t* left, int64_t left_step, const uint32_t* right, int64_t panel_step,
                        int64_t words, int64_t panels, const int32_t* first, int32_t* sums,
                        int64_t sums_step) {
#if defined(__AVX512F__)
  const auto run = [&](auto known) {
    multiply_panels<known()>(left, left_step, right, panel_step, words, first, sums, sums_step);
  };
  if (panels == 4) return run(std::integral_constant<int, 4>());
  if (panels == 3) return run(std::integral_constant<int, 3>());
  if (panels == 2) return run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
#else
  for (int64_t panel = 0; panel < panels; ++panel) {
    multiply_panel(left, left_step, right + panel * panel_step, words,
                   first ? first + panel * kLanes : nullptr, sums + panel * kLanes, sums_step);
  }
#endif
}

}  // namespace
}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
