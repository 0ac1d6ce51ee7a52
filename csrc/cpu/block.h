// Blocks of float32 that fit the L1 cache, read from and written to tensors of any float type. Per
// instruction set, like vec.h.
#pragma once

#include <cstring>

#include "core/float_convert.h"
#include "core/row_view.h"
#include "cpu/vec.h"

namespace adpdm::cpu::ADPDM_ISA_NAMESPACE {
namespace {

// 4 KiB of float32: x, gradient, result and their 16-bit originals together stay below half of a 32 KiB L1
// cache.
constexpr int64_t kBlock = 1024;

// Up to kBlock elements as float32, readable up to the next multiple of kLanes. A whole float32 block is read
// in place.
class BlockReader {
 public:
  ADPDM_VEC BlockReader(const void* data, FloatType type) : data_(data), type_(type) {}

  // Elements [begin, begin + n), then zeros; valid until the next call.
  const float* read(int64_t begin, int64_t n) {
    const int64_t padded = padded_to_lanes(n);
    if (type_ == FloatType::kFloat32) {
      const float* source = static_cast<const float*>(data_) + begin;
      if (padded == n) return source;
      std::memcpy(buffer_, source, static_cast<size_t>(n) * sizeof(float));
    } else {
      const uint16_t* source = static_cast<const uint16_t*>(data_) + begin;
      if (type_ == FloatType::kBFloat16) {
        for (int64_t i = 0; i < n; ++i) buffer_[i] = bf16_to_float(source[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) buffer_[i] = f16_to_float(source[i]);
      }
    }
    for (int64_t i = n; i < padded; ++i) buffer_[i] = 0.0f;
    return buffer_;
  }

 private:
  const void* data_;
  FloatType type_;
  alignas(64) float buffer_[kBlock];
};

// Room for up to kBlock float32 results, writable up to the next multiple of kLanes.
class BlockWriter {
 public:
  ADPDM_VEC BlockWriter(void* data, FloatType type) : data_(data), type_(type) {}

  // Where to put elements [begin, begin + n); they are in the tensor after commit().
  float* open(int64_t begin, int64_t n) {
    if (type_ == FloatType::kFloat32 && padded_to_lanes(n) == n) return static_cast<float*>(data_) + begin;
    return buffer_;
  }

  void commit(int64_t begin, int64_t n) {
    if (type_ == FloatType::kFloat32) {
      if (padded_to_lanes(n) == n) return;
      std::memcpy(static_cast<float*>(data_) + begin, buffer_, static_cast<size_t>(n) * sizeof(float));
      return;
    }
    uint16_t* target = static_cast<uint16_t*>(data_) + begin;
    if (type_ == FloatType::kBFloat16) {
      for (int64_t i = 0; i < n; ++i) target[i] = float_to_bf16(buffer_[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) target[i] = float_to_f16(buffer_[i]);
    }
  }

 private:
  void* data_;
  FloatType type_;
  alignas(64) float buffer_[kBlock];
};

// x [n], readable to a multiple of 16 -> codes [n rounded up to 16].
ADPDM_VEC void quantize_block(const float* x, int64_t n, const Quantizer& quantizer, int8_t* codes) {
  const VecQuantizer q(quantizer);
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec lanes[kVecs];
    for (int v = 0; v < kVecs; ++v) lanes[v] = load(x + i + v * Vec::kSize);
    store_quantized(codes + i, lanes, q);
  }
}

// Calls body(begin, n) for the blocks of [0, size).
template <typename Body>
ADPDM_VEC void for_each_block(int64_t size, Body&& body) {
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t left = size - begin;
    body(begin, left < kBlock ? left : kBlock);
  }
}

}  // namespace
}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
