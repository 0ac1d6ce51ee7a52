// What both normalisations that end in codes do with a value, and the vectors of 16 bytes or of one element
// they read it in.
#pragma once

#include "core/activation_math.h"
#include "cuda/elementwise.cuh"
#include "cuda/quantizer.cuh"

namespace adpdm::cuda {

// y = fma(fma(x, factor, offset), gain, shift); gain and shift only with modulation.
template <int kSize>
struct NormCoefficients {
  float factor[kSize], offset[kSize], gain[kSize], shift[kSize];
};

template <int kSize>
ADPDM_DEVICE void normalize(float (&x)[kSize], const NormCoefficients<kSize>& k, bool modulated,
                            bool silu_after) {
  ADPDM_UNROLL
  for (int i = 0; i < kSize; ++i) x[i] = fused_multiply_add(x[i], k.factor[i], k.offset[i]);
  if (modulated) {
    ADPDM_UNROLL
    for (int i = 0; i < kSize; ++i) x[i] = fused_multiply_add(x[i], k.gain[i], k.shift[i]);
  }
  if (silu_after) {
    ADPDM_UNROLL
    for (int i = 0; i < kSize; ++i) x[i] = silu(x[i]);
  }
}

// The codes of 1, 4 or 8 values, to an address that is a multiple of as many bytes.
template <int kSize>
ADPDM_DEVICE void store_codes(int8_t* codes, const float (&x)[kSize], const Quantizer& q) {
  if constexpr (kSize == 1) {
    store(codes, code_of(x[0], q));
  } else if constexpr (kSize == 4) {
    store(reinterpret_cast<uint32_t*>(codes), code_word(x, q));
  } else {
    store(reinterpret_cast<Bytes8*>(codes), Bytes8{{code_word(x, q), code_word(x + 4, q)}});
  }
}

// kSize elements of a float tensor, kVector<kType> or 1, still in its type.
template <FloatType kType, int kSize>
struct RawVector {
  static constexpr bool kSingle = kSize == 1;
  std::conditional_t<kSingle, std::conditional_t<kType == FloatType::kFloat32, float, uint16_t>, Bytes16>
      bits;

  ADPDM_DEVICE void load_from(const void* base, int64_t index) {
    if constexpr (kSingle) {
      bits = load(static_cast<const decltype(bits)*>(base) + index);
    } else {
      bits = load_raw<kType>(base, index);
    }
  }

  ADPDM_DEVICE void unpack(float (&x)[kSize]) const {
    if constexpr (!kSingle) {
      unpack_vector<kType>(bits, x);
    } else if constexpr (kType == FloatType::kFloat32) {
      x[0] = bits;
    } else {
      x[0] = half_bits_to_float(bits, kType);
    }
  }
};

// Calls body(FloatTag<type>(), std::integral_constant<int, elements of a vector>()).
template <typename Body>
void with_vectors(FloatType type, bool vectors, Body&& body) {
  with_float_type(type, [&](auto tag) {
    if (vectors) {
      body(tag, std::integral_constant<int, kVector<decltype(tag)::value>>());
    } else {
      body(tag, std::integral_constant<int, 1>());
    }
  });
}

}  // namespace adpdm::cuda
