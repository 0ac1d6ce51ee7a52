// The per-instruction-set part of quantization: rows of contiguous elements.
#pragma once

#include "core/types.h"
#include "cpu/isa.h"

namespace adpdm::cpu {

// The quantizer of the current group, unpacked.
struct Quantizer {
  float scale;
  float inv_scale;
  float zero_point;
  float quant_min;
  float quant_max;
};

// The quantizer of the current group. Throws std::out_of_range for a group index outside [0, num_groups).
Quantizer current_quantizer(const char* op, const GroupedQParams& qparams, int num_bits);

// x [size] of type -> codes [size].
ADPDM_DECLARE_PER_ISA(void quantize_row(const void* x, FloatType type, int64_t size,
                                        const Quantizer& quantizer, int8_t* codes))

// Part of one image with its channels first. Codes of 64 channels are a cache line, written once; 128 pixels
// of a channel are a run of lines that the prefetcher follows.
constexpr int64_t kTileChannels = 64;
constexpr int64_t kTilePixels = 128;
struct PlanesTile {
  const void* x;  // [channels, pixels] of type, channels `plane` elements apart
  FloatType type;
  int64_t channels;  // <= kTileChannels
  int64_t pixels;    // <= kTilePixels
  int64_t plane;
};

// tile -> codes [pixels, channels], pixels `stride` apart.
ADPDM_DECLARE_PER_ISA(void quantize_tile(const PlanesTile& tile, const Quantizer& quantizer, int8_t* codes,
                                         int64_t stride))

// x [size] of type -> packed [int4_row_bytes(size)].
ADPDM_DECLARE_PER_ISA(void quantize_int4_row(const void* x, FloatType type, int64_t size,
                                             const Quantizer& quantizer, uint8_t* packed))

// codes [size] -> x [size] of type.
ADPDM_DECLARE_PER_ISA(void dequantize_row(const int8_t* codes, int64_t size, const Quantizer& quantizer,
                                          FloatType type, void* x))

// packed [int4_row_bytes(size)] -> x [size] of type.
ADPDM_DECLARE_PER_ISA(void dequantize_int4_row(const uint8_t* packed, int64_t size,
                                               const Quantizer& quantizer, FloatType type, void* x))

// codes [size] <-> packed [int4_row_bytes(size)].
ADPDM_DECLARE_PER_ISA(void pack_int4_row(const int8_t* codes, int64_t size, uint8_t* packed))
ADPDM_DECLARE_PER_ISA(void unpack_int4_row(const uint8_t* packed, int64_t size, int8_t* codes))

}  // namespace adpdm::cpu
