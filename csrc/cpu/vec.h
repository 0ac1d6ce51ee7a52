// The float vector of the instruction set a file is compiled for, with the operations that quant_math.h is
// written in. Everything is always inlined inside an anonymous namespace: these names differ in content from
// file to file.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/activation_math.h"
#include "core/float_convert.h"
#include "cpu/quantize_kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define ADPDM_VEC __attribute__((always_inline)) inline

namespace adpdm::cpu::ADPDM_ISA_NAMESPACE {
namespace {

// The float versions would be hidden by the overloads below.
using adpdm::at_least;
using adpdm::at_most;
using adpdm::fused_multiply_add;
using adpdm::times_power_of_two;

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
ADPDM_VEC Vec operator/(Vec a, Vec b) { return Vec(_mm512_div_ps(a.v, b.v)); }
ADPDM_VEC Vec fused_multiply_add(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(a.v, b.v, c.v)); }
ADPDM_VEC Vec times_power_of_two(Vec x, Vec n_plus_magic) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(n_plus_magic.v), 23);
  return Vec(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), exponent)));
}
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

ADPDM_VEC Vec load_codes(const int8_t* p) {
  return Vec(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}

// As core/float_convert.h, Vec::kSize elements; vcvtneps2bf16 would flush subnormals.
ADPDM_VEC Vec load_bf16(const uint16_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
}
ADPDM_VEC Vec load_f16(const uint16_t* p) {
  return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
ADPDM_VEC void store_bf16(uint16_t* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet_nan = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
  const __m512i half = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, quiet_nan);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(half));
}
ADPDM_VEC void store_f16(uint16_t* p, Vec x) {
  const __m256i half = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
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
ADPDM_VEC Vec operator/(Vec a, Vec b) { return Vec(_mm256_div_ps(a.v, b.v)); }
ADPDM_VEC Vec fused_multiply_add(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(a.v, b.v, c.v)); }
ADPDM_VEC Vec times_power_of_two(Vec x, Vec n_plus_magic) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n_plus_magic.v), 23);
  return Vec(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.v), exponent)));
}
ADPDM_VEC Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
ADPDM_VEC Vec at_least(Vec x, Vec low) { return Vec(_mm256_max_ps(x.v, low.v)); }
ADPDM_VEC Vec at_most(Vec x, Vec high) { return Vec(_mm256_min_ps(x.v, high.v)); }
ADPDM_VEC Vec add_where(Mask m, Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, _mm256_and_ps(m.m, b.v))); }
ADPDM_VEC Vec add_unless(Mask m, Vec a, Vec b) { return Vec(_mm256_add_ps(a.v, _mm256_andnot_ps(m.m, b.v))); }
ADPDM_VEC Vec subtract_where(Mask m, Vec a, Vec b) {
  return Vec(_mm256_sub_ps(a.v, _mm256_and_ps(m.m, b.v)));
}

ADPDM_VEC Vec load_codes(const int8_t* p) {
  return Vec(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
}

// As core/float_convert.h, Vec::kSize elements.
ADPDM_VEC Vec load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
ADPDM_VEC Vec load_f16(const uint16_t* p) {
  return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
ADPDM_VEC void store_bf16(uint16_t* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i quiet_nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i half = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet_nan, is_nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
ADPDM_VEC void store_f16(uint16_t* p, Vec x) {
  const __m128i half = _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}

#else  // four lanes by the compiler's own vectors, on any processor

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Uint4 = uint32_t __attribute__((vector_size(16)));

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
ADPDM_VEC Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
ADPDM_VEC Vec fused_multiply_add(Vec a, Vec b, Vec c) {
  Vec sum;
  for (int i = 0; i < Vec::kSize; ++i) sum.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return sum;
}
ADPDM_VEC Vec times_power_of_two(Vec x, Vec n_plus_magic) {
  const Uint4 exponent = reinterpret_cast<Uint4>(n_plus_magic.v) << 23;
  return Vec(reinterpret_cast<Float4>(reinterpret_cast<Uint4>(x.v) + exponent));
}
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

ADPDM_VEC Vec load_bf16(const uint16_t* p) {
  Vec x;
  for (int i = 0; i < Vec::kSize; ++i) x.v[i] = bf16_to_float(p[i]);
  return x;
}
ADPDM_VEC Vec load_f16(const uint16_t* p) {
  Vec x;
  for (int i = 0; i < Vec::kSize; ++i) x.v[i] = f16_to_float(p[i]);
  return x;
}
ADPDM_VEC void store_bf16(uint16_t* p, Vec x) {
  for (int i = 0; i < Vec::kSize; ++i) p[i] = float_to_bf16(x.v[i]);
}
ADPDM_VEC void store_f16(uint16_t* p, Vec x) {
  for (int i = 0; i < Vec::kSize; ++i) p[i] = float_to_f16(x.v[i]);
}

#endif

constexpr int kVecs = kLanes / Vec::kSize;  // vectors that hold 16 lanes

// A quantizer with every number in all lanes.
struct VecQuantizer {
  Vec inv_scale, zero_point, quant_min, quant_max;
  ADPDM_VEC explicit VecQuantizer(const Quantizer& q)
      : inv_scale(q.inv_scale), zero_point(q.zero_point), quant_min(q.quant_min), quant_max(q.quant_max) {}
};

// store_quantized stores quantize_value of 16 lanes, store_many_quantized of kManyLanes at x, which are whole
// vectors of bytes; kIs8Bit: of a quantizer whose codes are all there are in a byte.
#if defined(__AVX2__)
// In integers, which takes a third of the instructions: the conversion rounds to even and turns NaN and what
// is too low for it into the lowest integer, so that only the upper clamp is needed before it; 16-bit
// arithmetic that saturates does what the clamp to kMaxQuotient is for.
#if defined(__AVX512F__)
// quantize_value of 32 lanes without its last clamps, as 16-bit integers: four of each vector in turns.
ADPDM_VEC __m512i rounded_words(Vec first, Vec second, const VecQuantizer& q) {
  const __m512 high = _mm512_set1_ps(kMaxQuotient);
  const auto rounded = [&](Vec v) {
    return _mm512_cvtps_epi32(_mm512_min_ps(high, _mm512_mul_ps(v.v, q.inv_scale.v)));  // NaN stays NaN
  };
  const __m512i zero_point = _mm512_cvtps_epi32(q.zero_point.v);
  const __m512i words = _mm512_packs_epi32(rounded(first), rounded(second));
  return _mm512_adds_epi16(words, _mm512_packs_epi32(zero_point, zero_point));
}

constexpr int64_t kManyLanes = 64;

template <bool kIs8Bit>
ADPDM_VEC void store_many_quantized(int8_t* p, const float* x, const VecQuantizer& q) {
  const __m512i first = rounded_words(load(x), load(x + 16), q);
  const __m512i second = rounded_words(load(x + 32), load(x + 48), q);
  __m512i codes = _mm512_packs_epi16(first, second);
  if constexpr (!kIs8Bit) {
    const __m512i low = _mm512_set1_epi8(static_cast<char>(_mm512_cvtss_f32(q.quant_min.v)));
    const __m512i top = _mm512_set1_epi8(static_cast<char>(_mm512_cvtss_f32(q.quant_max.v)));
    codes = _mm512_min_epi8(_mm512_max_epi8(codes, low), top);
  }
  // Four at a time: packing took the first four of every vector, then the next four of every vector.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, codes));
}

ADPDM_VEC void store_quantized(int8_t* p, const Vec* x, const VecQuantizer& q) {
  const Vec codes = quantize_value(x[0], q.inv_scale, q.zero_point, q.quant_min, q.quant_max);
  store_codes(p, &codes);
}
#else
// quantize_value of 16 lanes without its last clamps, as 16-bit integers: lanes 0-3, 8-11, 4-7, 12-15.
ADPDM_VEC __m256i rounded_words(Vec first, Vec second, const VecQuantizer& q) {
  const __m256 high = _mm256_set1_ps(kMaxQuotient);
  const auto rounded = [&](Vec v) {
    return _mm256_cvtps_epi32(_mm256_min_ps(high, _mm256_mul_ps(v.v, q.inv_scale.v)));  // NaN stays NaN
  };
  const __m256i zero_point = _mm256_cvtps_epi32(q.zero_point.v);
  const __m256i words = _mm256_packs_epi32(rounded(first), rounded(second));
  return _mm256_adds_epi16(words, _mm256_packs_epi32(zero_point, zero_point));
}

// Codes of 32 lanes in order, from two results of rounded_words.
template <bool kIs8Bit = false>
ADPDM_VEC __m256i codes_in_order(__m256i first, __m256i second, const VecQuantizer& q) {
  __m256i codes = _mm256_packs_epi16(first, second);
  if constexpr (!kIs8Bit) {
    const __m256i low = _mm256_set1_epi8(static_cast<char>(_mm256_cvtss_f32(q.quant_min.v)));
    const __m256i top = _mm256_set1_epi8(static_cast<char>(_mm256_cvtss_f32(q.quant_max.v)));
    codes = _mm256_min_epi8(_mm256_max_epi8(codes, low), top);
  }
  return _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));  // four at a time
}

constexpr int64_t kManyLanes = 32;

template <bool kIs8Bit>
ADPDM_VEC void store_many_quantized(int8_t* p, const float* x, const VecQuantizer& q) {
  const __m256i first = rounded_words(load(x), load(x + 8), q);
  const __m256i second = rounded_words(load(x + 16), load(x + 24), q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), codes_in_order<kIs8Bit>(first, second, q));
}

ADPDM_VEC void store_quantized(int8_t* p, const Vec* x, const VecQuantizer& q) {
  const __m256i words = rounded_words(x[0], x[1], q);
  const __m256i codes = codes_in_order(words, words, q);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(codes));
}
#endif
#else
constexpr int64_t kManyLanes = kLanes;

ADPDM_VEC void store_quantized(int8_t* p, const Vec* x, const VecQuantizer& q) {
  Vec codes[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    codes[v] = quantize_value(x[v], q.inv_scale, q.zero_point, q.quant_min, q.quant_max);
  }
  store_codes(p, codes);
}

template <bool kIs8Bit>
ADPDM_VEC void store_many_quantized(int8_t* p, const float* x, const VecQuantizer& q) {
  Vec lanes[kVecs];
  for (int v = 0; v < kVecs; ++v) lanes[v] = load(x + v * Vec::kSize);
  store_quantized(p, lanes, q);
}
#endif

constexpr int64_t padded_to_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// N vectors that take every step of a formula together: a chain of dependent steps such as exp leaves the
// units idle for most of its latency, N of them side by side do not.
template <int N>
struct Vecs {
  static constexpr int kSize = N * Vec::kSize;
  Vec v[N];
  Vecs() = default;
  ADPDM_VEC explicit Vecs(float x) {
    for (int i = 0; i < N; ++i) v[i] = Vec(x);
  }
};

#define ADPDM_VECS_OPERATOR(op)                            \
  template <int N>                                         \
  ADPDM_VEC Vecs<N> operator op(Vecs<N> a, Vecs<N> b) {    \
    for (int i = 0; i < N; ++i) a.v[i] = a.v[i] op b.v[i]; \
    return a;                                              \
  }
ADPDM_VECS_OPERATOR(+)
ADPDM_VECS_OPERATOR(-)
ADPDM_VECS_OPERATOR(*)
ADPDM_VECS_OPERATOR(/)
#undef ADPDM_VECS_OPERATOR

template <int N>
ADPDM_VEC Vecs<N> at_least(Vecs<N> x, Vecs<N> low) {
  for (int i = 0; i < N; ++i) x.v[i] = at_least(x.v[i], low.v[i]);
  return x;
}
template <int N>
ADPDM_VEC Vecs<N> at_most(Vecs<N> x, Vecs<N> high) {
  for (int i = 0; i < N; ++i) x.v[i] = at_most(x.v[i], high.v[i]);
  return x;
}
template <int N>
ADPDM_VEC Vecs<N> fused_multiply_add(Vecs<N> a, Vecs<N> b, Vecs<N> c) {
  for (int i = 0; i < N; ++i) a.v[i] = fused_multiply_add(a.v[i], b.v[i], c.v[i]);
  return a;
}
template <int N>
ADPDM_VEC Vecs<N> times_power_of_two(Vecs<N> x, Vecs<N> n_plus_magic) {
  for (int i = 0; i < N; ++i) x.v[i] = times_power_of_two(x.v[i], n_plus_magic.v[i]);
  return x;
}

// Elements i.. of a tensor of that type; Vec::kSize of them.
template <FloatType kType>
ADPDM_VEC Vec load_as(const void* data, int64_t i) {
  if constexpr (kType == FloatType::kFloat32) return load(static_cast<const float*>(data) + i);
  if constexpr (kType == FloatType::kBFloat16) return load_bf16(static_cast<const uint16_t*>(data) + i);
  if constexpr (kType == FloatType::kFloat16) return load_f16(static_cast<const uint16_t*>(data) + i);
}
template <FloatType kType>
ADPDM_VEC void store_as(void* data, int64_t i, Vec x) {
  if constexpr (kType == FloatType::kFloat32) store(static_cast<float*>(data) + i, x);
  if constexpr (kType == FloatType::kBFloat16) store_bf16(static_cast<uint16_t*>(data) + i, x);
  if constexpr (kType == FloatType::kFloat16) store_f16(static_cast<uint16_t*>(data) + i, x);
}

// Calls body(std::integral_constant<FloatType, type>), so that the type is known where it is compiled.
template <typename Body>
ADPDM_VEC void with_type(FloatType type, Body&& body) {
  if (type == FloatType::kFloat32) return body(std::integral_constant<FloatType, FloatType::kFloat32>());
  if (type == FloatType::kBFloat16) return body(std::integral_constant<FloatType, FloatType::kBFloat16>());
  body(std::integral_constant<FloatType, FloatType::kFloat16>());
}

}  // namespace
}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
