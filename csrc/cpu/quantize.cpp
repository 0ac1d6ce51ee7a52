// Quantization on the CPU: picks the group's quantizer, cuts the tensor into pieces and hands them to the
// threads.
#include "core/quantize.h"

#include "core/group_index.h"
#include "core/quant_math.h"
#include "cpu/chunks.h"
#include "cpu/quantize_kernels.h"

namespace adpdm::cpu {

Quantizer current_quantizer(const char* op, const GroupedQParams& qparams, int num_bits) {
  const int64_t group = current_group(op, qparams.group_index, qparams.num_groups);
  const float scale = qparams.scale[group];
  const CodeRange range = signed_range(num_bits);
  return {scale, 1.0f / scale, static_cast<float>(qparams.zero_point[group]),
          static_cast<float>(range.quant_min), static_cast<float>(range.quant_max)};
}

namespace {

const void* element(const RowView& x, int64_t row, int64_t column) {
  return static_cast<const char*>(x.data) + (row * x.stride + column) * float_size(x.type);
}

const void* element(const PlanesView& x, int64_t image, int64_t channel, int64_t pixel) {
  const int64_t index = image * x.stride + channel * x.pixels + pixel;
  return static_cast<const char*>(x.data) + index * float_size(x.type);
}

void* offset(void* data, FloatType type, int64_t index) {
  return static_cast<char*>(data) + index * float_size(type);
}

}  // namespace

void quantize(const RowView& view, const GroupedQParams& qparams, int num_bits, int8_t* codes) {
  const RowView x = collapse(view);
  const Quantizer quantizer = current_quantizer("quantize", qparams, num_bits);
  const auto quantize_row = ADPDM_SELECT_ISA(quantize_row);
  for_each_piece(x.rows, x.columns, [&](const Piece& piece) {
    quantize_row(element(x, piece.row, piece.column), x.type, piece.columns, quantizer,
                 codes + piece.row * x.columns + piece.column);
  });
}

void quantize_channels_last(const PlanesView& x, const GroupedQParams& qparams, int num_bits, int8_t* codes) {
  const Quantizer quantizer = current_quantizer("quantize", qparams, num_bits);
  const auto quantize_tile = ADPDM_SELECT_ISA(quantize_tile);
  const int64_t channel_tiles = (x.channels + kTileChannels - 1) / kTileChannels;
  const int64_t pixel_tiles = (x.pixels + kTilePixels - 1) / kTilePixels;
  const int64_t grain = kMinElementsPerThread / (kTileChannels * kTilePixels);
  // Channels first, so that the codes of a tile of pixels are finished together.
  parallel_for(0, x.batch * pixel_tiles * channel_tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / channel_tiles / pixel_tiles;
      const int64_t pixel = i / channel_tiles % pixel_tiles * kTilePixels;
      const int64_t channel = i % channel_tiles * kTileChannels;
      const void* first = element(x, image, channel, pixel);
      quantize_tile({first, x.type, std::min(kTileChannels, x.channels - channel),
                     std::min(kTilePixels, x.pixels - pixel), x.pixels},
                    quantizer, codes + (image * x.pixels + pixel) * x.channels + channel, x.channels);
    }
  });
}

void quantize_int4(const RowView& x, const GroupedQParams& qparams, uint8_t* packed) {
  const Quantizer quantizer = current_quantizer("quantize_int4", qparams, 4);
  const auto quantize_row = ADPDM_SELECT_ISA(quantize_int4_row);
  for_each_piece(x.rows, x.columns, [&](const Piece& piece) {
    quantize_row(element(x, piece.row, piece.column), x.type, piece.columns, quantizer,
                 packed + piece.row * int4_row_bytes(x.columns) + piece.column / 2);
  });
}

void dequantize(const int8_t* codes, int64_t size, const GroupedQParams& qparams, FloatType type, void* x) {
  const Quantizer quantizer = current_quantizer("dequantize", qparams, 8);
  const auto dequantize_row = ADPDM_SELECT_ISA(dequantize_row);
  for_each_piece(1, size, [&](const Piece& piece) {
    dequantize_row(codes + piece.column, piece.columns, quantizer, type, offset(x, type, piece.column));
  });
}

void dequantize_int4(const uint8_t* packed, int64_t rows, int64_t columns, const GroupedQParams& qparams,
                     FloatType type, void* x) {
  const Quantizer quantizer = current_quantizer("dequantize_int4", qparams, 4);
  const auto dequantize_row = ADPDM_SELECT_ISA(dequantize_int4_row);
  for_each_piece(rows, columns, [&](const Piece& piece) {
    dequantize_row(packed + piece.row * int4_row_bytes(columns) + piece.column / 2, piece.columns, quantizer,
                   type, offset(x, type, piece.row * columns + piece.column));
  });
}

void pack_int4(const int8_t* codes, int64_t rows, int64_t columns, uint8_t* packed) {
  const auto pack_row = ADPDM_SELECT_ISA(pack_int4_row);
  for_each_piece(rows, columns, [&](const Piece& piece) {
    pack_row(codes + piece.row * columns + piece.column, piece.columns,
             packed + piece.row * int4_row_bytes(columns) + piece.column / 2);
  });
}

void unpack_int4(const uint8_t* packed, int64_t rows, int64_t columns, int8_t* codes) {
  const auto unpack_row = ADPDM_SELECT_ISA(unpack_int4_row);
  for_each_piece(rows, columns, [&](const Piece& piece) {
    unpack_row(packed + piece.row * int4_row_bytes(columns) + piece.column / 2, piece.columns,
               codes + piece.row * columns + piece.column);
  });
}

}  // namespace adpdm::cpu
