// The float vector of the instruction set a file is compiled for, with the operations that quant_math.h is
// written in. Everything is always inlined inside an anonymous namespace: these names differ in content from
// file to file.
#pragma once

#include <cstdint>

#include "core/quant_math.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define ADPDM_VEC __attribute__((always_inline)) inline

namespace adpdm::cpu::ADPDM_ISA_NAMESPACE {
namespace {

// The float versions would be hidden by the overloads below.
using adpdm::at_least;
using adpdm::at_most;

// Every sum runs over 16 lanes whatever the vector length, so that all instruction sets round alike.
constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct Mask {
  __mmask16 m;
};

struct Vec {
  static constexpr int kSize = 16;
  __m512 v;
  Vec() = default;
  ADPDM_VEC explicit Vec(__m512 x) : v(x) {}
  ADPDM_VEC explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
};

ADPDM_VEC Vec load(const float* p) { return Vec(_mm512_loadu_ps(p)); }
ADPDM_VEC void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
ADPDM_VEC Vec operator+(Vec a, Vec b) { return Vec(_mm512_add_ps(a.v, b.v)); }
ADPDM_VEC Vec operator-(Vec a, Vec b) { return Vec(_mm512_sub_ps(a.v, b.v)); }
ADPDM_VEC Vec operator*(Vec a, Vec b) { return Vec(_mm512_mul_ps(a.v, b.v)); }
ADPDM_VEC Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
// MAXPS and MINPS return their second operand when either is NaN.
ADPDM_VEC Vec at_least(Vec x, Vec low) { return Vec(_mm512_max_ps(x.v, low.v)); }
ADPDM_VEC Vec at_most(Vec x, Vec high) { return Vec(_mm512_min_ps(x.v, high.v)); }
ADPDM_VEC Vec add_where(Mask m, Vec a, Vec b) { return Vec(_mm512_mask_add_ps(a.v, m.m, a.v, b.v)); }
ADPDM_VEC Vec add_unless(Mask m, Vec a, Vec b) { return add_where(Mask{_knot_mask16(m.m)}, a, b); }
ADPDM_VEC Vec subtract_where(Mask m, Vec a, Vec b) { return Vec(_mm512_mask_sub_ps(a.v, m.m, a.v, b.v)); }

// Stores 16 integers held as floats, each in [-128, 127].
ADPDM_VEC void store_codes(int8_t* p, const Vec* x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x[0].v)));
}

#elif defined(__AVX2__)

struct Mask {
  __m256 m;
};

struct Vec {
  static constexpr int kSize = 8;
  __m256 v;
  Vec() = default;
  ADPDM_VEC explicit Vec(__m256 x) : v(x) {}
  ADPDM_VEC explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
};

ADPDM_VEC Vec load(const float* p) { return Vec(_mm256_loadu_ps(p)); }
ADPDM_VEC void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
ADPDM_VEC Vec operator+(Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, b.v)); }
ADPDM_VEC Vec operator-(Vec a, Vec b) { return Vec(_mm256_sub_ps(a.v, b.v)); }
ADPDM_VEC Vec operator*(Vec a, Vec b) { return Vec(_mm256_mul_ps(a.v, b.v)); }
ADPDM_VEC Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
ADPDM_VEC Vec at_least(Vec x, Vec low) { return Vec(_mm256_max_ps(x.v, low.v)); }
ADPDM_VEC Vec at_most(Vec x, Vec high) { return Vec(_mm256_min_ps(x.v, high.v)); }
ADPDM_VEC Vec add_where(Mask m, Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, _mm256_and_ps(m.m, b.v))); }
ADPDM_VEC Vec add_unless(Mask m, Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, _mm256_andnot_ps(m.m, b.v))); }
ADPDM_VEC Vec subtract_where(Mask m, Vec a, Vec b) {
  return Vec(_mm256_sub_ps(a.v, _mm256_and_ps(m.m, b.v)));
}

ADPDM_VEC void store_codes(int8_t* p, const Vec* x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0].v), _mm256_cvtps_epi32(x[1].v));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);  // packs works within 128-bit halves
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#else  // four lanes by the compiler's own vectors, on any processor

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));

struct Mask {
  Int4 m;  // 0 or -1
};

struct Vec {
  static constexpr int kSize = 4;
  Float4 v;
  Vec() = default;
  ADPDM_VEC explicit Vec(Float4 x) : v(x) {}
  ADPDM_VEC explicit Vec(float x) : v(Float4{x, x, x, x}) {}
};

ADPDM_VEC Vec load(const float* p) {
  Float4 v;
  std::memcpy(&v, p, sizeof v);
  return Vec(v);
}
ADPDM_VEC void store(float* p, Vec x) { std::memcpy(p, &x.v, sizeof x.v); }
ADPDM_VEC Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
ADPDM_VEC Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
ADPDM_VEC Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
ADPDM_VEC Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
ADPDM_VEC Vec masked(Int4 m, Vec x) { return Vec(reinterpret_cast<Float4>(m & reinterpret_cast<Int4>(x.v))); }
#if defined(__SSE2__)
ADPDM_VEC Vec at_least(Vec x, Vec low) { return Vec(static_cast<Float4>(_mm_max_ps(x.v, low.v))); }
ADPDM_VEC Vec at_most(Vec x, Vec high) { return Vec(static_cast<Float4>(_mm_min_ps(x.v, high.v))); }
#else
ADPDM_VEC Vec select(Mask m, Vec yes, Vec no) {
  return Vec(reinterpret_cast<Float4>((m.m & reinterpret_cast<Int4>(yes.v)) |
                                      (~m.m & reinterpret_cast<Int4>(no.v))));
}
ADPDM_VEC Vec at_least(Vec x, Vec low) { return select(Mask{x.v > low.v}, x, low); }
ADPDM_VEC Vec at_most(Vec x, Vec high) { return select(Mask{x.v < high.v}, x, high); }
#endif
ADPDM_VEC Vec add_where(Mask m, Vec a, Vec b) { return a + masked(m.m, b); }
ADPDM_VEC Vec add_unless(Mask m, Vec a, Vec b) { return a + masked(~m.m, b); }
ADPDM_VEC Vec subtract_where(Mask m, Vec a, Vec b) { return a - masked(m.m, b); }

#if defined(__SSE2__)
ADPDM_VEC void store_codes(int8_t* p, const Vec* x) {
  const __m128i low = _mm_packs_epi32(_mm_cvtps_epi32(x[0].v), _mm_cvtps_epi32(x[1].v));
  const __m128i high = _mm_packs_epi32(_mm_cvtps_epi32(x[2].v), _mm_cvtps_epi32(x[3].v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, high));
}
#else
ADPDM_VEC void store_codes(int8_t* p, const Vec* x) {
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<int8_t>(static_cast<int32_t>(x[i / Vec::kSize].v[i % Vec::kSize]));
  }
}
#endif

#endif

constexpr int kVecs = kLanes / Vec::kSize;  // vectors that hold 16 lanes

}  // namespace
}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
