// Bit-exact conversions between float32 and the 16-bit float types, branch-free so that loops over them
// vectorise.
#pragma once

#include "core/quant_math.h"

namespace adpdm {

ADPDM_HD float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

ADPDM_HD uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

ADPDM_HD float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays NaN.
ADPDM_HD uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// A half subnormal is m * 2^-24, which is what the low mantissa bits of 0.5f count.
ADPDM_HD float f16_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 -> 127
  const uint32_t infinite = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude | 0x3f000000u) - 0.5f);
  const uint32_t finite = magnitude < 0x400u ? subnormal : normal;
  return bits_to_float((magnitude >= 0x7c00u ? infinite : finite) |
                       (static_cast<uint32_t>(h & 0x8000u) << 16));
}

// Round to nearest even, overflow to infinity, NaN stays NaN.
ADPDM_HD uint16_t float_to_f16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t special = magnitude > 0x7f800000u ? nan : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | ((bits >> 16) & 0x8000u));
}

}  // namespace adpdm
