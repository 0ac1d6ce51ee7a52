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

// x [n], readable to a multiple of 16 -> codes [n rounded up to 16].
ADPDM_VEC void quantize_block(const float* x, int64_t n, const Quantizer& quantizer, int8_t* codes) {
  const VecQuantizer q(quantizer);
  int64_t i = 0;
  const auto many = [&](auto is_8_bit) {
    for (; i + kManyLanes <= n; i += kManyLanes) store_many_quantized<is_8_bit>(codes + i, x + i, q);
  };
  if (quantizer.quant_min == -128.0f && quantizer.quant_max == 127.0f) {
    many(std::true_type());
  } else {
    many(std::false_type());
  }
  for (; i < n; i += kLanes) {
    Vec lanes[kVecs];
    for (int v = 0; v < kVecs; ++v) lanes[v] = load(x + i + v * Vec::kSize);
    store_quantized(codes + i, lanes, q);
  }
}

// The first n of 16 lanes -> codes [n].
ADPDM_VEC void store_some_quantized(int8_t* codes, int64_t n, const Vec* lanes, const VecQuantizer& q) {
  if (n >= kLanes) return store_quantized(codes, lanes, q);
  int8_t some[kLanes];
  store_quantized(some, lanes, q);
  std::memcpy(codes, some, static_cast<size_t>(n));
}

// The first n < kLanes elements of a row, where a vector would read beyond it.
template <FloatType kType>
class PartialLanes {
 public:
  ADPDM_VEC PartialLanes(const void* data, int64_t begin, int64_t n) {
    std::memset(lanes_, 0, sizeof lanes_);
    std::memcpy(lanes_, static_cast<const char*>(data) + begin * float_size(kType),
                static_cast<size_t>(n * float_size(kType)));
  }
  ADPDM_VEC const void* data() const { return lanes_; }

 private:
  alignas(64) char lanes_[kLanes * sizeof(float)];
};

// Elements [begin, begin + n) of kType -> 16 lanes, zeros from n on. Memory behind the last is not touched.
template <FloatType kType>
ADPDM_VEC void load_lanes(const void* x, int64_t begin, int64_t n, Vec* lanes) {
  if (n >= kLanes) {
    for (int v = 0; v < kVecs; ++v) lanes[v] = load_as<kType>(x, begin + v * Vec::kSize);
    return;
  }
#if defined(__AVX512F__)
  // Through memory, as below, it would wait for the bytes to get there and back.
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (kType == FloatType::kFloat32) {
    lanes[0] = Vec(_mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + begin));
    return;
  }
  alignas(32) uint16_t halves[kLanes];
  const __m256i some = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + begin);
  _mm256_store_si256(reinterpret_cast<__m256i*>(halves), some);
  lanes[0] = load_as<kType>(halves, 0);
#else
  const PartialLanes<kType> rest(x, begin, n);
  for (int v = 0; v < kVecs; ++v) lanes[v] = load_as<kType>(rest.data(), v * Vec::kSize);
#endif
}

// x [begin, begin + n) of kType -> row [n] f32, zeros behind it up to a multiple of 16.
template <FloatType kType>
ADPDM_VEC void read_row(const void* x, int64_t begin, int64_t n, float* row) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec lanes[kVecs];
    load_lanes<kType>(x, begin + i, n - i, lanes);
    for (int v = 0; v < kVecs; ++v) store(row + i + v * Vec::kSize, lanes[v]);
  }
}

// row [n] f32, readable to a multiple of 16 -> x [begin, begin + n) of kType.
template <FloatType kType>
ADPDM_VEC void write_row(const float* row, int64_t n, void* x, int64_t begin) {
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) store_as<kType>(x, begin + i, load(row + i));
  if (i == n) return;
  alignas(32) float rest[Vec::kSize];  // as many bytes as a vector of any type
  store_as<kType>(rest, 0, load(row + i));
  std::memcpy(static_cast<char*>(x) + (begin + i) * float_size(kType), rest,
              static_cast<size_t>((n - i) * float_size(kType)));
}

// Up to kBlock elements as float32, readable up to the next multiple of kLanes. A whole float32 block is read
// in place.
class BlockReader {
 public:
  ADPDM_VEC BlockReader(const void* data, FloatType type) : data_(data), type_(type) {}

  // Elements [begin, begin + n), then zeros; valid until the next call.
  const float* read(int64_t begin, int64_t n) {
    if (type_ == FloatType::kFloat32 && padded_to_lanes(n) == n)
      return static_cast<const float*>(data_) + begin;
    with_type(type_, [&](auto type) { read_row<type>(data_, begin, n, buffer_); });
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
    if (type_ == FloatType::kFloat32 && padded_to_lanes(n) == n) return;
    with_type(type_, [&](auto type) { write_row<type>(buffer_, n, data_, begin); });
  }

 private:
  void* data_;
  FloatType type_;
  alignas(64) float buffer_[kBlock];
};

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
