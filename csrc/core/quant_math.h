// The formulas of quantization, host and device: the only place in C++ where they are written down.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/types.h"

// always_inline: an inline function that is not inlined in an AVX-512 file would be merged by the linker with
// the one of a baseline file.
#if defined(__CUDACC__)
#define ADPDM_HD __host__ __device__ __forceinline__
#else
#define ADPDM_HD __attribute__((always_inline)) inline
#endif

namespace adpdm {

// Larger quotients saturate at every supported bit width, so clamping to this first never changes a code, and
// rounding by the magic constant below is exact.
constexpr float kMaxQuotient = 65536.0f;

// Adding and subtracting 1.5 * 2^23 rounds to nearest even for |x| < 2^22 with two additions that every
// vector unit has; rintf would be a library call on plain x86-64.
constexpr float kRoundMagic = 12582912.0f;

// T below is float, or the vector type of a CPU instruction set, which brings its own operators, at_least,
// at_most and subtract_where (cpu/vec.h).

// min/max whose NaN goes to the bound: the comparison is false for NaN. On the device one instruction does
// the same, where it need not mind that the bound itself might be NaN.
#if defined(__CUDA_ARCH__)
ADPDM_HD float at_least(float x, float low) { return fmaxf(x, low); }
ADPDM_HD float at_most(float x, float high) { return fminf(x, high); }
#else
ADPDM_HD float at_least(float x, float low) { return x > low ? x : low; }
ADPDM_HD float at_most(float x, float high) { return x < high ? x : high; }
#endif
ADPDM_HD float subtract_where(bool condition, float x, float y) { return condition ? x - y : x; }

// Round half to even, |x| < 2^22.
template <typename T>
ADPDM_HD T round_half_even(T x) {
  return (x + T(kRoundMagic)) - T(kRoundMagic);
}

// x / scale by the reciprocal (correctly rounded once per group), saturated, rounded: an integer in float32.
// NaN gives -kMaxQuotient and so ends at quant_min.
template <typename T>
ADPDM_HD T rounded_quotient(T x, T inv_scale) {
  return round_half_even(at_most(at_least(x * inv_scale, T(-kMaxQuotient)), T(kMaxQuotient)));
}

// q = clamp(rint(x / scale) + zero_point, quant_min, quant_max), kept in float32 where it is exact.
template <typename T>
ADPDM_HD T quantize_value(T x, T inv_scale, T zero_point, T quant_min, T quant_max) {
  return at_most(at_least(rounded_quotient(x, inv_scale) + zero_point, quant_min), quant_max);
}

// x^ = (q - zero_point) * scale.
template <typename T>
ADPDM_HD T dequantize_value(T q, T zero_point, T scale) {
  return (q - zero_point) * scale;
}

// A learned zero-point is a real number that acts as its nearest code: real 0 stays exactly representable.
ADPDM_HD float effective_zero_point(float zero_point, float quant_min, float quant_max) {
  return round_half_even(at_most(at_least(zero_point, quant_min), quant_max));
}

// q - zero_point for a zero_point within [quant_min, quant_max], given the integers low = quant_min -
// zero_point and high = quant_max - zero_point: clamping to integers and rounding commute, so one clamp does
// the work of two.
template <typename T>
ADPDM_HD T quantized_steps(T x, T inv_scale, T low, T high) {
  return round_half_even(at_most(at_least(x * inv_scale, low), high));
}

// What the derivatives of the fake-quantized value steps * scale are made of (LSQ, Esser et al. 2020).
template <typename T, typename Mask>
struct FakeQuantizeTerms {
  T steps;       // q - zero_point
  T scale_grad;  // d/dscale: rint(x/s) - x/s inside, code - zero_point at the clips
  Mask inside;   // d/dx is 1 and d/dzero_point is 0 where true; 0 and -scale where clamped
};

// The terms of one element; low and high as in quantized_steps.
template <typename T>
ADPDM_HD auto fake_quantize_terms(T x, T inv_scale, T low, T high) {
  const T rounded = rounded_quotient(x, inv_scale);
  const T steps = at_most(at_least(rounded, low), high);
  const auto inside = rounded == steps;
  return FakeQuantizeTerms<T, decltype(rounded == steps)>{steps, subtract_where(inside, steps, x * inv_scale),
                                                          inside};
}

// Derivatives of the fake-quantized value for one element.
struct FakeQuantizeGrads {
  float x;           // straight-through: 1 inside the range, 0 where clamped
  float scale;       // rint(x/s) - x/s inside, code - zero_point at the clips
  float zero_point;  // 0 inside, -scale at the clips
};

// zero_point is an effective one: a code within [quant_min, quant_max].
ADPDM_HD FakeQuantizeGrads fake_quantize_grads(float x, float scale, float inv_scale, float zero_point,
                                               float quant_min, float quant_max) {
  const auto terms = fake_quantize_terms(x, inv_scale, quant_min - zero_point, quant_max - zero_point);
  return {terms.inside ? 1.0f : 0.0f, terms.scale_grad, terms.inside ? 0.0f : -scale};
}

// Layout of the activation histogram: bins are slices of the float32 bit pattern, so that one pass needs no
// range beforehand, counts of different batches add up, and the resolution is the same relative one
// everywhere.
constexpr int kHistogramOctaveBins = 32;                                      // 2^5 bins per power of two
constexpr int kHistogramMinExponent = -16;                                    // |x| < 2^-16 counts as zero
constexpr int kHistogramOctaves = 32;                                         // up to 2^16, above: last bin
constexpr int kHistogramSideBins = kHistogramOctaveBins * kHistogramOctaves;  // 1024 per sign
constexpr int kHistogramBins = 2 * kHistogramSideBins + 1;                    // negative | zero | positive

// Bin of x: [0, 1024) negative, most negative first; 1024 zero; (1024, 2048] positive. NaN counts as the last
// bin of its sign; callers find it in the extrema.
ADPDM_HD int32_t histogram_bin(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t magnitude = static_cast<int32_t>((bits & 0x7fffffffu) >> 18);
  int32_t slot = magnitude - ((127 + kHistogramMinExponent) << 5);  // < 0: zero bin
  slot = slot < -1 ? -1 : slot;
  slot = slot > kHistogramSideBins - 1 ? kHistogramSideBins - 1 : slot;
  const int32_t offset = slot + 1;  // 0 for the zero bin
  return (bits >> 31) ? kHistogramSideBins - offset : kHistogramSideBins + offset;
}

}  // namespace adpdm
