// Quantization to integer codes and back, with the quantizer of the current group.
#pragma once

#include "core/row_view.h"
#include "core/stream.h"
#include "core/types.h"

namespace adpdm {

// Codes stored together: 32 consecutive columns in 16 bytes, byte j = code j | code (j + 16) << 4.
constexpr int64_t kInt4Block = 32;

// Bytes of a row of packed 4-bit codes.
constexpr int64_t int4_row_bytes(int64_t columns) {
  return (columns + kInt4Block - 1) / kInt4Block * (kInt4Block / 2);
}

// Channels first: images `stride` elements apart, as half of a concatenation leaves them.
struct PlanesView {
  const void* data;  // [batch, channels, pixels] of `type`, dense within an image
  FloatType type;
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t stride;  // does not matter for one image
};

namespace cpu {

// All throw std::out_of_range for a group index outside [0, num_groups) before anything is written.
void quantize(const RowView& x, const GroupedQParams& qparams, int num_bits,
              int8_t* codes);  // [rows, columns] dense

// Codes of a channels-first tensor, channels last as conv2d reads them.
void quantize_channels_last(const PlanesView& x, const GroupedQParams& qparams, int num_bits,
                            int8_t* codes);  // [batch, pixels, channels]

void quantize_int4(const RowView& x, const GroupedQParams& qparams,
                   uint8_t* packed);  // [rows, int4_row_bytes(columns)]

void dequantize(const int8_t* codes,  // [size]
                int64_t size, const GroupedQParams& qparams, FloatType type,
                void* x);  // [size] of type

void dequantize_int4(const uint8_t* packed,  // [rows, int4_row_bytes(columns)]
                     int64_t rows, int64_t columns, const GroupedQParams& qparams, FloatType type,
                     void* x);  // [rows, columns] of type

void pack_int4(const int8_t* codes,  // [rows, columns], low four bits count
               int64_t rows, int64_t columns,
               uint8_t* packed);  // [rows, int4_row_bytes(columns)]

void unpack_int4(const uint8_t* packed,  // [rows, int4_row_bytes(columns)]
                 int64_t rows, int64_t columns,
                 int8_t* codes);  // [rows, columns]

}  // namespace cpu

// The same on the stream. An index outside [0, num_groups) acts as the nearest inside: a kernel cannot raise.
// All throw CudaError where the launch fails.
namespace cuda {

void quantize(const RowView& x, const GroupedQParams& qparams, int num_bits,
              int8_t* codes,  // [rows, columns] dense
              Stream stream);

void quantize_channels_last(const PlanesView& x, const GroupedQParams& qparams, int num_bits,
                            int8_t* codes,  // [batch, pixels, channels]
                            Stream stream);

void quantize_int4(const RowView& x, const GroupedQParams& qparams,
                   uint8_t* packed,  // [rows, int4_row_bytes(columns)]
                   Stream stream);

void dequantize(const int8_t* codes,  // [size]
                int64_t size, const GroupedQParams& qparams, FloatType type,
                void* x,  // [size] of type
                Stream stream);

void dequantize_int4(const uint8_t* packed,  // [rows, int4_row_bytes(columns)]
                     int64_t rows, int64_t columns, const GroupedQParams& qparams, FloatType type,
                     void* x,  // [rows, columns] of type
                     Stream stream);

void pack_int4(const int8_t* codes,  // [rows, columns], low four bits count
               int64_t rows, int64_t columns,
               uint8_t* packed,  // [rows, int4_row_bytes(columns)]
               Stream stream);

void unpack_int4(const uint8_t* packed,  // [rows, int4_row_bytes(columns)]
                 int64_t rows, int64_t columns,
                 int8_t* codes,  // [rows, columns]
                 Stream stream);

}  // namespace cuda
}  // namespace adpdm
