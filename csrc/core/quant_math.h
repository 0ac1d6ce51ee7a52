// The formulas of quantization, host and device: the only place in C++ where they are written down.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/types.h"

#if defined(__CUDACC__)
#define ADPDM_HD __host__ __device__ __forceinline__
#else
#define ADPDM_HD inline
#endif

namespace adpdm {

// Larger quotients saturate at every supported bit width, so clamping to this first never changes a code, and
// rounding by the magic constant below is exact.
constexpr float kMaxQuotient = 65536.0f;

// Adding and subtracting 1.5 * 2^23 rounds to nearest even for |x| < 2^22 with two additions that every
// vector unit has; rintf would be a library call on plain x86-64.
constexpr float kRoundMagic = 12582912.0f;

// min/max whose NaN goes to the bound: the comparison is false for NaN.
ADPDM_HD float at_least(float x, float low) { return x > low ? x : low; }
ADPDM_HD float at_most(float x, float high) { return x < high ? x : high; }

// Round half to even, |x| < 2^22.
ADPDM_HD float round_half_even(float x) { return (x + kRoundMagic) - kRoundMagic; }

// x / scale by the reciprocal (correctly rounded once per group), saturated, rounded: an integer in float32.
// NaN gives -kMaxQuotient and so ends at quant_min.
ADPDM_HD float rounded_quotient(float x, float inv_scale) {
  return round_half_even(at_most(at_least(x * inv_scale, -kMaxQuotient), kMaxQuotient));
}

// q = clamp(rint(x / scale) + zero_point, quant_min, quant_max), kept in float32 where it is exact.
ADPDM_HD float quantize_value(float x, float inv_scale, float zero_point, float quant_min, float quant_max) {
  return at_most(at_least(rounded_quotient(x, inv_scale) + zero_point, quant_min), quant_max);
}

// x^ = (q - zero_point) * scale.
ADPDM_HD float dequantize_value(float q, float zero_point, float scale) { return (q - zero_point) * scale; }

// A learned zero-point is a real number that acts as its nearest code: real 0 stays exactly representable.
ADPDM_HD float effective_zero_point(float zero_point, float quant_min, float quant_max) {
  return round_half_even(at_most(at_least(zero_point, quant_min), quant_max));
}

// Derivatives of the fake-quantized value (LSQ, Esser et al. 2020) for one element.
struct FakeQuantizeGrads {
  float x;           // straight-through: 1 inside the range, 0 where clamped
  float scale;       // rint(x/s) - x/s inside, code - zero_point at the clips
  float zero_point;  // 0 inside, -scale at the clips
};

ADPDM_HD FakeQuantizeGrads fake_quantize_grads(float x, float scale, float inv_scale, float zero_point,
                                               float quant_min, float quant_max) {
  const float rounded = rounded_quotient(x, inv_scale);
  const float unclamped = rounded + zero_point;
  const bool inside = unclamped >= quant_min && unclamped <= quant_max;
  const float clamped = at_most(at_least(unclamped, quant_min), quant_max);
  return {inside ? 1.0f : 0.0f, inside ? rounded - x * inv_scale : clamped - zero_point,
          inside ? 0.0f : -scale};
}

// Layout of the activation histogram: bins are slices of the float32 bit pattern, so that one pass needs no
// range beforehand, counts of different batches add up, and the resolution is the same relative one everywhere.
constexpr int kHistogramOctaveBins = 32;                                        // 2^5 bins per power of two
constexpr int kHistogramMinExponent = -16;                                      // |x| < 2^-16 counts as zero
constexpr int kHistogramOctaves = 32;                                           // up to 2^16, above: last bin
constexpr int kHistogramSideBins = kHistogramOctaveBins * kHistogramOctaves;    // 1024 per sign
constexpr int kHistogramBins = 2 * kHistogramSideBins + 1;                      // negative | zero | positive

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
