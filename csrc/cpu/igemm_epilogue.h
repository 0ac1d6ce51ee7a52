// What becomes of the float results of a tile before they are stored (core/igemm.h). Per instruction set,
// like vec.h.
#pragma once

#include <cstring>

#include "cpu/block.h"
#include "cpu/igemm.h"

namespace adpdm::cpu::ADPDM_ISA_NAMESPACE {
namespace {

template <FloatType kType>
ADPDM_VEC float element_as(const void* row, int64_t i) {
  if constexpr (kType == FloatType::kFloat32) return static_cast<const float*>(row)[i];
  if constexpr (kType == FloatType::kBFloat16) return bf16_to_float(static_cast<const uint16_t*>(row)[i]);
  if constexpr (kType == FloatType::kFloat16) return f16_to_float(static_cast<const uint16_t*>(row)[i]);
}

// values [n] += row [n] of kType.
template <FloatType kType>
ADPDM_VEC void add_row(const void* row, int64_t n, float* values) {
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) store(values + i, load(values + i) + load_as<kType>(row, i));
  for (; i < n; ++i) values[i] += element_as<kType>(row, i);
}

// values [n] *= row [n].
ADPDM_VEC void scale_row(const float* row, int64_t n, float* values) {
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) store(values + i, load(values + i) * load(row + i));
  for (; i < n; ++i) values[i] *= row[i];
}

// values [n] -> row [n] of kType.
template <FloatType kType>
ADPDM_VEC void store_row(const float* values, int64_t n, void* row) {
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) store_as<kType>(row, i, load(values + i));
  if (i == n) return;
  alignas(64) char rest[kLanes * sizeof(float)];
  store_as<kType>(rest, 0, load(values + i));
  std::memcpy(static_cast<char*>(row) + i * float_size(kType), rest,
              static_cast<size_t>((n - i) * float_size(kType)));
}

// values [n] -> codes [n].
ADPDM_VEC void store_codes_row(const float* values, int64_t n, const Quantizer& quantizer, int8_t* codes) {
  const int64_t whole = n / kLanes * kLanes;
  quantize_block(values, whole, quantizer, codes);
  if (whole == n) return;
  int8_t rest[kLanes];
  quantize_block(values + whole, kLanes, quantizer, rest);
  std::memcpy(codes + whole, rest, static_cast<size_t>(n - whole));
}

void apply_rows(const Tile& tile, int64_t width, float* values) {
  const TileOutput& output = tile.output;
  for (int p = 0; p < tile.num_pixels; ++p) {
    float* row = values + p * width;
    if (output.row_scale || output.row_bias) {
      const int64_t first = (tile.first_pixel + p) / output.image_pixels * output.outputs;
      if (output.row_scale) scale_row(output.row_scale + first, tile.num_outputs, row);
      if (output.row_bias) add_row<FloatType::kFloat32>(output.row_bias + first, tile.num_outputs, row);
    }
    if (output.residual) {
      with_type(output.residual_type, [&](auto type) {
        const char* residual = output.residual + p * output.outputs * float_size(type());
        add_row<type()>(residual, tile.num_outputs, row);
      });
    }
  }
}

// values [n], n a multiple of 16: pairs (value, gate) -> n / 2 results from the start.
void apply_geglu(int64_t n, float* values) {
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const int64_t pairs = n - i < 2 * kLanes ? (n - i) / 2 : kLanes;
    alignas(64) float value[kLanes] = {}, gate[kLanes] = {};
    for (int64_t j = 0; j < pairs; ++j) {
      value[j] = values[i + 2 * j];
      gate[j] = values[i + 2 * j + 1];
    }
    for (int j = 0; j < kLanes; j += Vec::kSize) store(value + j, load(value + j) * gelu(load(gate + j)));
    std::memcpy(values + i / 2, value, static_cast<size_t>(pairs) * sizeof(float));
  }
}

// values [n], n a multiple of 16, become function(values).
template <typename Function>
void apply(int64_t n, float* values, Function&& function) {
  for (int64_t i = 0; i < n; i += Vec::kSize) store(values + i, function(load(values + i)));
}

// values [n] -> results at the start, half as many with geglu.
void apply_activation(Activation activation, int64_t n, float* values) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kSilu:
      return apply(n, values, [](Vec x) { return silu(x); });
    case Activation::kGelu:
      return apply(n, values, [](Vec x) { return gelu(x); });
    case Activation::kGeluTanh:
      return apply(n, values, [](Vec x) { return gelu_tanh(x); });
    case Activation::kGeglu:
      return apply_geglu(n, values);
  }
}

// ---- floats that are stored as floats
// ----------------------------------------------------------------------

// Whether results are what float32 sums become by additions and multiplications, in whole vectors, and of
// that type: then every value is loaded and stored once, or needs no memory on its way.
inline bool ends_in_floats(const Tile& tile, FloatType type) {
  const TileOutput& output = tile.output;
  return !output.quantized && output.type == type && output.activation == Activation::kNone &&
         (!output.residual || output.residual_type == type) && tile.num_outputs % Vec::kSize == 0;
}

// One vector of outputs, from v on, of some pixels of an image -> results: for_each calls body(values, pixel)
// for each of them.
template <FloatType kType, typename ForEach>
ADPDM_VEC void store_results(const TileOutput& output, int64_t image, int64_t v, ForEach&& for_each) {
  const int64_t image_row = image * output.outputs + v;
  if (output.row_scale) {
    const Vec factor = load(output.row_scale + image_row);
    for_each([&](Vec& value, int64_t) { value = value * factor; });
  }
  if (output.row_bias) {
    const Vec term = load(output.row_bias + image_row);
    for_each([&](Vec& value, int64_t) { value = value + term; });
  }
  if (output.residual) {
    for_each([&](Vec& value, int64_t pixel) {
      value = value + load_as<kType>(output.residual, pixel * output.outputs + v);
    });
  }
  if (output.scale != 1.0f) for_each([&](Vec& value, int64_t) { value = value * Vec(output.scale); });
  for_each([&](Vec& value, int64_t pixel) { store_as<kType>(output.data, pixel * output.step + v, value); });
}

// The image of a pixel, 0 where it does not matter.
inline int64_t image_of(const TileOutput& output, int64_t pixel) {
  return output.row_scale || output.row_bias ? pixel / output.image_pixels : 0;
}

template <FloatType kType>
void store_floats(const Tile& tile, const float* values) {
  for (int p = 0; p < tile.num_pixels; ++p, values += tile.num_blocks * kBlockOutputs) {
    const int64_t image = image_of(tile.output, tile.first_pixel + p);
    for (int64_t i = 0; i < tile.num_outputs; i += Vec::kSize) {
      Vec value = load(values + i);
      store_results<kType>(tile.output, image, i, [&](auto&& body) { body(value, p); });
    }
  }
}

// ---- all tiles
// ---------------------------------------------------------------------------------------------

// values [num_pixels][num_blocks][16 outputs] f32, aligned; used up.
void finish_tile(const Tile& tile, float* values) {
  const TileOutput& output = tile.output;
  if (ends_in_floats(tile, FloatType::kFloat32)) return store_floats<FloatType::kFloat32>(tile, values);
  if (ends_in_floats(tile, FloatType::kBFloat16)) return store_floats<FloatType::kBFloat16>(tile, values);
  int64_t width = tile.num_blocks * kBlockOutputs;
  int64_t results = tile.num_outputs;
  const int64_t n = tile.num_pixels * width;
  if (output.row_scale || output.row_bias || output.residual) apply_rows(tile, width, values);
  if (output.scale != 1.0f) {
    apply(n, values, [&](Vec x) { return x * Vec(output.scale); });
  }
  apply_activation(output.activation, n, values);
  if (output.activation == Activation::kGeglu) {
    width /= 2;
    results /= 2;
  }
  for (int p = 0; p < tile.num_pixels; ++p) {
    const float* row = values + p * width;
    if (output.quantized) {
      store_codes_row(row, results, output.quantizer,
                      reinterpret_cast<int8_t*>(output.data) + p * output.step);
      continue;
    }
    with_type(output.type, [&](auto type) {
      store_row<type()>(row, results, output.data + p * output.step * float_size(type()));
    });
  }
}

}  // namespace
}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
