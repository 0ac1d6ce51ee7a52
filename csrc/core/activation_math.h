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

// e^x, relative error below 2^-22, for x clamped to [-87, 88]: below float32's subnormals and infinity, so
// that no result is either.
template <typename T>
ADPDM_HD T exp_clamped(T x) {
  x = at_most(at_least(x, T(-87.0f)), T(88.0f));
  const T n_plus_magic = x * T(1.44269504f) + T(kRoundMagic);  // as round_half_even()
  const T n = n_plus_magic - T(kRoundMagic);
  // ln 2 in two parts: n times the first, of 15 bits, is exact.
  T r = fused_multiply_add(n, T(-0.693145752f), x);
  r = fused_multiply_add(n, T(-1.42860677e-6f), r);
  // e^r on [-ln2/2, ln2/2]: Taylor's terms to r^7, whose first missing one is below 2^-27.
  T p = T(1.98412698e-4f);
  p = fused_multiply_add(p, r, T(1.38888889e-3f));
  p = fused_multiply_add(p, r, T(8.33333333e-3f));
  p = fused_multiply_add(p, r, T(4.16666667e-2f));
  p = fused_multiply_add(p, r, T(1.66666667e-1f));
  p = fused_multiply_add(p, r, T(0.5f));
  p = fused_multiply_add(p, r, T(1.0f));
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

// x * sigmoid(x). NaN becomes -87 in the exponent and stays NaN by the last division.
template <typename T>
ADPDM_HD T silu(T x) {
  return x / (T(1.0f) + exp_clamped(T(0.0f) - x));
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
  const T tail = p * t * exp_clamped(T(0.0f) - z * z);  // 1 - erf(z)
  // x * (1 + erf(x / sqrt 2)) / 2: half of x times the tail on the negative side, its complement on the
  // other.
  const T half = x * T(0.5f);
  return at_least(x, T(0.0f)) - at_least(half, T(0.0f) - half) * tail;
}

// x / 2 * (1 + tanh u) = x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3), the approximation of
// Hendrycks and Gimpel 2016.
template <typename T>
ADPDM_HD T gelu_tanh(T x) {
  const T cubic = fused_multiply_add(x * x, T(0.0713548163f), T(1.59576912f));  // 2 u / x
  return x / (T(1.0f) + exp_clamped(T(0.0f) - x * cubic));
}

}  // namespace adpdm
