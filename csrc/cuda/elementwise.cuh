// What the element-wise kernels share: 16-byte vectors of float tensors, how a tensor is cut into pieces for
// warps, and the choice of the instantiation for an element type.
#pragma once

#include "core/row_view.h"
#include "cuda/device.cuh"

namespace adpdm::cuda {

// A float type as a type, for generic lambdas.
template <FloatType kType>
using FloatTag = std::integral_constant<FloatType, kType>;

// Calls body(FloatTag<type>()).
template <typename Body>
void with_float_type(FloatType type, Body&& body) {
  if (type == FloatType::kFloat32) return body(FloatTag<FloatType::kFloat32>());
  if (type == FloatType::kBFloat16) return body(FloatTag<FloatType::kBFloat16>());
  body(FloatTag<FloatType::kFloat16>());
}

// Elements in 16 bytes.
template <FloatType kType>
constexpr int kVector = kType == FloatType::kFloat32 ? 4 : 8;

template <FloatType kType>
ADPDM_DEVICE void unpack_vector(const Bytes16& raw, float* x) {  // [kVector]
  ADPDM_UNROLL
  for (int i = 0; i < kVector<kType>; ++i) {
    if constexpr (kType == FloatType::kFloat32) {
      x[i] = bits_to_float(raw.word[i]);
    } else {
      x[i] = half_bits_to_float(static_cast<uint16_t>(raw.word[i / 2] >> (i % 2 * 16)), kType);
    }
  }
}

template <FloatType kType>
ADPDM_DEVICE Bytes16 pack_vector(const float* x) {  // [kVector]
  Bytes16 raw;
  ADPDM_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (kType == FloatType::kFloat32) {
      raw.word[w] = float_to_bits(x[w]);
    } else {
      const uint32_t low = float_to_half_bits(x[2 * w], kType);
      raw.word[w] = low | static_cast<uint32_t>(float_to_half_bits(x[2 * w + 1], kType)) << 16;
    }
  }
  return raw;
}

// Elements [index, index + kVector) of a tensor; their address is a multiple of 16.
template <FloatType kType>
ADPDM_DEVICE Bytes16 load_raw(const void* base, int64_t index) {
  return load(reinterpret_cast<const Bytes16*>(static_cast<const char*>(base) + index * float_size(kType)));
}

template <FloatType kType>
ADPDM_DEVICE void load_vector(const void* base, int64_t index, float* x) {  // [kVector]
  unpack_vector<kType>(load_raw<kType>(base, index), x);
}

template <FloatType kType>
ADPDM_DEVICE void store_vector(void* base, int64_t index, const float* x) {  // [kVector]
  store(reinterpret_cast<Bytes16*>(static_cast<char*>(base) + index * float_size(kType)),
        pack_vector<kType>(x));
}

// Where element `index` of the rows, counted without gaps, lies. The division is the price of a channel
// slice; a tensor without gaps is one row.
ADPDM_DEVICE int64_t element_offset(const RowView& x, int64_t index) {
  if (x.rows == 1) return index;
  const auto row = static_cast<int64_t>(static_cast<uint64_t>(index) / static_cast<uint64_t>(x.columns));
  return index + row * (x.stride - x.columns);
}

// kChunks times 32 vectors from element `first` on, a vector a lane: raw[c] of lane l holds the elements from
// first + (32 * c + l) * kVector on. All loads are under way before the first is waited for.
template <FloatType kType, int kChunks>
ADPDM_DEVICE void load_chunks(const RowView& x, int64_t first, Bytes16 (&raw)[kChunks]) {
  const int64_t index = first + lane_index() * kVector<kType>;
  if (x.rows == 1) {
    ADPDM_UNROLL
    for (int c = 0; c < kChunks; ++c)
      raw[c] = load_raw<kType>(x.data, index + c * kWarpSize * kVector<kType>);
  } else {
    ADPDM_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      raw[c] = load_raw<kType>(x.data, element_offset(x, index + c * kWarpSize * kVector<kType>));
    }
  }
}

// ---- host side ----

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether every 16 bytes of the rows' elements, counted without gaps, lie side by side at a multiple of 16.
inline bool rows_have_vectors(const RowView& x) {
  const int64_t vector = 16 / float_size(x.type);
  return is_aligned(x.data, 16) && (x.rows == 1 || (x.columns % vector == 0 && x.stride % vector == 0));
}

}  // namespace adpdm::cuda
