// exp, SiLU and GELUs from additions, multiplications, fma and division only: every backend and instruction
// set gives the same bits, which no two libraries' expf do.
#pragma once

#include "core/float_convert.h"
#include "core/quant_math.h"

namespace adpdm {

// T is float, or a vector type with at_least, at_most, operators and these two.
ADPDM_HD float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
// x * 2^n for n + kRoundMagic, where x and the product are normal numbers: the last bits of the sum are n,
// and an addition to the exponent takes less than a conversion and a multiplication.
ADPDM_HD float times_power_of_two(float x, float n_plus_magic) {
  return bits_to_float(float_to_bits(x) + (float_to_bits(n_plus_magic) << 23));
}

constexpr float kLog2E = 1.44269504f;
constexpr float kMaxExponent = 87.0f;  // e to its power and to that of its negative are normal numbers

// e^x of x * factor = x * log2(e), where |x| <= kMaxExponent and factor is kLog2E; e^-x where it is -kLog2E.
// Relative error below 2^-23 + |x| * 2^-26, of which the second part is that of the constant. The polynomial
// for 2^r on [-1/2, 1/2] is 1 at 0 and has the least relative error otherwise (Remez, 2^-28.5).
template <typename T>
ADPDM_HD T exp_of(T x, T factor) {
  const T n_plus_magic = fused_multiply_add(x, factor, T(kRoundMagic));  // as round_half_even()
  const T r = fused_multiply_add(x, factor, T(kRoundMagic) - n_plus_magic);
  T p = T(1.55946778e-4f);
  p = fused_multiply_add(p, r, T(1.34066434e-3f));
  p = fused_multiply_add(p, r, T(9.61769279e-3f));
  p = fused_multiply_add(p, r, T(5.55031039e-2f));
  p = fused_multiply_add(p, r, T(0.240226522f));
  p = fused_multiply_add(p, r, T(0.693147242f));
  p = fused_multiply_add(p, r, T(1.0f));
  return times_power_of_two(p, n_plus_magic);
}

// 2^x for x in [-125, 126], relative error below 7.5e-5: enough for what becomes one of 256 codes. The cubic
// has the least relative error on [-1/2, 1/2] (Remez).
template <typename T>
ADPDM_HD T exp2_coarse(T x) {
  const T n_plus_magic = x + T(kRoundMagic);
  const T r = x - (n_plus_magic - T(kRoundMagic));
  T p = T(0.0551716691f);
  p = fused_multiply_add(p, r, T(0.242611122f));
  p = fused_multiply_add(p, r, T(0.693260985f));
  p = fused_multiply_add(p, r, T(0.999928074f));
  return times_power_of_two(p, n_plus_magic);
}

// 1 + e^-x, clamped: 1 for x above kMaxExponent, 6e37 for x below its negative and for NaN, which stays NaN
// by being divided itself.
template <typename T>
ADPDM_HD T one_and_exp_of_negative(T x) {
  return T(1.0f) + exp_of(at_most(at_least(x, T(-kMaxExponent)), T(kMaxExponent)), T(-kLog2E));
}

// x * sigmoid(x).
template <typename T>
ADPDM_HD T silu(T x) {
  return x / one_and_exp_of_negative(x);
}

// x * Phi(x) by the error function of Abramowitz and Stegun 7.1.26 (absolute error of erf below 1.5e-7).
template <typename T>
ADPDM_HD T gelu(T x) {
  const T z = at_least(x, T(0.0f) - x) * T(0.707106781f);  // |x| / sqrt 2
  const T t = T(1.0f) / fused_multiply_add(z, T(0.3275911f), T(1.0f));
  T p = T(1.061405429f);
  p = fused_multiply_add(p, t, T(-1.453152027f));
  p = fused_multiply_add(p, t, T(1.421413741f));
  p = fused_multiply_add(p, t, T(-0.284496736f));
  p = fused_multiply_add(p, t, T(0.254829592f));
  const T tail = p * t * exp_of(at_most(z * z, T(kMaxExponent)), T(-kLog2E));  // 1 - erf(z)
  // x * (1 + erf(x / sqrt 2)) / 2: half of x times the tail on the negative side, its complement on the
  // other.
  const T half = x * T(0.5f);
  // Where the clamp counts the tail is below 1e-38; an infinity times 0 would be NaN.
  return at_least(x, T(0.0f)) - at_most(at_least(half, T(0.0f) - half), T(64.0f)) * tail;
}

// x / 2 * (1 + tanh u) = x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3), the approximation of
// Hendrycks and Gimpel 2016.
template <typename T>
ADPDM_HD T gelu_tanh(T x) {
  const T cubic = fused_multiply_add(x * x, T(0.0713548163f), T(1.59576912f));  // 2 u / x
  return x / one_and_exp_of_negative(x * cubic);
}

}  // namespace adpdm
