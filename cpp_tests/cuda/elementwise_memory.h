// What the tests of the element-wise CUDA kernels share: inputs with special values, tensors that begin
// anywhere, several schedules of the executor.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/device_memory.h"
#include "elementwise_cases.h"

namespace adpdm::testing {

// Normal numbers with ties, saturating, infinite and NaN ones strewn in.
inline std::vector<float> special_values(int64_t size, unsigned seed, float deviation = 40.0f) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const float special[] = {0.0f, -0.0f, 0.5f, 1.5f, -2.5f, 1e30f, -1e30f, 6e4f, 1e-30f, kInf, -kInf, kNan};
  std::vector<float> values = random_normal(size, seed, deviation);
  std::mt19937 engine(seed);
  for (float value : special) {
    if (size > 0) values[engine() % values.size()] = value;
  }
  return values;
}

// A tensor in global memory that begins `offset` elements behind a multiple of 256 bytes.
template <typename T>
class OffsetBuffer {
 public:
  OffsetBuffer(int64_t size, int64_t offset) : offset_(offset), buffer_(size + offset) {}

  OffsetBuffer(const std::vector<T>& values, int64_t offset)
      : OffsetBuffer(static_cast<int64_t>(values.size()), offset) {
    std::vector<T> all = buffer_.host();
    std::copy(values.begin(), values.end(), all.begin() + offset);
    buffer_.set(all);
  }

  T* data() { return buffer_.data() + offset_; }
  const T* data() const { return buffer_.data() + offset_; }

  // The tensor; what lies before it must not have been written.
  std::vector<T> host() const {
    const std::vector<T> all = buffer_.host();
    if (offset_ == 0) return all;  // memcmp takes no null pointer, not even for 0 bytes
    std::vector<T> poison(static_cast<size_t>(offset_));
    std::memset(poison.data(), detail::kPoisonByte, poison.size() * sizeof(T));
    EXPECT_EQ(std::memcmp(all.data(), poison.data(), poison.size() * sizeof(T)), 0)
        << "written before the tensor";
    return std::vector<T>(all.begin() + offset_, all.end());
  }

 private:
  int64_t offset_;
  DeviceBuffer<T> buffer_;
};

// A float tensor of any type; `offset` counts its elements.
class FloatBuffer {
 public:
  FloatBuffer(const std::vector<float>& values, FloatType type, int64_t offset = 0)
      : type_(type), host_(encode(values, type)), device_(host_, offset * float_size(type)) {}
  FloatBuffer(int64_t size, FloatType type, int64_t offset = 0)
      : type_(type), device_(size * float_size(type), offset * float_size(type)) {}

  void* data() { return device_.data(); }
  const void* data() const { return device_.data(); }
  const std::vector<uint8_t>& input() const { return host_; }  // what it was made of
  std::vector<uint8_t> bytes() const { return device_.host(); }
  std::vector<float> values() const { return decode(bytes(), type_); }

 private:
  FloatType type_;
  std::vector<uint8_t> host_;
  OffsetBuffer<uint8_t> device_;
};

// Bits that tell floats apart, with all NaN alike.
inline std::vector<uint32_t> bits_of(const std::vector<float>& values) {
  std::vector<uint32_t> bits;
  for (float value : values) bits.push_back(value != value ? 0x7fc00000u : float_to_bits(value));
  return bits;
}

// Calls body once per order in which the executor runs warps; once on a GPU.
template <typename Body>
void for_each_schedule(Body&& body) {
#ifdef ADPDM_SIMT
  for (uint64_t seed : {1, 2, 3}) {
    const simt::ScopedOptions scope({seed, true});
    body();
  }
#else
  body();
#endif
}

}  // namespace adpdm::testing
