// What the tests of the element-wise ops share: instruction sets, inputs and the conversion of test data.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "core/float_convert.h"
#include "core/row_view.h"
#include "cpu/isa.h"

namespace adpdm::testing {

constexpr FloatType kFloatTypes[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};

// Nothing, one, around a vector, around a block of 1024 and around a chunk of 16384.
constexpr int64_t kSizes[] = {0, 1, 15, 16, 17, 1023, 1025, 16384, 16385, 40000};

inline std::vector<cpu::Isa> supported_isas() {
  std::vector<cpu::Isa> isas;
  for (cpu::Isa isa :
       {cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvxVnni, cpu::Isa::kAvx512, cpu::Isa::kAmx}) {
    if (cpu::cpu_supports(isa)) isas.push_back(isa);
  }
  return isas;
}

// The bytes of `values` as a tensor of that type.
inline std::vector<uint8_t> encode(const std::vector<float>& values, FloatType type) {
  std::vector<uint8_t> bytes(values.size() * static_cast<size_t>(float_size(type)));
  for (size_t i = 0; i < values.size(); ++i) {
    if (type == FloatType::kFloat32) {
      std::memcpy(&bytes[4 * i], &values[i], 4);
    } else {
      const uint16_t half = type == FloatType::kBFloat16 ? float_to_bf16(values[i]) : float_to_f16(values[i]);
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  return bytes;
}

inline std::vector<float> decode(const std::vector<uint8_t>& bytes, FloatType type) {
  std::vector<float> values(bytes.size() / static_cast<size_t>(float_size(type)));
  for (size_t i = 0; i < values.size(); ++i) {
    if (type == FloatType::kFloat32) {
      std::memcpy(&values[i], &bytes[4 * i], 4);
    } else {
      uint16_t half;
      std::memcpy(&half, &bytes[2 * i], 2);
      values[i] = type == FloatType::kBFloat16 ? bf16_to_float(half) : f16_to_float(half);
    }
  }
  return values;
}

inline std::vector<float> random_normal(int64_t size, unsigned seed, float deviation = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = normal(engine);
  return values;
}

}  // namespace adpdm::testing
